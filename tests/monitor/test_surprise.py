"""How surprising the batches of training are, in telemetry."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import foreshock as fs
from foreshock.records import read_telemetry
from foreshock.surprise import SurpriseProbe
from tests.surprise.networks import data, fitted, mlp

KEYS = {"surprise_step", "surprise_mean", "surprise_p95", "surprise_z"}
STEPS, STRANGE = 30, 20


def batch(step: int) -> torch.Tensor:
    """Like what the probe knows, but for one."""
    known = data(32, seed=100 + step)
    return (
        5 * torch.randn(32, 16, generator=torch.Generator().manual_seed(3))
        if (step == STRANGE)
        else known
    )


def train(model: nn.Module, out_dir: Path, steps: int = STEPS, **options: Any) -> nn.Module:
    """With a learning rate of 0, so that only batches differ."""
    optimizer = torch.optim.SGD(model.parameters(), lr=options.pop("lr", 0.0))
    settings = {"telemetry_interval": 1, "spectral_enabled": False, **options}
    monitor = fs.Monitor(model, optimizer, out_dir, **settings)
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(batch(step)).square().mean()
        loss.backward()
        monitor.step(loss)
        optimizer.step()
    monitor.finalize()
    return model


def told(out_dir: Path) -> list[dict[str, Any]]:
    records = read_telemetry(out_dir / "telemetry.jsonl").records
    return [r for r in records if r["event"] == "telemetry"]


def probe_of(model: nn.Module) -> SurpriseProbe:
    return fitted(model.eval())


def test_a_strange_batch_stands_out(tmp_path: Path) -> None:
    model = mlp()
    train(model, tmp_path, surprise=probe_of(model), surprise_interval=1)
    records = told(tmp_path)
    assert not KEYS & set(records[0])  # read one step later, so as to wait for no device
    assert all(set(r) >= KEYS for r in records[1:])
    assert [r["surprise_step"] for r in records[1:]] == list(range(STEPS - 1))
    z = {r["surprise_step"]: r["surprise_z"] for r in records[1:]}
    assert max(z, key=z.__getitem__) == STRANGE
    assert z[STRANGE] > 10
    (at,) = [r for r in records[1:] if r["surprise_step"] == STRANGE]
    expected = probe_of(model)(batch(STRANGE)).score
    assert at["surprise_mean"] == pytest.approx(expected.mean().item(), rel=1e-4)
    assert at["surprise_p95"] == pytest.approx(expected.quantile(0.95).item(), rel=1e-4)


def test_between_looks_no_hook_is_left(tmp_path: Path) -> None:
    model = mlp()
    probe = probe_of(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    settings = {"surprise": probe, "surprise_interval": 5, "telemetry_interval": 1}
    monitor = fs.Monitor(model, optimizer, tmp_path, **settings)
    hooked = []
    for step in range(11):
        hooked.append(any(m._forward_hooks for m in model.modules()))
        loss = model(batch(step)).mean()
        loss.backward()
        monitor.step(loss)
        optimizer.step()
    assert [s for s, is_hooked in enumerate(hooked) if is_hooked] == [0, 5, 10]
    monitor.finalize()
    assert not any(m._forward_hooks for m in model.modules())


def test_it_is_off_by_default_and_changes_no_bit(tmp_path: Path) -> None:
    alone = train(mlp().eval(), tmp_path / "alone", lr=0.1)
    assert not any(KEYS & set(r) for r in told(tmp_path / "alone"))
    watched = mlp()
    probe = probe_of(watched)
    train(watched, tmp_path / "watched", lr=0.1, surprise=probe, surprise_interval=3)
    pairs = zip(alone.parameters(), watched.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_what_cannot_be_judged_ends_the_listening_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no")

    model = mlp()
    probe = probe_of(model)
    monkeypatch.setattr(SurpriseProbe, "judge", fail)
    with caplog.at_level(logging.ERROR, "foreshock"):
        train(model, tmp_path, steps=4, surprise=probe, surprise_interval=1)
    assert len([r for r in caplog.records if "no longer follows surprise" in r.message]) == 1
    assert len(told(tmp_path)) == 4


def test_a_rollback_takes_its_history_back(tmp_path: Path) -> None:
    model = mlp()
    probe = probe_of(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    guard = fs.Guard(mode="recover", snapshot_interval=5, clean_steps=1)
    settings = {"surprise": probe, "surprise_interval": 1, "telemetry_interval": 1}
    monitor = fs.Monitor(model, optimizer, tmp_path, guard, **settings)
    is_struck = False
    for step, x in monitor.loop([batch(i) for i in range(STRANGE)]):
        if step == 12 and not is_struck:
            is_struck = True
            with torch.no_grad():
                model.get_parameter("0.weight")[0, 0] = float("nan")
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        monitor.step(loss)
        optimizer.step()
    assert monitor.finalize()["guard"]["total_rollbacks"] == 1
    of_steps: dict[int, list[float]] = {}
    for record in told(tmp_path):
        if "surprise_step" in record:
            of_steps.setdefault(record["surprise_step"], []).append(record["surprise_z"])
    assert set(of_steps) >= set(range(9, 18))
    assert all(len(set(of_steps[step])) == 1 for step in (10, 11))


@pytest.mark.parametrize("given", ["a word", None], ids=["no-probe", "other-model"])
def test_a_wrong_probe_is_an_error_that_says_so(tmp_path: Path, given: Any) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    probe = given or probe_of(mlp())
    with pytest.raises((TypeError, ValueError), match="surprise is a"):
        fs.Monitor(model, optimizer, tmp_path, surprise=probe)
