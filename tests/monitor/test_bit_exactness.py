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
from foreshock.guard import LaggingWatch, Reason, Watch
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
