"""The command line as it is typed."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from foreshock import cli
from foreshock.drill import demo
from foreshock.drill.demo import DemoOptions
from foreshock.drill.gpt import GPTConfig, Recipe
from foreshock.guard import Action, Reason
from foreshock.records import read_summary, read_telemetry

TINY = Recipe(model=GPTConfig(context=16, width=32, num_blocks=3, num_heads=2), batch_size=4)


def options(out: Path, **changes: object) -> demo.DemoOptions:
    tiny = DemoOptions(steps=30, out_dir=out, strike_step=14, recipe=TINY)
    return dataclasses.replace(tiny, **changes)  # type: ignore[arg-type]


def tiny_options(out: Path, **typed: object) -> demo.DemoOptions:
    """What was typed, with a tiny model and a folder of the test's."""
    return options(out, **typed | {"out_dir": out})


def run(given: demo.DemoOptions) -> demo.DemoResult:
    return demo.run_demo(given, lambda step, loss, verdict: None)


def test_the_guarded_demo_survives_and_names_the_weight(tmp_path: Path) -> None:
    result = run(options(tmp_path))
    assert result.broken_promises == []
    (verdict,) = result.anomalies
    assert verdict.step == 14
    assert verdict.action is Action.ROLL_BACK
    assert str(verdict.offender) == "parameter blocks.2.mlp.up.weight: 1 NaN of 4096 values"
    assert result.sample is not None
    assert math.isfinite(result.losses[29])
    assert read_summary(tmp_path / "summary.json")["guard"]["total_recoveries"] == 1
    events = [r["event"] for r in read_telemetry(tmp_path / "telemetry.jsonl").records]
    assert events.count("rollback_success") == events.count("recovered") == 1


def test_the_unguarded_demo_dies_and_names_the_weight(tmp_path: Path) -> None:
    result = run(options(tmp_path, is_guarded=False))
    assert result.broken_promises == []
    assert result.anomalies[0].offender is not None
    assert result.anomalies[0].offender.name == demo.STRUCK_PARAMETER
    assert math.isnan(result.losses[29])
    assert result.sample is None


def test_an_undisturbed_demo_reports_nothing(tmp_path: Path) -> None:
    result = run(options(tmp_path, strike_step=None))
    assert result.broken_promises == []
    assert result.anomalies == []


def spiked_options(out: Path, **changes: object) -> demo.DemoOptions:
    spiked = {"steps": 170, "strike_step": None, "spike_step": 150}
    return options(out, **spiked | changes)


@pytest.mark.parametrize("is_guarded", [True, False])
def test_a_spike_of_the_learning_rate_raises_the_risk_level(
    tmp_path: Path, is_guarded: bool
) -> None:
    result = run(spiked_options(tmp_path, is_guarded=is_guarded))
    assert result.broken_promises == []
    raised = next(r for r in result.risks if r["step"] > 150 and r["level"] == "INSTABILITY")
    assert raised["step"] <= 156
    assert [v.reasons for v in result.anomalies] == is_guarded * [(Reason.SPECTRAL_INSTABILITY,)]
    events = [r["event"] for r in read_telemetry(tmp_path / "telemetry.jsonl").records]
    assert ("would_roll_back" in events) == (not is_guarded)


def test_a_demo_whose_spike_does_not_come_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "SPIKE_FACTOR", 1.0)
    broken = run(spiked_options(tmp_path)).broken_promises
    assert "the risk level shows the spike" in broken


def test_a_demo_that_breaks_its_promise_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "strike", lambda model: None)
    broken = run(options(tmp_path)).broken_promises
    assert "the struck tensor is named" in broken
    assert "a rollback and a recovery for each" in broken


def test_the_demo_command_tells_the_story(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "DemoOptions", functools.partial(tiny_options, tmp_path))
    typed = ["demo", "--steps", "20", "--strike-step", "14", "--out-dir", str(tmp_path)]
    done = CliRunner().invoke(cli.app, typed, env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    for told in (
        "NONFINITE_WEIGHTS",
        "blocks.2.mlp.up.weight: 1 NaN",
        "state of step 10 restored",
        "step 14: nothing is wrong when it is run again",
        "autopsy/step_14.json",
        "overhead",
        "telemetry.jsonl",
        "kappa-tilde",
        "spectral risk",
        "the model says",
    ):
        assert told in done.output, told


def test_the_demo_command_fails_if_its_promise_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "DemoOptions", functools.partial(tiny_options, tmp_path))
    monkeypatch.setattr(demo, "strike", lambda model: None)
    done = CliRunner().invoke(cli.app, ["demo", "--steps", "20", "--strike-step", "14"])
    assert done.exit_code == 1
    assert "did not happen" in done.output


def test_a_strike_beyond_the_last_step_is_refused() -> None:
    done = CliRunner().invoke(cli.app, ["demo", "--steps", "20"])
    assert done.exit_code == 2
    with pytest.raises(ValueError, match="strike_step is 50; accepted: 0 to 19"):
        demo.DemoOptions(steps=20)
    done = CliRunner().invoke(cli.app, ["demo", "--steps", "140", "--inject-lr-spike"])
    assert done.exit_code == 2
    with pytest.raises(ValueError, match="spike_step is 100; accepted: 120 to 199"):
        demo.DemoOptions(spike_step=100)


def test_info_names_every_backend_of_every_op() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "foreshock.cli", "info"],
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if not k.startswith("FORESHOCK_")},
        check=True,
    )
    for said in ("health_scan on cpu", "cpu: active", "reference: available", "instruction sets"):
        assert said in done.stdout, said


def test_gpu_check_without_a_gpu_says_so_and_exits_with_2() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_check"],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "no CUDA GPU" in done.stdout
