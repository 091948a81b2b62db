"""Spectral risk on real training: a small GPT that learns to read Python's documentation."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import foreshock as fs
from foreshock.drill.demo import multiply_learning_rate
from foreshock.drill.gpt import GPTConfig, Recipe, build, next_token_loss
from foreshock.ops import PowerIterator
from foreshock.records import read_telemetry

WARMUP, STEPS = 250, 500
RECIPE = Recipe(
    model=GPTConfig(context=32, width=64, num_blocks=2, num_heads=2),
    batch_size=16,
    learning_rate=1e-3,
)


@dataclasses.dataclass
class Story:
    """What a run told."""

    losses: list[float]
    kappas: list[float]
    levels: list[str]


def train(out_dir: Path, interval: int, steps: int = STEPS, spike_step: int | None = None) -> Story:
    run = build(0, RECIPE)
    monitor = fs.Monitor(
        run.model, run.optimizer, out_dir, spectral_interval=interval, telemetry_interval=1
    )
    losses = []
    for step, (x, y) in monitor.loop(run.batches):
        if step == steps:
            break
        run.optimizer.zero_grad()
        loss = next_token_loss(run.model(x), y)
        loss.backward()
        monitor.clip_grad_norm_(RECIPE.max_norm)
        monitor.step(loss)
        if spike_step is not None and step >= spike_step:
            multiply_learning_rate(run.optimizer, 30.0)
        run.optimizer.step()
        run.scheduler.step()
        losses.append(loss.item())
    monitor.finalize()
    records = read_telemetry(out_dir / "telemetry.jsonl").records
    told = [r for r in records if r["event"] == "telemetry"]
    return Story(
        losses, [r["spectral_kappa"] for r in told], [r["risk_level"] for r in told[:steps]]
    )


_kept: list[Story] = []


@pytest.fixture
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Story:
    """Trained once, but within a test: as many threads as the others."""
    if not _kept:
        _kept.append(train(tmp_path_factory.mktemp("healthy"), interval=1))
    return _kept[0]


@pytest.mark.slow
def test_a_healthy_run_has_the_same_spectra_every_time_and_calms_down(
    healthy: Story, tmp_path: Path
) -> None:
    again = train(tmp_path, interval=1)
    assert len(healthy.kappas) == STEPS
    assert again.kappas == healthy.kappas
    assert again.levels == healthy.levels
    assert set(healthy.levels[WARMUP:]) <= {"STABLE", "LEARNING"}
    assert healthy.losses[-1] < 0.7 * healthy.losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("interval", [10, 50])
def test_looking_rarely_gives_no_other_alarms(
    healthy: Story, tmp_path: Path, interval: int
) -> None:
    rarely = train(tmp_path, interval)
    assert rarely.losses == healthy.losses
    assert set(rarely.levels[WARMUP + 2 * interval :]) <= {"STABLE", "LEARNING"}


@pytest.mark.slow
def test_a_spike_of_the_learning_rate_is_confirmed_not_foretold(tmp_path: Path) -> None:
    """The documentation says so: the loss is there first."""
    spike = 300
    story = train(tmp_path, interval=1, steps=330, spike_step=spike)
    before = sum(story.losses[spike - 20 : spike]) / 20
    worse = next(i for i in range(spike, 330) if story.losses[i] > 1.5 * before)
    raised = next(i for i in range(spike, 330) if story.levels[i] in ("DANGER", "INSTABILITY"))
    assert set(story.levels[WARMUP:spike]) <= {"STABLE", "LEARNING"}
    assert spike < raised <= spike + 6
    assert worse <= raised + 1


@pytest.mark.slow
def test_one_pass_a_step_follows_a_training_within_1_percent() -> None:
    """From the hundredth step on: before, new directions rise faster than v can turn to them."""
    run = build(0, RECIPE)
    weights = [p for p in run.model.parameters() if p.dim() >= 2]
    iterator = PowerIterator(weights)
    worst: dict[int, float] = {}
    for step, (x, y) in zip(range(STEPS + 1), run.batches, strict=False):
        sigma = iterator().sigma_max
        if step % 25 == 0:
            truth = [torch.linalg.matrix_norm(w.detach().double(), 2) for w in weights]
            error: Any = 1 - sigma / torch.stack(truth)
            assert error.min() > -1e-6
            worst[step] = error.max().item()
        run.optimizer.zero_grad()
        next_token_loss(run.model(x), y).backward()
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), RECIPE.max_norm)
        run.optimizer.step()
        run.scheduler.step()
    assert max(error for step, error in worst.items() if step >= 100) <= 0.01, worst
