"""What a monitored step tells of its loss, gradient and noise, and what it costs the device."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import foreshock as fs
from foreshock import monitor as monitor_module
from foreshock.records import read_telemetry
from foreshock.signals import NoiseFingerprint
from tests.monitor import training as t

NOISE = {"theta", "entropy_rate", "processivity", "f_total", "precursor_z", "precursor_alert"}


def records(out_dir: Path, event: str) -> list[dict[str, Any]]:
    told = read_telemetry(out_dir / "telemetry.jsonl").records
    return [r for r in told if r["event"] == event]


def long_run(**given: Any) -> t.Run:
    return t.make_run(epochs=20, **given)


def blow_up_loss(factor: float) -> Any:
    """Of one batch, by the weights of the head while it is run."""

    def hit(run: t.Run) -> None:
        run.model.get_parameter("head.bias")[0] += factor

    return hit


def test_telemetry_tells_scores_and_fingerprint(tmp_path: Path) -> None:
    run = long_run()
    settings = fs.signals.FingerprintSettings(
        window=16, reference_steps=16, median_of=8, entropy_window=8, processivity_window=4
    )
    guard = fs.Guard(spike_min_count=16)
    options = {"fingerprint": settings, "alignment_interval": 5}
    monitor = fs.Monitor(run.model, run.optimizer, tmp_path, guard, **options)
    t.train(run, monitor)
    monitor.finalize()
    told = records(tmp_path, "telemetry")
    assert all(set(r) >= NOISE | {"loss_z", "grad_norm_z"} for r in told)
    assert told[0]["loss_z"] is told[0]["theta"] is None
    last = told[-1]
    assert abs(last["loss_z"]) < 8
    assert 0 <= last["theta"] <= 1
    assert -1 <= last["alignment"] <= 1
    assert last["f_total"] == pytest.approx(last["entropy_rate"] + last["processivity"])


def test_plain_gradient_descent_goes_where_its_gradient_points(tmp_path: Path) -> None:
    run = long_run(optimizer=lambda ps: torch.optim.SGD(ps, lr=0.01), max_norm=None)
    monitor = fs.Monitor(run.model, run.optimizer, tmp_path, alignment_interval=3)
    t.train(run, monitor)
    monitor.finalize()
    assert records(tmp_path, "telemetry")[-1]["alignment"] == pytest.approx(1, abs=1e-3)


def test_a_run_is_compared_with_the_noise_of_an_earlier_one(tmp_path: Path) -> None:
    settings = fs.signals.FingerprintSettings(window=16, reference_steps=16, median_of=8)
    options: dict[str, Any] = {"fingerprint": settings}
    for name, fingerprint_reference in (("first", None), ("second", tmp_path / "first")):
        run = long_run()
        monitor = fs.Monitor(
            run.model,
            run.optimizer,
            tmp_path / name,
            fingerprint_reference=fingerprint_reference,
            **options,
        )
        t.train(run, monitor)
        monitor.finalize()
    first, second = (
        next(r["step"] for r in records(tmp_path / name, "telemetry") if r["theta"] is not None)
        for name in ("first", "second")
    )
    assert second < first  # it need not record a reference of its own
    with pytest.raises(ValueError, match=r"fingerprint_reference is .*nowhere"):
        fs.Monitor(run.model, run.optimizer, tmp_path / "x", fingerprint_reference="nowhere")


@pytest.mark.parametrize("lags", [True, False])
def test_the_largest_gradients_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lags: bool
) -> None:
    if lags:
        monkeypatch.setattr(monitor_module, "_LAGGING_DEVICE", "cpu")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    monitor = fs.Monitor(model, optimizer, tmp_path, telemetry_interval=1, telemetry_top_k=2)
    expected = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(torch.randn(5, 3)).square().mean()
        loss.backward()
        norms = {name: p.grad.norm().item() for name, p in model.named_parameters()}
        expected.append(sorted(norms.items(), key=lambda pair: -pair[1])[:2])
        monitor.clip_grad_norm_(1.0)
        monitor.step(loss)
        optimizer.step()
    monitor.finalize()
    told = [list(r["largest_gradients"].items()) for r in records(tmp_path, "telemetry")]
    assert len(told) == (3 if lags else 4)
    for found, right in zip(told, expected, strict=False):
        assert [name for name, _ in found] == [name for name, _ in right]
        assert dict(found) == pytest.approx(dict(right), rel=1e-5)


def test_the_fingerprint_can_be_switched_off(tmp_path: Path) -> None:
    run = t.make_run()
    monitor = fs.Monitor(run.model, run.optimizer, tmp_path, fingerprint_enabled=False)
    t.train(run, monitor)
    monitor.finalize()
    assert not NOISE & set(records(tmp_path, "telemetry")[0])


def test_a_fault_in_the_fingerprint_does_not_reach_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(NoiseFingerprint, "update", fail)
    run = t.make_run()
    with caplog.at_level(logging.ERROR, "foreshock"):
        summary = t.train_guarded(run, tmp_path)
    assert summary["total_steps"] == 12
    assert len([r for r in caplog.records if "noise" in r.message]) == 1


@pytest.mark.parametrize("mode", ["observe", "skip", "recover"])
@pytest.mark.parametrize("response", ["log", "skip"])
def test_a_spike_is_recorded_or_withheld(tmp_path: Path, mode: Any, response: Any) -> None:
    run = long_run(strikes=[t.Strike(70, blow_up_loss(300.0))])
    guard = fs.Guard(mode=mode, spike_response=response, max_consecutive_skips=100)
    monitor = fs.Monitor(run.model, run.optimizer, tmp_path, guard)
    t.train(run, monitor)
    summary = monitor.finalize()
    if response == "skip" and mode != "observe":
        skipped = records(tmp_path, "update_skipped")
        assert skipped[0]["step"] == 70
        assert "LOSS_SPIKE" in skipped[0]["reasons"]
        assert summary["guard"]["skipped_steps"] == len(skipped)
    else:
        seen = records(tmp_path, "anomaly_seen")
        assert seen[0]["step"] == 70
        assert seen[0]["would"] == "skip"
        assert "LOSS_SPIKE" in seen[0]["reasons"]
        assert summary["guard"]["skipped_steps"] == 0
        assert bool(run.verdicts[70])
    assert run.steps == list(range(120))


def test_a_run_sent_back_scores_as_one_that_was_not(tmp_path: Path) -> None:
    found = []
    for name, strikes in (("struck", [t.Strike(50, t.nan_in_weight)]), ("plain", [])):
        run = long_run(strikes=strikes)
        t.train_guarded(run, tmp_path / name)
        told = records(tmp_path / name, "telemetry")
        found.append({r["step"]: (r["loss_z"], r["grad_norm_z"]) for r in told})
    assert found[0] == found[1]


class HostReads(TorchDispatchMode):
    """Counts what makes the host wait for a device, were there one."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[HostReads]:
    with HostReads() as mode:
        for name in ("cpu", "tolist", "item"):
            real = getattr(torch.Tensor, name)

            def counted(self: Any, *args: Any, _real: Any = real, **kwargs: Any) -> Any:
                mode.count += 1
                return _real(self, *args, **kwargs)

            monkeypatch.setattr(torch.Tensor, name, counted)
        yield mode


@pytest.mark.parametrize("mode", ["observe", "recover"])
@pytest.mark.parametrize("clips", [True, False])
def test_a_clean_step_reads_nothing_from_the_device(
    tmp_path: Path, reads: HostReads, mode: Any, clips: bool
) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    guard = fs.Guard(mode=mode, snapshot_interval=20)
    monitor = fs.Monitor(model, optimizer, tmp_path, guard, spectral_interval=5)
    data = [torch.randn(8, 4) for _ in range(110)]
    for step, x in monitor.loop(data):
        if step == 10:
            reads.count = 0  # cold starts, and the first look at buffers
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        if clips:
            monitor.clip_grad_norm_(1e-3)
        assert monitor.step(loss)
        optimizer.step()
    assert reads.count == 0
    torch.ones(()).item()
    assert reads.count > 0
