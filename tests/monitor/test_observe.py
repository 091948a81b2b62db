"""Observe mode looks, tells what it would do, and touches nothing."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import foreshock as fs
from foreshock.guard import Inspector, Reason
from tests.monitor import training as t
from tests.monitor.test_recovery import FAULTS, OPTIMIZERS, SCHEDULERS


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("judges_first", [True, False])
def test_a_run_ends_with_the_same_bits_with_and_without_a_monitor(
    tmp_path: Path, fault: str, judges_first: bool
) -> None:
    """Struck or not: also what the fault does is left as it is."""
    hit, when = FAULTS[fault]
    how: dict[str, Any] = {
        "scheduler": SCHEDULERS["one-cycle"],
        "has_average": True,
        "judges_first": judges_first,
    }
    plain = t.make_run(**how)
    plain.strikes = [t.Strike(7, hit, when)]
    t.train(plain)
    watched = t.make_run(**how)
    watched.strikes = [t.Strike(7, hit, when)]
    summary = t.train_guarded(watched, tmp_path, mode="observe")
    t.assert_same_bits(watched, plain)
    assert watched.steps == list(range(12))
    assert summary["guard"]["skipped_steps"] == summary["guard"]["total_rollbacks"] == 0
    assert summary["guard"]["anomalies_seen"] >= 1
    assert summary["guard"]["integrity_status"] == "OK"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_optimizer_is_disturbed(tmp_path: Path, name: str) -> None:
    plain = t.train(t.make_run(optimizer=OPTIMIZERS[name]))
    watched = t.make_run(optimizer=OPTIMIZERS[name])
    t.train_guarded(watched, tmp_path, mode="observe")
    t.assert_same_bits(watched, plain)


def test_it_tells_what_recover_mode_would_have_done(tmp_path: Path) -> None:
    run = t.make_run(
        strikes=[t.Strike(2, t.nan_in_gradient, "backward"), t.Strike(7, t.nan_in_buffer)],
        optimizer=lambda ps: torch.optim.SGD(ps, lr=0.0),
        max_norm=None,
    )
    t.train_guarded(run, tmp_path, mode="observe", max_rollbacks=100)
    told = t.events(tmp_path, "anomaly_seen")
    assert told[0]["step"] == 2
    assert told[0]["would"] == "skip"
    assert told[0]["offender"]["name"] == "head.weight"
    later = next(e for e in told if e["step"] >= 7)
    assert later["would"] == "roll_back"
    assert run.verdicts[2].action is fs.Action.SKIP
    assert Reason.NO_SNAPSHOT not in run.verdicts[7].reasons
    assert all(run.verdicts)


def test_it_draws_no_random_numbers_and_takes_no_snapshots(tmp_path: Path) -> None:
    run = t.make_run()
    monitor = t.make_monitor(run, tmp_path, mode="observe")
    kept = []
    for _ in monitor.loop(run.loader):
        before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
        monitor.clip_grad_norm_(1.0)
        monitor.step(1.0)
        run.optimizer.step()
        after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
        assert before[:2] == after[:2]
        assert torch.equal(before[2], after[2])
        kept.append(len(monitor._watch.history.ring.entries))
        kept.append(len(monitor._watch.history.source._kept))
    assert set(kept) == {0}


@pytest.mark.parametrize("broken", ["inspect", "find_offender"])
def test_a_fault_of_its_own_is_logged_once_and_training_goes_on(
    tmp_path: Path,
    broken: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("the monitor is broken")

    plain = t.train(t.make_run(strikes=[t.Strike(3, t.nan_in_weight)], max_norm=None))
    watched = t.make_run(strikes=[t.Strike(3, t.nan_in_weight)], max_norm=None)
    monkeypatch.setattr(Inspector, broken, fail)
    with caplog.at_level(logging.ERROR, "foreshock"):
        summary = t.train_guarded(watched, tmp_path, mode="observe")
    t.assert_same_bits(watched, plain)
    failures = [r for r in caplog.records if "training goes on" in r.message]
    assert len(failures) == 1
    assert failures[0].exc_info is not None
    assert summary["total_steps"] == 12


def test_clipping_goes_on_when_the_monitor_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError

    run = t.make_run()
    monitor = t.make_monitor(run, tmp_path, mode="observe")
    monkeypatch.setattr(Inspector, "inspect", fail)
    for p in run.model.parameters():
        p.grad = torch.ones_like(p)
    n = sum(p.numel() for p in run.model.parameters())
    assert monitor.clip_grad_norm_(1.0).item() == pytest.approx(n**0.5)
    total = sum(p.grad.square().sum().item() for p in run.model.parameters())
    assert total == pytest.approx(1.0, rel=1e-5)


def test_with_a_guard_a_fault_of_its_own_is_not_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Someone who relies on a guard is to know that there is none."""

    def fail(*_: object) -> None:
        raise RuntimeError("the monitor is broken")

    run = t.make_run()
    monitor = t.make_monitor(run, tmp_path, mode="recover")
    monkeypatch.setattr(Inspector, "inspect", fail)
    with pytest.raises(RuntimeError, match="the monitor is broken"):
        monitor.step(1.0)
