"""When a rule has found a fault, and how early; and that results come back as written."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

from foreshock import cli
from foreshock.drill import campaign
from foreshock.drill import results as results_file
from foreshock.drill.campaign import (
    RULES_BY_NAME,
    DrillOptions,
    DrillResults,
    broken_promises,
    quickened,
)
from foreshock.drill.observation import Observation
from foreshock.drill.results import joined, markdown, read_results, write_results
from foreshock.drill.rules import RuleEntry
from foreshock.drill.scenarios import SCENARIOS
from foreshock.drill.scoring import (
    Case,
    Health,
    case_of,
    doubled_step,
    health_of,
    raised,
    score,
    watch,
)
from foreshock.drill.subjects import SUBJECTS

MLP = SUBJECTS["mlp"]


class AlarmsOver:
    def __init__(self, limit: float) -> None:
        self.limit = limit

    def update(self, step: int, seen: Observation) -> bool:
        return seen.loss > self.limit


def entry(limit: float) -> RuleEntry:
    return RuleEntry("over", "foreshock", lambda: AlarmsOver(limit), lambda seen: seen.offender)


def trace(losses: list[float], start: int = 0) -> list[Observation]:
    return [Observation(start + i, loss=x, offender="middle.weight") for i, x in enumerate(losses)]


def case(losses: list[float], twin: list[float], limit: float, name: str = "nan-weight") -> Case:
    watching = watch(entry(limit), trace(twin), 10)
    return case_of(watching, SCENARIOS[name], MLP, 0, trace(losses, 10), trace(twin), 10)


def test_an_alarm_is_raised_where_it_did_not_stand_before() -> None:
    assert raised([True, True, False, True, True, False]) == [0, 3]
    assert raised([False, True, True, True, False, True], 2) == [5]
    assert raised([False, True, False, True], 0, 3) == [1]


def test_lead_is_counted_from_the_alarm_to_the_doubled_loss() -> None:
    found = case([1.0, 1.5, 1.5, 3.0, 9.0], [1.0] * 40, limit=1.4)
    assert (found.alarm, found.doubled, found.delay, found.lead) == (11, 13, 1, 2)
    late = case([1.0, 1.5, 1.5, 3.0, 9.0], [1.0] * 40, limit=5.0)
    assert (late.delay, late.lead) == (4, -1)
    assert case([1.0] * 5, [1.0] * 40, limit=5.0).lead is None


def test_an_alarm_that_the_healthy_twin_raises_on_the_same_step_detects_nothing() -> None:
    twin = [*[1.0] * 12, 3.0, *[1.0] * 30]
    assert case([1.0, 1.0, 3.0, 1.0], twin, limit=2.0).alarm is None
    assert case([1.0, 3.0, 1.0, 1.0], twin, limit=2.0).alarm == 11


def test_an_alarm_that_stood_before_the_fault_detects_nothing() -> None:
    twin = [*[1.0] * 9, 3.0, *[1.0] * 30]
    assert case([3.0, 3.0], twin, limit=2.0).alarm is None
    assert case([1.0, 3.0], twin, limit=2.0).alarm == 11


def test_an_alarm_after_the_window_is_too_late() -> None:
    twin = [1.0] * 200
    assert case([*[1.0] * 99, 3.0], twin, limit=2.0).delay == 99
    assert case([*[1.0] * 100, 3.0], twin, limit=2.0).alarm is None


def test_the_loss_has_doubled_only_against_both_the_twins_loss_and_its_mean() -> None:
    twin = [*[1.0] * 30, 3.0, 0.1, *[1.0] * 10]
    assert doubled_step([*[1.0] * 30, 5.0, 0.3, *[1.0] * 10], twin, 25) is None
    assert doubled_step([*[1.0] * 30, 6.1, *[1.0] * 11], twin, 25) == 30
    assert doubled_step([*[1.0] * 26, math.nan, *[1.0] * 15], twin, 25) == 26
    assert doubled_step([*[1.0] * 24, 9.0, *[1.0] * 17], twin, 25) is None


def test_a_culprit_is_named_rightly_wrongly_or_not_at_all() -> None:
    losses, twin = [9.0], [1.0] * 40
    assert case(losses, twin, 5.0).is_named is True
    assert case(losses, twin, 5.0, "nan-input").is_named is False
    assert case(losses, twin, 5.0, "rate-x10").is_named is None
    assert case([1.0], twin, 5.0).is_named is None


def test_healthy_steps_count_alarms_and_the_steps_on_which_they_stand() -> None:
    watching = watch(entry(2.0), trace([1.0, 3.0, 3.0, 1.0, 3.0]), 3)
    found = health_of(watching, MLP, "plain", 0)
    assert (found.steps, found.alarms, found.standing) == (5, 2, 3)


def rows_of(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(file.read_text())))


def some_results() -> DrillResults:
    cases = [
        Case("loss spike", "rate-x10", "mlp", 0, 10, 12, 15, None),
        Case("loss spike", "rate-x10", "gpt", 0, 10, 19, 15, None),
        Case("loss spike", "lost-moments", "gpt", 0, 10, None, None, None),
        Case("loss spike", "loss-scale-overflow", "gpt", 0, 10, 11, None, None),
        Case("non-finite scan", "nan-weight", "mlp", 0, 10, 10, 10, True),
    ]
    healths = [
        Health("loss spike", "mlp", "plain", 0, 4000, 2, 3),
        Health("loss spike", "gpt", "plain", 0, 1000, 0, 0),
        Health("non-finite scan", "gpt", "plain", 0, 1000, 0, 0),
    ]
    settings = {"seeds": 1, "fault_step": 10, "torch": "2.13.0"}
    return DrillResults(settings, cases, healths)


def test_a_score_sums_up_the_cases_of_a_rule() -> None:
    given = some_results()
    found = score("loss spike", given.cases[:3], given.healths)
    assert (found.cases, found.detected, found.doubled, found.before) == (3, 2, 2, 1)
    assert found.median_delay == 5.5
    assert found.median_lead == -0.5
    assert found.per_10_000 == pytest.approx(4.0)
    assert found.standing_share == pytest.approx(0.0006)


def test_results_come_back_as_they_were_written(tmp_path: Path) -> None:
    given = some_results()
    written = write_results(given, tmp_path)
    assert sorted(written) == sorted(results_file.FILES)
    assert {p.name for p in tmp_path.iterdir()} == set(written)
    assert read_results(tmp_path / "drill.json") == given
    rows = rows_of(tmp_path / "cases.csv")
    assert [row["lead"] for row in rows] == ["3", "-4", "", "", "0"]
    rules = {row["rule"]: row for row in rows_of(tmp_path / "rules.csv")}
    assert rules["loss spike"]["cases"] == "3"  # an overflow that is dealt with is no fault
    assert (tmp_path / "drill.png").read_bytes().startswith(b"\x89PNG")


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "drill.json"
    file.write_text('{"schema_version": 99}')
    with pytest.raises(ValueError, match="schema_version 99; accepted"):
        read_results(file)


def test_the_tables_say_what_the_cases_say() -> None:
    text = markdown(some_results())
    assert "| loss spike | 2 of 3 | 4.0 | 0.06 | 5.5 | 1 of 2 | -0.5 | - |" in text
    assert "| non-finite scan | 1 of 1 | 0.0 | 0.00 | 0 | 0 of 1 | 0 | 1 of 1 |" in text
    assert "| rate-x10 | 2/2 |" in text
    assert "2/2 -0.5" in text


def test_drills_are_joined() -> None:
    one = some_results()
    both = joined([one, one])
    assert len(both.cases) == 2 * len(one.cases)
    assert both.settings == one.settings


def test_what_was_promised_is_checked() -> None:
    good = some_results()
    assert broken_promises(good) == []
    late = dataclasses.replace(good.cases[-1], alarm=12)
    misnamed = dataclasses.replace(good.cases[-1], is_named=False)
    cried = dataclasses.replace(good.healths[-1], alarms=3)
    for changed, said in (
        (dataclasses.replace(good, cases=[late]), "not found within a step"),
        (dataclasses.replace(good, cases=[misnamed]), "another name"),
        (dataclasses.replace(good, healths=[cried]), "3 false alarms"),
    ):
        (promise,) = broken_promises(changed)
        assert said in promise


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"scenarios": ("nan-wight",)}, "scenarios has 'nan-wight'; accepted: nan-weight"),
        ({"subjects": ("resnet",)}, "subjects has 'resnet'; accepted: gpt, mlp"),
        ({"seeds": 0}, "seeds is 0; accepted: at least 1"),
        ({"healthy_steps": 10}, "healthy_steps is 10; accepted: at least 500"),
    ],
)
def test_wrong_options_are_answered_with_what_is_accepted(
    wrong: dict[str, object], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        DrillOptions(**wrong)  # type: ignore[arg-type]


def test_the_full_drill_has_fifty_thousand_healthy_steps_and_several_seeds() -> None:
    options = DrillOptions()
    assert options.seeds >= 3
    each = sum(subject.healthy_steps + 2 * 500 for subject in SUBJECTS.values())
    assert options.seeds * each >= 50_000
    assert quickened(options).seeds == 1


def test_the_drill_command_runs_one_scenario_and_writes_everything(tmp_path: Path) -> None:
    typed = ["drill", "--quick", "--scenario", "nan-weight", "--model", "mlp"]
    done = CliRunner().invoke(cli.app, [*typed, "--out-dir", str(tmp_path)], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    for said in ("non-finite scan", "OLMo-core: SkipStep", "drill.json", "drill.png"):
        assert said in done.output, said
    found = read_results(tmp_path / "drill.json")
    scan = next(c for c in found.cases if c.rule == "non-finite scan")
    assert (scan.delay, scan.is_named) == (0, True)
    rules = set(RULES_BY_NAME) - {"attention logit"}
    assert {h.rule for h in found.healths} == rules


def test_the_drill_command_fails_if_a_promise_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missed = dataclasses.replace(some_results().cases[-1], alarm=None)
    broken = dataclasses.replace(some_results(), cases=[missed])
    monkeypatch.setattr(campaign, "run_drill", lambda options, show: broken)
    done = CliRunner().invoke(cli.app, ["drill", "--quick", "--out-dir", str(tmp_path)])
    assert done.exit_code == 1
    assert "did not hold" in done.output


def test_an_unknown_scenario_is_refused() -> None:
    done = CliRunner().invoke(cli.app, ["drill", "--scenario", "flood"])
    assert done.exit_code == 2
    assert "nan-weight" in done.output
