"""One fault under a monitor: what the demo shows of it."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

from foreshock import cli
from foreshock.drill.fault_demo import FaultDemoOptions, FaultDemoResult, run_fault_demo
from foreshock.drill.scenarios import SCENARIOS
from foreshock.guard import Action, Reason


def run(fault: str, out: Path, **more: object) -> FaultDemoResult:
    given = {"steps": 40, "fault_step": 24, "out_dir": out} | more
    return run_fault_demo(FaultDemoOptions(fault, **given), lambda step, loss, verdict: None)  # type: ignore[arg-type]


def test_a_bad_weight_is_rolled_back_and_a_bad_gradient_withheld(tmp_path: Path) -> None:
    weight = run("inf-weight", tmp_path / "weight")
    assert weight.broken_promises == []
    assert [v.action for v in weight.anomalies] == [Action.ROLL_BACK]
    gradient = run("nan-gradient", tmp_path / "gradient")
    assert gradient.broken_promises == []
    assert [v.action for v in gradient.anomalies] == [Action.SKIP]
    assert math.isfinite(weight.final_loss + gradient.final_loss)


def test_without_the_guard_the_run_dies(tmp_path: Path) -> None:
    result = run("nan-weight", tmp_path, is_guarded=False)
    assert result.broken_promises == []
    assert math.isnan(result.final_loss)
    assert math.isfinite(result.final_twin_loss)


def test_a_flipped_exponent_is_rolled_back_after_the_third_bad_update(tmp_path: Path) -> None:
    result = run("exponent-weight", tmp_path)
    assert [v.action for v in result.anomalies] == [Action.SKIP, Action.SKIP, Action.ROLL_BACK]
    assert Reason.CONSECUTIVE_SKIPS in result.anomalies[-1].reasons
    assert math.isfinite(result.final_loss)


@pytest.mark.parametrize("fault", ["loss-scale-overflow", "corrupt-rank", "no-warmup"])
def test_faults_of_other_variants_are_shown_too(fault: str, tmp_path: Path) -> None:
    result = run(fault, tmp_path)
    assert result.broken_promises == []
    assert result.anomalies == []
    assert (result.ranks_disagree_from == 24) == (fault == "corrupt-rank")


def test_a_fault_that_is_not_put_in_breaks_the_promise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = dataclasses.replace(SCENARIOS["nan-weight"], inject=lambda on, age: None)
    monkeypatch.setitem(SCENARIOS, "nan-weight", gone)
    broken = run("nan-weight", tmp_path).broken_promises
    assert "the fault is found within a step" in broken
    assert "the struck tensor is named" in broken


def test_wrong_options_are_answered_with_what_is_accepted() -> None:
    with pytest.raises(ValueError, match="fault is 'flood'; accepted: nan-weight"):
        FaultDemoOptions("flood")
    with pytest.raises(ValueError, match="fault_step is 200; accepted: from 1 to"):
        FaultDemoOptions("nan-weight", fault_step=200)


def test_the_demo_command_shows_a_fault_of_the_drill(tmp_path: Path) -> None:
    typed = ["demo", "--fault", "nan-gradient", "--steps", "30", "--strike-step", "22"]
    done = CliRunner().invoke(cli.app, [*typed, "--out-dir", str(tmp_path)], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    for told in ("one element of a gradient becomes NaN", "blocks.1.mlp.up.weight: 1 NaN"):
        assert told in done.output, told
    assert "without the fault" in done.output
    refused = CliRunner().invoke(cli.app, ["demo", "--fault", "flood"])
    assert refused.exit_code == 2
    both = CliRunner().invoke(cli.app, ["demo", "--fault", "nan-weight", "--inject-lr-spike"])
    assert both.exit_code == 2
