"""Spectra of the weights in the monitor: what is told of them, and what is done about them."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import foreshock as fs
from foreshock.guard import Reason
from foreshock.records import read_telemetry
from foreshock.signals import SpectralWatch
from tests.monitor import training as t

KEYS = {"spectral_kappa", "spectral_slope", "spectral_volatility", "risk_level", "worst_layer"}


def calm_run(epochs: int = 6) -> t.Run:
    """Weights that do not move but where they are struck."""
    return t.make_run(epochs=epochs, optimizer=lambda ps: torch.optim.SGD(ps, lr=0.0))


def shaken_run(first: int = 12, last: int = 13, size: float = 0.2) -> t.Run:
    """Calm, until the singular values of one matrix are pulled apart, more at every step."""
    run = calm_run()

    def stretch(run: t.Run) -> None:
        weight = run.model.get_parameter("body.0.weight")
        weight[0] *= 1 + size

    run.strikes = [t.Strike(step, stretch) for step in range(first, last + 1)]
    return run


def monitor_of(run: t.Run, out_dir: Path, mode: Any = "recover", **given: Any) -> fs.Monitor:
    options = {"spectral_interval": 1, "spectral_warmup": 0, "telemetry_interval": 5, **given}
    guard = fs.Guard(mode=mode, snapshot_interval=5, lr_backoff=0.5, lr_recovery_steps=1000)
    return fs.Monitor(run.model, run.optimizer, out_dir, guard, state=run.state, **options)


def telemetry(out_dir: Path, event: str = "telemetry") -> list[dict[str, Any]]:
    records = read_telemetry(out_dir / "telemetry.jsonl").records
    return [r for r in records if r["event"] == event]


def events(out_dir: Path) -> list[str]:
    records = read_telemetry(out_dir / "telemetry.jsonl").records
    return [r["event"] for r in records if r["event"] not in ("start", "telemetry")]


def test_telemetry_and_summary_tell_of_the_spectra(tmp_path: Path) -> None:
    run = calm_run()
    monitor = monitor_of(run, tmp_path, spectral_interval=10)
    t.train(run, monitor)
    summary = monitor.finalize()
    told = telemetry(tmp_path)
    assert [r["step"] for r in told] == list(range(0, 36, 5))
    assert [r["spectral_step"] for r in told] == [0, 0, 10, 10, 20, 20, 30, 30]
    assert all(set(r) >= KEYS for r in told)
    weight = run.model.get_parameter("body.0.weight")
    sigma = torch.linalg.matrix_norm(weight, 2)
    kappa = (sigma / (weight.norm() / (10 * 6**0.5))).item()
    largest = max(told[-1]["spectral_kappa"], kappa)
    assert summary["spectral"]["final_kappa"] == pytest.approx(largest, rel=1e-3)
    assert told[0]["spectral_slope"] is None
    assert told[-1]["spectral_slope"] == pytest.approx(0, abs=1e-5)
    assert summary["spectral"]["final_risk_level"] == told[-1]["risk_level"] == "STABLE"
    assert summary["spectral"]["worst_layer"] in dict(run.model.named_parameters())


def test_it_can_be_switched_off_and_told_what_to_watch(tmp_path: Path) -> None:
    run = calm_run()
    monitor = monitor_of(run, tmp_path / "off", spectral_enabled=False)
    t.train(run, monitor)
    assert monitor.finalize()["spectral"] is None
    assert not KEYS & set(telemetry(tmp_path / "off")[0])
    run = calm_run()
    monitor = monitor_of(run, tmp_path / "head", spectral_include=["head.*"])
    t.train(run, monitor)
    assert monitor.finalize()["spectral"]["worst_layer"] == "head.weight"
    with pytest.raises(ValueError, match=r"nearest name is 'head\.weight'"):
        monitor_of(run, tmp_path, spectral_exclude=["heads.weight"])
    with pytest.raises(ValueError, match="did you mean 'spectral_interval'"):
        fs.Monitor(run.model, run.optimizer, tmp_path, spectral_intervall=3)


def test_a_restless_spectrum_is_told_of_at_every_step(tmp_path: Path) -> None:
    """The burst."""
    run = shaken_run()
    t.train(run, monitor := monitor_of(run, tmp_path, mode="observe", spectral_interval=4))
    monitor.finalize()
    steps = [r["step"] for r in telemetry(tmp_path)]
    changed = telemetry(tmp_path, "risk_level_changed")[0]
    assert changed["level"] in ("DANGER", "INSTABILITY")
    assert changed["before"] == "STABLE"
    assert changed["worst_layer"] == "body.0.weight"
    assert 12 <= changed["step"] <= 17
    burst = range(changed["step"], changed["step"] + 8)
    assert set(burst) <= set(steps)
    assert [s for s in steps if s < changed["step"]] == list(range(0, changed["step"], 5))


@pytest.mark.parametrize(
    ("mode", "response"), [("observe", "act"), ("recover", "log"), ("skip", "log")]
)
def test_nothing_is_done_where_nothing_may_be(tmp_path: Path, mode: Any, response: str) -> None:
    plain = t.train(shaken_run())
    run = shaken_run()
    monitor = monitor_of(run, tmp_path, mode=mode, spectral_response=response)
    t.train(run, monitor)
    summary = monitor.finalize()
    assert "would_roll_back" in events(tmp_path)
    assert set(events(tmp_path)) <= {
        "risk_level_changed",
        "would_take_snapshot",
        "would_lower_learning_rate",
        "would_roll_back",
    }
    t.assert_same_bits(run, plain)
    assert run.steps == list(range(36))
    assert summary["guard"]["total_rollbacks"] == summary["guard"]["anomalies_seen"] == 0
    assert summary["spectral"]["highest_risk_level"] == "INSTABILITY"


def test_instability_is_rolled_back_and_the_run_goes_on(tmp_path: Path) -> None:
    run = shaken_run()
    monitor = monitor_of(run, tmp_path, spectral_response="act")
    t.train(run, monitor)
    summary = monitor.finalize()
    (event,) = telemetry(tmp_path, "rollback_success")
    assert event["reasons"] == [Reason.SPECTRAL_INSTABILITY.value]
    assert event["to_step"] < 12 < event["step"]
    assert summary["guard"]["total_recoveries"] == 1
    assert run.steps[-1] == 35
    # What struck does not strike again, and the spectra restored are those of before.
    t.assert_same_bits(run, t.train(calm_run()))
    assert summary["spectral"]["final_risk_level"] == "STABLE"


def test_in_skip_mode_which_has_no_way_back_instability_ends_the_run(tmp_path: Path) -> None:
    run = shaken_run()
    monitor = monitor_of(run, tmp_path, mode="skip", spectral_response="act")
    t.train(run, monitor)
    summary = monitor.finalize()
    assert not run.verdicts[-1]
    assert summary["guard"]["abort"]["reasons"] == ["SPECTRAL_INSTABILITY"]


def rising(rate: float) -> t.Run:
    """A matrix whose largest singular value grows by the same factor at every step."""
    run = calm_run(epochs=9)

    def grow(run: t.Run) -> None:
        head = run.model.get_parameter("head.weight")
        left, values, right = torch.linalg.svd(head, full_matrices=False)
        others = (values[1:].square().sum()).sqrt()
        # kappa = 10 sqrt(r) sigma / |W|: the growth of sigma that makes ln kappa a line.
        share = values[0] / (values[0] ** 2 + others**2).sqrt() * (1 + rate)
        values[0] = others * share / (1 - share**2).sqrt()
        head.copy_(left @ torch.diag(values) @ right)

    run.strikes = [t.Strike(step, grow) for step in range(10, 34)]
    return run


LEVELS = {0.001: "LEARNING", 0.003: "WARNING", 0.006: "DANGER"}


@pytest.mark.parametrize(("rate", "level"), LEVELS.items(), ids=LEVELS.values())
def test_a_steady_rise_is_answered_as_its_level_says(
    tmp_path: Path, rate: float, level: str
) -> None:
    run = rising(rate)
    options = {"spectral_include": ["head.*"], "spectral_response": "act"}
    # Of few steps, since a line that has just begun to rise is bent.
    calm = fs.signals.SpectralSettings(
        window=12, span=12, thresholds=fs.signals.RiskThresholds(instability=0.1)
    )
    guard = fs.Guard(mode="recover", snapshot_interval=1000, lr_backoff=0.5, lr_recovery_steps=1000)
    monitor = fs.Monitor(
        run.model,
        run.optimizer,
        tmp_path,
        guard,
        spectral_interval=1,
        spectral_warmup=0,
        spectral=calm,
        **options,
    )
    t.train(run, monitor)
    summary = monitor.finalize()
    assert summary["spectral"]["highest_risk_level"] == level
    said = set(events(tmp_path)) - {"risk_level_changed"}
    expected = {
        "LEARNING": set(),
        "WARNING": {"snapshot_requested"},
        "DANGER": {"snapshot_requested", "learning_rate_lowered"},
    }
    assert said == expected[level]
    snapshots = [kept.step for kept in monitor._watch.history.ring.entries]
    asked = telemetry(tmp_path, "snapshot_requested")
    assert snapshots == [0, *(r["step"] + 1 for r in asked)][-3:]
    for record in telemetry(tmp_path, "learning_rate_lowered"):
        assert record["lr_factor"] == 0.5
        assert monitor._watch.learning_rate.factor < 0.6


def test_the_first_steps_are_not_answered(tmp_path: Path) -> None:
    run = shaken_run()
    monitor = monitor_of(run, tmp_path, spectral_response="act", spectral_warmup=1000)
    t.train(run, monitor)
    summary = monitor.finalize()
    assert set(events(tmp_path)) == {"risk_level_changed"}
    assert summary["spectral"]["highest_risk_level"] == "STABLE"


@pytest.mark.parametrize(("span", "rollbacks"), [(25, []), (15, [30])], ids=["quiet", "over"])
def test_for_some_steps_after_a_rollback_no_level_is_answered(
    tmp_path: Path, span: int, rollbacks: list[int]
) -> None:
    """One that lasts until that time is over is answered then."""
    run = shaken_run()
    (strike, *_), again = run.strikes, 20
    run.strikes += [dataclasses.replace(strike, step=step) for step in (again, again + 1)]
    options = {"spectral": fs.signals.SpectralSettings(span=span), "spectral_response": "act"}
    t.train(run, monitor := monitor_of(run, tmp_path, **options))
    summary = monitor.finalize()
    changed = [r for r in telemetry(tmp_path, "risk_level_changed") if r["step"] > again]
    assert any(r["level"] == "INSTABILITY" for r in changed)
    done = [r["step"] for r in telemetry(tmp_path, "rollback_success")]
    assert done[1:] == rollbacks
    assert summary["guard"]["total_rollbacks"] == 1 + len(rollbacks)


def test_a_level_found_when_the_run_is_over_is_told_of_and_not_answered(tmp_path: Path) -> None:
    run = shaken_run(first=33, last=34)
    spectral = fs.signals.SpectralSettings(patience=1)
    options = {"spectral": spectral, "spectral_interval": 10, "spectral_response": "act"}
    t.train(run, monitor := monitor_of(run, tmp_path, **options))
    assert "risk_level_changed" not in events(tmp_path)
    summary = monitor.finalize()
    assert events(tmp_path) == ["risk_level_changed"]
    assert summary["spectral"]["highest_risk_level"] == "INSTABILITY"
    assert summary["guard"]["total_rollbacks"] == 0


def test_a_run_rolled_back_for_another_reason_goes_on_with_the_spectra_of_then(
    tmp_path: Path,
) -> None:
    found = []
    for name, strikes in (("struck", [t.Strike(17, t.nan_in_weight)]), ("plain", [])):
        run = t.make_run(epochs=4, strikes=strikes)
        guard = fs.Guard(mode="recover", snapshot_interval=4, lr_backoff=1.0)
        monitor = fs.Monitor(
            run.model, run.optimizer, tmp_path / name, guard, state=run.state, spectral_interval=3
        )
        t.train(run, monitor)
        summary = monitor.finalize()
        last = [{k: v for k, v in r.items() if k in KEYS} for r in telemetry(tmp_path / name)][-1]
        found.append((summary["spectral"], last, monitor._risk._spectra.state_dict()))
    assert found[0][:2] == found[1][:2]
    ours, theirs = (state["iterators"][0]["vectors"] for *_, state in found)
    assert torch.equal(ours, theirs)


def test_a_fault_of_our_own_ends_the_following_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(self: SpectralWatch, step: int, **_: Any) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(SpectralWatch, "begin", fail)
    run = t.make_run()
    with caplog.at_level(logging.ERROR, "foreshock"):
        monitor = monitor_of(run, tmp_path)
        t.train(run, monitor)
        assert monitor.finalize()["total_steps"] == 12
    assert len([r for r in caplog.records if "spectra" in r.message]) == 1


def test_a_model_without_matrices_is_no_trouble(tmp_path: Path) -> None:
    model = torch.nn.LayerNorm(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with fs.Monitor(model, optimizer, tmp_path) as monitor:
        for _ in range(3):
            model(torch.randn(2, 3)).sum().backward()
            optimizer.step()
            assert monitor.step(1.0)
    assert monitor.finalize()["spectral"] is None


def test_second_moments_are_held_against_gradients_as_the_optimizer_takes_them(
    tmp_path: Path,
) -> None:
    """A fused one clips them as it reads them: until then they are as they were."""
    found = {}
    for kind in ("fused", "foreach"):
        run = t.make_run(
            epochs=9, max_norm=0.01, optimizer=lambda ps, k=kind: torch.optim.AdamW(ps, **{k: True})
        )
        monitor = monitor_of(run, tmp_path / kind, mode="observe", spectral_interval=50)
        t.train(run, monitor)
        monitor.finalize()
        found[kind] = [r["second_moment_rms"] for r in telemetry(tmp_path / kind)][-1]
    assert found["fused"] == pytest.approx(found["foreach"], rel=1e-3)
    assert found["fused"] < 3
