"""A run that is struck by transient faults ends with the bits of one that is not."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import foreshock as fs
from foreshock import monitor as monitor_module
from foreshock.guard import LaggingWatch, Reason
from foreshock.records import read_ledger, read_summary, verify
from tests.monitor import training as t
from tests.monitor.test_clipping_in_step import FUSED

STEPS = 300
SCHEDULES = 20

Hit = Callable[[t.Run], None]


def nan_somewhere_in_weights(rng: random.Random) -> Hit:
    place, at = rng.random(), rng.random()

    def hit(run: t.Run) -> None:
        tensor = pick(list(run.model.parameters()), place)
        tensor.view(-1)[int(at * tensor.numel())] = math.nan

    return hit


def nan_somewhere_in_gradients(rng: random.Random) -> Hit:
    place, at = rng.random(), rng.random()

    def hit(run: t.Run) -> None:
        tensor = pick([p.grad for p in run.model.parameters()], place)
        tensor.view(-1)[int(at * tensor.numel())] = math.nan

    return hit


def exponent_bit_of_weights(rng: random.Random) -> Hit:
    place, at, bit = rng.random(), rng.random(), rng.randrange(23, 31)
    return lambda run: flip(pick(list(run.model.parameters()), place), at, bit)


def exponent_bit_of_moments(rng: random.Random) -> Hit:
    place, at, bit = rng.random(), rng.random(), rng.randrange(23, 31)
    name = rng.choice(["exp_avg", "exp_avg_sq"])

    def hit(run: t.Run) -> None:
        states = [run.optimizer.state[p] for p in run.model.parameters()]
        flip(pick([state[name] for state in states], place), at, bit)

    return hit


def pick(tensors: list[Any], place: float) -> torch.Tensor:
    return tensors[int(place * len(tensors))]


def flip(tensor: torch.Tensor, at: float, bit: int) -> None:
    tensor.view(-1).view(torch.int32)[int(at * tensor.numel())] ^= 1 << bit


FAULTS: list[tuple[Callable[[random.Random], Hit], tuple[str, ...]]] = [
    (nan_somewhere_in_weights, ("start", "backward", "update")),
    (nan_somewhere_in_gradients, ("backward",)),
    (exponent_bit_of_weights, ("start", "backward", "update")),
    (exponent_bit_of_moments, ("start", "backward", "update")),
]


def schedule(seed: int) -> list[t.Strike]:
    """Three to eight faults, of all kinds in turn, anywhere but before there is a way back."""
    rng = random.Random(seed)
    strikes = []
    for i in range(rng.randint(3, 8)):
        make, moments = FAULTS[(seed + i) % len(FAULTS)]
        strikes.append(t.Strike(rng.randrange(6, STEPS), make(rng), rng.choice(moments)))
    return strikes


def make_run(**how: Any) -> t.Run:
    return t.make_run(
        seed=7,
        scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, STEPS),
        has_average=True,
        epochs=STEPS // t.STEPS_PER_EPOCH,
        **how,
    )


def watched(run: t.Run, out_dir: Path, **guard: Any) -> dict[str, Any]:
    given = {
        "mode": "recover",
        "snapshot_interval": 20,
        "lr_backoff": 1.0,
        "verify_state": True,
        # A bad gradient is withheld for good otherwise: a batch less is no bit-identical run.
        "max_consecutive_skips": 1,
        "rollback_window": 1,
        "max_rollbacks": 10,
        **guard,
    }
    with fs.Monitor(
        run.model, run.optimizer, out_dir, fs.Guard(**given), state=run.state,
        spectral_enabled=False,
    ) as monitor:  # fmt: skip
        t.train(run, monitor)
    return monitor.finalize()


@pytest.fixture
def on_a_device_to_run_ahead_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor_module, "_LAGGING_DEVICE", "cpu")


@functools.cache
def clean() -> t.Run:
    return t.train(make_run())


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(SCHEDULES))
def test_a_run_with_transient_faults_ends_with_the_bits_of_one_without(
    tmp_path: Path, seed: int
) -> None:
    run = make_run(strikes=schedule(seed))
    summary = watched(run, tmp_path)
    assert not any(strike.lives for strike in run.strikes)
    t.assert_same_bits(run, clean())
    guard = summary["guard"]
    assert 1 <= guard["total_rollbacks"] <= len(run.strikes)
    assert guard["integrity_status"] == "RECOVERED"
    assert summary["total_steps"] == STEPS


def test_without_the_seal_a_finite_flip_goes_unseen_and_with_it_its_place_is_named(
    tmp_path: Path,
) -> None:
    """An exponent's lowest bit: a weight twice as large, as no scan and no loss will tell."""

    def hit(run: t.Run) -> None:
        flip(run.model.body[0].weight, 0.5, 23)

    ends = []
    for verify_state in (False, True):
        run = t.make_run(strikes=[t.Strike(7, hit)])
        summary = t.train_guarded(run, tmp_path / str(verify_state), verify_state=verify_state)
        ends.append(summary["guard"]["total_rollbacks"])
    assert ends == [0, 1]
    t.assert_same_bits(run, t.train(t.make_run()))
    assert run.verdicts[7].reasons == (Reason.STATE_CHANGED,)
    assert str(run.verdicts[7].offender) == ("parameter body.0.weight: changed between two updates")


