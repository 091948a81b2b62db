"""What the levels of spectral risk say of a healthy run, and of one whose learning rate jumps."""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any, NamedTuple

import pytest
import torch

from benchmarks import rows
from foreshock.drill.gpt import Recipe, build, next_token_loss
from foreshock.signals import RiskLevel, SpectralWatch

INTERVALS = (1, 10, 50)
HEALTHY_STEPS = 500
SPIKE_STEP, SPIKE_FACTOR, SPIKED_STEPS = 250, 30, 310


class Course(NamedTuple):
    """Losses of a run, and the level after each step, for each interval."""

    losses: list[float]
    levels: dict[int, list[RiskLevel]]


def follow(recipe: Recipe, steps: int, spike_step: int | None) -> Course:
    """Trains, from `spike_step` on with a learning rate many times as high."""
    run = build(0, recipe)
    parameters = dict(run.model.named_parameters())
    watches = {
        interval: SpectralWatch(parameters, run.optimizer, interval) for interval in INTERVALS
    }
    course = Course([], {interval: [] for interval in INTERVALS})
    for step in range(steps):
        run.optimizer.zero_grad()
        x_BT, y_BT = run.batches.batch_at(step)
        loss = next_token_loss(run.model(x_BT), y_BT)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), recipe.max_norm)
        for interval, watch in watches.items():
            if watch.is_due(step):
                watch.observe(step, is_stepped=False)
            course.levels[interval].append(watch.level)
        if spike_step is not None and step >= spike_step:
            for group in run.optimizer.param_groups:
                group["lr"] *= SPIKE_FACTOR
        run.optimizer.step()
        run.scheduler.step()
        course.losses.append(loss.item())
    return course


def restless_until(levels: list[RiskLevel]) -> int:
    """The first step from which on no level was WARNING or more."""
    return max((s + 1 for s, level in enumerate(levels) if level >= RiskLevel.WARNING), default=0)


def first_after(steps: list[int]) -> int | None:
    """Steps from the one that was updated wrongly to the first of these that comes after it."""
    return min((s - SPIKE_STEP for s in steps if s > SPIKE_STEP), default=None)


@pytest.mark.parametrize("learning_rate", [3e-4, 1e-3, 3e-3])
def test_levels_of_a_run_and_of_a_spike(benchmark: Any, learning_rate: float) -> None:
    recipe = dataclasses.replace(Recipe(), learning_rate=learning_rate)
    benchmark.pedantic(lambda: None, rounds=1)  # what is stored is no time
    healthy = follow(recipe, HEALTHY_STEPS, None)
    spiked = follow(recipe, SPIKED_STEPS, SPIKE_STEP)
    assert spiked.losses[: SPIKE_STEP + 1] == healthy.losses[: SPIKE_STEP + 1]
    before = statistics.fmean(spiked.losses[SPIKE_STEP - 10 : SPIKE_STEP + 1])
    doubled = [s for s, loss in enumerate(spiked.losses) if loss > 2 * before]
    found = {}
    for interval in INTERVALS:
        raised = [s for s, v in enumerate(spiked.levels[interval]) if v is RiskLevel.INSTABILITY]
        found[f"interval {interval}"] = {
            "restless_until": restless_until(healthy.levels[interval]),
            "loss_doubled_after": first_after(doubled),
            "unstable_after": first_after(raised),
            "was_unstable_before": SPIKE_STEP in raised,
        }
    rows.store("spectral_risk", f"learning rate {learning_rate:g}", "cpu", found)
