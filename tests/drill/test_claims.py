"""What docs/drill.md says in words is what the stored rows say in numbers."""

from __future__ import annotations

from typing import Any

import pytest
from benchmarks.rows import load

from foreshock.drill.campaign import ACTING, RULES_BY_NAME

ROWS = {(row["case"], row["variant"]): row for row in load("drill")}
BOTH = "both trainings"
SILENT = (
    "module scan",
    "loss spike",
    "precursor",
    "RMS_t, worst tensor, over 4",
    "ranks' checksums",
)


def row(rule: str, case: str = BOTH) -> dict[str, Any]:
    return ROWS[case, rule]


@pytest.mark.parametrize("rule", ACTING)
def test_what_acts_by_default_has_had_no_false_alarm(rule: str) -> None:
    assert row(rule)["false_alarms"] == 0


@pytest.mark.parametrize("rule", SILENT)
def test_these_have_had_no_false_alarm(rule: str) -> None:
    assert row(rule)["false_alarms"] == 0


def test_no_rule_warns_more_than_a_step_ahead() -> None:
    leads = [row(rule)["median_lead"] for rule in RULES_BY_NAME]
    assert max(lead for lead in leads if lead is not None) <= 1


def test_the_spectral_level_cannot_act_at_its_default() -> None:
    assert row("spectral INSTABILITY", "mlp")["standing_share"] > 0.1
    better = row("spectral INSTABILITY over 0.01")
    assert better["detected"] >= 0.9 * row("spectral INSTABILITY")["detected"]


def test_the_growth_of_sigma_finds_most_of_the_signals_of_kappa_with_few_false_alarms() -> None:
    spectral = ("spectral DANGER", "spectral INSTABILITY", "spectral INSTABILITY over 0.01")
    most = max(row(rule)["detected"] for rule in spectral)
    assert row("sigma growth")["detected"] > most
    assert row("sigma growth")["per_10_000"] < 2


def test_gradiences_slope_always_stands_and_finds_nothing() -> None:
    found = row("kappa slope")
    assert found["standing_share"] > 0.9
    assert found["detected"] == 0


def test_skip_step_finds_somewhat_more_than_the_guard_and_has_false_alarms() -> None:
    ours, theirs = row("guard, all of a step"), row("SkipStep")
    assert ours["detected"] < theirs["detected"] <= 1.15 * ours["detected"]
    assert theirs["per_10_000"] > row("gradient spike, z over 8")["per_10_000"]


def test_mad_and_cusum_find_more_than_a_z_of_the_loss() -> None:
    assert row("MAD and CUSUM")["detected"] > row("loss spike")["detected"]


def test_the_default_z_of_the_gradient_norm_has_had_no_false_alarm_where_lower_ones_have() -> None:
    default, at_8 = row("gradient spike"), row("gradient spike, z over 8")
    assert default["false_alarms"] == 0 < row("gradient spike, z over 16")["false_alarms"]
    assert at_8["false_alarms"] > 10
    assert 0.5 * at_8["detected"] <= default["detected"] <= 0.7 * at_8["detected"]


def test_the_guard_at_its_defaults_has_had_no_false_alarm() -> None:
    assert row("guard, all of a step")["false_alarms"] == 0


def test_the_drill_that_is_stored_is_a_full_one() -> None:
    found = row("guard, all of a step")
    assert found["healthy_steps"] >= 50_000
    assert min(found["seeds"].values()) >= 3
