"""The learning rate after a rollback: on the update, out of the scheduler's sight."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)

import foreshock as fs
from foreshock.guard import LearningRateBackoff
from tests.monitor import training as t

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "lambda": lambda o: LambdaLR(o, lambda step: 0.9**step),
    "cosine": lambda o: CosineAnnealingLR(o, T_max=30),
    "one-cycle": lambda o: OneCycleLR(o, max_lr=1.0, total_steps=30, cycle_momentum=False),
    "one-cycle-with-momentum": lambda o: OneCycleLR(o, max_lr=1.0, total_steps=30),
    "multi-step": lambda o: MultiStepLR(o, [3, 7, 7], 0.5),
    "sequential": lambda o: SequentialLR(
        o, [LinearLR(o, 0.1, total_iters=6), ExponentialLR(o, 0.9)], milestones=[6]
    ),
    "chained": lambda o: ChainedScheduler([LinearLR(o, 0.5, total_iters=9), ExponentialLR(o, 0.9)]),
    "plateau": lambda o: ReduceLROnPlateau(o, patience=1),
}


def make_optimizer(lr: Any = 0.5) -> SGD:
    return SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr, momentum=0.5)


def run_update(backoff: LearningRateBackoff, optimizer: torch.optim.Optimizer) -> list[float]:
    """The rates of the groups as an update sees them."""
    with backoff.applied_to(optimizer):
        optimizer.step()
        return [float(group["lr"]) for group in optimizer.param_groups]


def test_factor_is_one_until_a_rollback() -> None:
    assert LearningRateBackoff(0.5, 10).factor == 1.0


def test_factor_recovers_linearly_over_updates() -> None:
    backoff, optimizer = LearningRateBackoff(0.5, 4), make_optimizer(1.0)
    assert backoff.back_off() == 0.5
    seen = [run_update(backoff, optimizer)[0] for _ in range(6)]
    assert seen == [0.5, 0.625, 0.75, 0.875, 1.0, 1.0]


def test_factor_compounds_with_the_one_still_in_force() -> None:
    backoff, optimizer = LearningRateBackoff(0.5, 4), make_optimizer(1.0)
    backoff.back_off()
    run_update(backoff, optimizer)
    run_update(backoff, optimizer)
    assert backoff.back_off() == 0.75 * 0.5
    assert backoff.back_off() == 0.75 * 0.25


@pytest.mark.parametrize(("factor", "steps"), [(1.0, 100), (0.5, 0)])
def test_backoff_can_be_turned_off(factor: float, steps: int) -> None:
    assert LearningRateBackoff(factor, steps).back_off() == 1.0


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("lr", [0.5, torch.tensor(0.5)], ids=["float", "tensor"])
def test_trap_14_no_scheduler_ever_sees_the_factor(name: str, lr: Any) -> None:
    """LambdaLR overwrites an edited rate at its next step, CosineAnnealingLR keeps it."""
    plain = make_optimizer(lr.clone() if isinstance(lr, torch.Tensor) else lr)
    backed_off = make_optimizer(lr.clone() if isinstance(lr, torch.Tensor) else lr)
    expected, scheduler = SCHEDULERS[name](plain), SCHEDULERS[name](backed_off)
    backoff = LearningRateBackoff(0.5, 10)
    backoff.back_off()
    for _ in range(20):
        plain.step()
        planned, factor = float(plain.param_groups[0]["lr"]), backoff.factor
        assert run_update(backoff, backed_off)[0] == pytest.approx(planned * factor, rel=1e-6)
        for each in (expected, scheduler):
            each.step(*([1.0] if isinstance(each, ReduceLROnPlateau) else []))
        rates = [float(o.param_groups[0]["lr"]) for o in (plain, backed_off)]
        assert rates[0] == rates[1]
    assert isinstance(scheduler, LRScheduler)


def test_a_tensor_shared_by_groups_is_scaled_once_and_stays_the_same_tensor() -> None:
    rate = torch.tensor(0.5)
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))]} for _ in range(3)]
    optimizer = SGD(groups, lr=rate)
    assert all(group["lr"] is rate for group in optimizer.param_groups)
    backoff = LearningRateBackoff(0.5, 10)
    backoff.back_off()
    assert run_update(backoff, optimizer) == [0.25] * 3
    assert all(group["lr"] is rate for group in optimizer.param_groups)
    assert rate == 0.5


def test_groups_keep_their_own_rates() -> None:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (1.0, 0.1)]
    optimizer = SGD(groups)
    backoff = LearningRateBackoff(0.5, 10)
    backoff.back_off()
    assert run_update(backoff, optimizer) == [0.5, 0.05]
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 0.1]


def test_an_update_that_fails_leaves_the_rate_and_the_count_as_they_were() -> None:
    backoff, optimizer = LearningRateBackoff(0.5, 10), make_optimizer(1.0)
    backoff.back_off()
    with pytest.raises(RuntimeError), backoff.applied_to(optimizer):
        raise RuntimeError
    assert optimizer.param_groups[0]["lr"] == 1.0
    assert backoff.factor == 0.5


def test_groups_without_a_rate_are_left_alone() -> None:
    """Adafactor works its rate out by itself and has None there."""
    optimizer = make_optimizer(1.0)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))]})
    optimizer.param_groups[0]["lr"] = None
    del optimizer.param_groups[1]["lr"]
    backoff = LearningRateBackoff(0.5, 10)
    backoff.back_off()
    with backoff.applied_to(optimizer):
        assert optimizer.param_groups[0]["lr"] is None
        assert "lr" not in optimizer.param_groups[1]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_after_a_rollback_every_scheduler_plans_on_as_if_there_had_been_none(
    tmp_path: Path, name: str
) -> None:
    """Its own state is rolled back; the factor is on the updates alone, and recovers linearly."""

    def go(strikes: list[t.Strike]) -> tuple[list[float], list[float]]:
        run = t.make_run(optimizer=lambda ps: SGD(ps, lr=0.1, momentum=0.5), strikes=strikes)
        scheduler = SCHEDULERS[name](run.optimizer)
        is_plateau = isinstance(scheduler, ReduceLROnPlateau)
        guard = fs.Guard(mode="recover", snapshot_interval=4, lr_backoff=0.5, lr_recovery_steps=4)
        state = {"scheduler": scheduler}
        used: list[float] = []
        planned: list[float] = []
        run.optimizer.register_step_pre_hook(
            lambda o, *_: used.append(float(o.param_groups[0]["lr"]))
        )
        with fs.Monitor(run.model, run.optimizer, tmp_path / "run", guard, state=state) as monitor:
            for step, batch in monitor.loop(run.loader, epochs=2):
                planned.append(float(run.optimizer.param_groups[0]["lr"]))
                t.train_step(run, step, batch, monitor)
                if is_plateau:
                    scheduler.step(1.0)
                else:
                    scheduler.step()
        return planned, used

    planned, used = go([])
    assert used == planned
    struck_planned, struck_used = go([t.Strike(6, t.nan_in_weight)])
    assert struck_planned == [*planned[:7], *planned[4:]]
    factors = [1.0] * 6 + [0.5, 0.625, 0.75, 0.875] + [1.0] * 4
    expected = [*planned[:6], *planned[4:]]
    assert struck_used == pytest.approx([r * f for r, f in zip(expected, factors, strict=True)])
