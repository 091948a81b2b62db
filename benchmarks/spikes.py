"""How often the spike rule alarms where nothing is wrong; see docs/monitor.md. No time, but a rate.

The trace is real: the losses of a trained model on windows of its text, drawn at random into
batches for a million steps in which nothing changes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import rows
from foreshock.drill.gpt import Recipe, build, next_token_loss
from foreshock.guard import Guard, Reason
from foreshock.guard.spikes import SpikeDetector

STEPS = 1_000_000
POOL = 4096
THRESHOLDS = [4.0, 5.0, 6.0, 8.0]


@pytest.fixture(scope="module")
def losses_of_windows() -> torch.Tensor:
    """(POOL,) mean loss of the drill's GPT on windows of text, after 200 steps of training."""
    recipe = Recipe()
    run = build(0, recipe)
    for _, (x, y) in zip(range(200), run.batches, strict=False):
        run.optimizer.zero_grad()
        next_token_loss(run.model(x), y).backward()
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), recipe.max_norm)
        run.optimizer.step()
        run.scheduler.step()
    run.model.eval()
    found: list[torch.Tensor] = []
    with torch.no_grad():
        for _, (x, y) in zip(range(POOL // recipe.batch_size), run.batches, strict=False):
            logits = run.model(x)
            each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), y, reduction="none")
            found.append(each.mean(1))
    return torch.cat(found)


@pytest.mark.parametrize("batch_size", [1, 8, 32])
def test_false_alarms_on_a_stationary_loss(
    benchmark: Any, losses_of_windows: torch.Tensor, batch_size: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(losses_of_windows), (STEPS, batch_size), generator=generator)
    trace = losses_of_windows[drawn].mean(1).tolist()
    found = {}
    for z in THRESHOLDS:
        spikes = SpikeDetector(Guard(spike_z=z))
        alarms = sum(Reason.LOSS_SPIKE in spikes.update(loss, 1.0) for loss in trace)
        found[f"spike_z = {z:g}"] = {"steps": STEPS, "alarms": alarms, "per_10_000": alarms / 100}
    assert found["spike_z = 8"]["per_10_000"] <= 1
    case = f"loss of a GPT on real text, batch of {batch_size}, nothing wrong"
    rows.store("spikes", case, "cpu", found)
    benchmark.pedantic(lambda: None)
