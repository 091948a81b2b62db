"""The goal: a run hit by transient faults ends bit-identical to the same run without them."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import SGD, Adagrad, Adam, AdamW, RMSprop
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR, StepLR

from tests.monitor import training as t

FAULTS: dict[str, tuple[Callable[[t.Run], None], str]] = {
    "nan_in_weight": (t.nan_in_weight, "start"),
    "nan_in_weight_by_the_update": (t.nan_in_weight, "update"),
    "nan_in_gradient": (t.nan_in_gradient, "backward"),
    "inf_in_gradient": (t.inf_in_gradient, "backward"),
    "nan_in_buffer": (t.nan_in_buffer, "start"),
    "flipped_bit_in_weight": (t.flipped_bit_in_weight, "start"),
    "flipped_bit_in_moment": (t.flipped_bit_in_moment, "update"),
}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw-fused": lambda ps: AdamW(ps, lr=1e-2, fused=True),
    "adamw-foreach": lambda ps: AdamW(ps, lr=1e-2, foreach=True),
    "adam-amsgrad": lambda ps: Adam(ps, lr=1e-2, amsgrad=True, weight_decay=0.1),
    "adamw-tensor-lr": lambda ps: AdamW(ps, lr=torch.tensor(1e-2), foreach=False),
    "sgd-momentum": lambda ps: SGD(ps, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True),
    "sgd-fused": lambda ps: SGD(ps, lr=0.1, momentum=0.9, fused=True),
    "adagrad-fused": lambda ps: Adagrad(ps, lr=0.05, fused=True),
    "adagrad-foreach": lambda ps: Adagrad(ps, lr=0.05, foreach=True),
    "rmsprop": lambda ps: RMSprop(ps, lr=1e-2, momentum=0.5, centered=True),
}
SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any] | None] = {
    "none": None,
    "lambda": lambda o: LambdaLR(o, lambda step: 1 / (1 + 0.1 * step)),
    "cosine": lambda o: CosineAnnealingLR(o, T_max=20),
    "one-cycle": lambda o: OneCycleLR(o, max_lr=0.05, total_steps=40, cycle_momentum=False),
    "step": lambda o: StepLR(o, step_size=3, gamma=0.7),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("judges_first", [True, False], ids=["judge-update", "update-judge"])
def test_struck_run_ends_bit_identical_to_clean_run(
    tmp_path: Path, fault: str, judges_first: bool
) -> None:
    how = {"scheduler": SCHEDULERS["lambda"], "has_average": True, "judges_first": judges_first}
    clean = t.train(t.make_run(**how))
    struck = t.make_run(**how)
    hit, when = FAULTS[fault]
    struck.strikes = [t.Strike(7, hit, when)]
    # A skipped update is lost, so a run that is to lose nothing rolls back at the first bad one.
    summary = t.train_guarded(struck, tmp_path, max_consecutive_skips=1)
    t.assert_same_bits(struck, clean)
    assert not struck.strikes[0].lives
    assert summary["guard"]["integrity_status"] == "RECOVERED"
    assert summary["guard"]["total_rollbacks"] == summary["guard"]["total_recoveries"] == 1


def test_guarded_run_without_faults_is_bit_identical_to_unguarded(tmp_path: Path) -> None:
    how = {"scheduler": SCHEDULERS["cosine"], "has_average": True}
    clean, guarded = t.train(t.make_run(**how)), t.make_run(**how)
    summary = t.train_guarded(guarded, tmp_path)
    t.assert_same_bits(guarded, clean)
    assert guarded.steps == clean.steps == list(range(12))
    assert summary["guard"]["integrity_status"] == "OK"
    assert summary["total_steps"] == 12


def test_skipped_update_is_lost_and_the_run_differs(tmp_path: Path) -> None:
    """The other side of the goal: to skip is not to replay."""
    clean, struck = t.train(t.make_run()), t.make_run()
    struck.strikes = [t.Strike(7, t.nan_in_gradient, "backward")]
    summary = t.train_guarded(struck, tmp_path)
    assert "parameters.head.weight" in t.differing(t.state_of(struck), t.state_of(clean))
    assert summary["guard"]["skipped_steps"] == 1
    assert summary["guard"]["total_rollbacks"] == 0
    assert struck.steps == clean.steps


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_recovers_bit_identical(tmp_path: Path, name: str) -> None:
    clean, struck = (
        t.train(t.make_run(optimizer=OPTIMIZERS[name])),
        t.make_run(optimizer=OPTIMIZERS[name]),
    )
    struck.strikes = [t.Strike(5, t.nan_in_weight), t.Strike(9, t.nan_in_weight, "update")]
    summary = t.train_guarded(struck, tmp_path)
    t.assert_same_bits(struck, clean)
    assert summary["guard"]["total_recoveries"] == 2


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("optimizer", ["adamw-foreach", "adamw-tensor-lr"])
def test_every_scheduler_recovers_bit_identical(tmp_path: Path, name: str, optimizer: str) -> None:
    how = {"optimizer": OPTIMIZERS[optimizer], "scheduler": SCHEDULERS[name]}
    clean, struck = t.train(t.make_run(**how)), t.make_run(**how)
    struck.strikes = [t.Strike(6, t.nan_in_weight, "update")]
    t.train_guarded(struck, tmp_path)
    t.assert_same_bits(struck, clean)


def random_schedule(seed: int) -> tuple[dict[str, Any], list[t.Strike], dict[str, Any]]:
    """A way to train, what strikes it, and a guard."""
    choose = random.Random(seed)
    loaders = [
        t.make_loader,
        t.ResumableLoader,
        t.DrawingLoader,
        lambda: t.ResumableLoader(resumes_with_next_epoch=True),
        lambda: list(t.make_loader()),
    ]
    how = {
        "seed": seed,
        "optimizer": OPTIMIZERS[choose.choice(list(OPTIMIZERS))],
        "scheduler": SCHEDULERS[choose.choice(list(SCHEDULERS))],
        "has_average": choose.random() < 0.5,
        "loader": choose.choice(loaders),
        "epochs": 3,
        "accumulation": choose.choice([1, 1, 2, 3]),
        "judges_first": choose.random() < 0.5,
        "zeroes_first": choose.random() < 0.5,
        "sets_to_none": choose.random() < 0.5,
        "max_norm": choose.choice([None, 0.5]),
    }
    strikes = [random_strike(choose, how["accumulation"]) for _ in range(3)]
    guard = {
        "snapshot_interval": choose.randint(1, 7),
        "depth": choose.randint(1, 3),
        # A number that is wrong but finite is seen in what two updates make of it.
        "clean_steps": 2 if any("flipped" in s.hit.__name__ for s in strikes) else 0,
        "max_consecutive_skips": 1,
        "max_rollbacks": 20,
    }
    return how, strikes, guard


def random_strike(choose: random.Random, accumulation: int) -> t.Strike:
    """Not before a snapshot is known to be good, and not when too late to be seen."""
    hit, when = FAULTS[choose.choice(list(FAULTS))]
    last = 3 * t.STEPS_PER_EPOCH - 1
    if "flipped" in hit.__name__:
        last -= 3 * accumulation
    step = choose.randint(2 * accumulation, last)
    if when == "update":  # in a step in which there is one
        step += accumulation - 1 - step % accumulation
    return t.Strike(step, hit, when)


@pytest.mark.parametrize("seed", range(30))
def test_random_schedules_of_faults_leave_no_trace(tmp_path: Path, seed: int) -> None:
    how, strikes, guard = random_schedule(seed)
    clean, struck = t.train(t.make_run(**how)), t.make_run(**how)
    struck.strikes = strikes
    summary = t.train_guarded(struck, tmp_path, **guard)
    t.assert_same_bits(struck, clean)
    assert not any(fault.lives for fault in strikes)
    assert summary["guard"]["total_rollbacks"] >= 1
    assert summary["total_steps"] == 3 * t.STEPS_PER_EPOCH