def flip_of_moment(run: t.Run) -> None:
    flip(run.optimizer.state[run.model.head.bias]["exp_avg_sq"], 0.5, 24)


@pytest.mark.parametrize("when", ["start", "backward", "update"])
@pytest.mark.parametrize("judges_first", [True, False])
@pytest.mark.parametrize("at", [2, 7, 10])
def test_a_flipped_moment_is_found_before_the_next_update(
    tmp_path: Path, when: str, judges_first: bool, at: int
) -> None:
    how: dict[str, Any] = {"judges_first": judges_first}
    clean, run = t.train(t.make_run(**how)), t.make_run(**how)
    run.strikes = [t.Strike(at, flip_of_moment, when)]
    t.train_guarded(run, tmp_path, verify_state=True, clean_steps=1)
    (told,) = t.events(tmp_path, "rollback_success")
    assert told["reasons"] == ["STATE_CHANGED"]
    assert told["offender"]["name"] == "head.bias: exp_avg_sq"
    t.assert_same_bits(run, clean)


@pytest.mark.parametrize("judges_first", [True, False])
@pytest.mark.parametrize("when", ["start", "update"])
@pytest.mark.usefixtures("on_a_device_to_run_ahead_of")
def test_a_host_that_runs_ahead_finds_it_a_step_later_and_ends_with_the_same_bits(
    tmp_path: Path, judges_first: bool, when: str
) -> None:
    ends = []
    for name, strikes in (("clean", []), ("struck", [t.Strike(9, flip_of_moment, when)])):
        run = t.make_run(
            optimizer=FUSED["AdamW"], judges_first=judges_first, strikes=strikes, epochs=4
        )
        monitor = t.make_monitor(run, tmp_path / name, verify_state=True)
        assert isinstance(monitor._watch, LaggingWatch)
        t.train(run, monitor)
        ends.append((run, monitor.finalize()["guard"]["total_rollbacks"]))
    assert [rollbacks for _, rollbacks in ends] == [0, 1]
    t.assert_same_bits(ends[0][0], ends[1][0])


@pytest.mark.parametrize("mode", ["observe", "skip"])
@pytest.mark.parametrize("judges_first", [True, False])
def test_a_seal_that_is_broken_is_told_of_in_modes_without_a_way_back(
    tmp_path: Path, mode: str, judges_first: bool
) -> None:
    run = t.make_run(judges_first=judges_first, strikes=[t.Strike(7, flip_of_moment)])
    summary = t.train_guarded(run, tmp_path, mode=mode, verify_state=True)
    event = "anomaly_seen" if mode == "observe" else "update_skipped"
    assert t.events(tmp_path, event)[0]["reasons"] == ["STATE_CHANGED"]
    assert t.events(tmp_path, event)[0]["step"] == 7
    assert (summary["guard"]["integrity_status"] == "ABORTED") == (mode == "skip")


def test_a_clean_run_with_everything_on_never_breaks_its_seal(tmp_path: Path) -> None:
    """Clipping, skips, accumulation, a scheduler that moves momentum, an average."""
    run = t.make_run(
        accumulation=2,
        has_average=True,
        epochs=6,
        scheduler=lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=99),
        strikes=[t.Strike(9, t.nan_in_gradient, "backward")],
    )
    summary = t.train_guarded(run, tmp_path, verify_state=True)
    assert summary["guard"]["skipped_steps"] == 1
    assert summary["guard"]["total_rollbacks"] == 0


def test_a_fault_that_persists_ends_the_run_with_its_evidence_complete(tmp_path: Path) -> None:
    """As the same bit of a memory cell that is broken: never retried for ever."""
    run = t.make_run(strikes=[t.Strike(6, flip_of_moment, lives=10**9)])
    summary = t.train_guarded(run, tmp_path, verify_state=True, max_rollbacks=3)
    assert run.steps == [*range(7), 4, 5, 6, 4, 5, 6, 4, 5, 6]
    assert not run.verdicts[-1]
    guard = summary["guard"]
    assert guard["integrity_status"] == "ABORTED"
    assert (guard["total_rollbacks"], guard["total_recoveries"]) == (3, 0)
    evidence = guard["abort"]
    assert evidence["reasons"] == ["STATE_CHANGED", "TOO_MANY_ROLLBACKS"]
    assert evidence["offender"]["name"] == "head.bias: exp_avg_sq"
    assert read_summary(tmp_path / "summary.json") == summary
    events = [record["event"] for record in read_ledger(tmp_path / "ledger.jsonl")]
    assert [e for e in events if e != "lr_changed"] == ["rollback_success"] * 3 + ["aborted"]
    assert verify(tmp_path / "ledger.jsonl").is_intact
    (told,) = t.events(tmp_path, "aborted")
    assert (told["step"], told["offender"]) == (6, evidence["offender"])
