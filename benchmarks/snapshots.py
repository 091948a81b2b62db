"""What snapshots cost: throughput of whole intervals, and single copies; see docs/snapshots.md.

An interval is 100 steps with one snapshot, which is what a training run feels: the copy, the caches
that it empties, and the thread that writes beside the next steps. Every variant trains its own copy
of one GPT on the same batches; a round runs one interval of each. To try it out, set ROUNDS and
INTERVAL in the environment; rows are stored only with the defaults.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from benchmarks import rows
from benchmarks.interleave import time_in_turn
from foreshock.drill.gpt import GPTConfig, Recipe, Run, build, next_token_loss
from foreshock.guard.persistence import Saver, SnapshotFolder
from foreshock.guard.snapshots import SnapshotRing
from foreshock.guard.state import NamedTensors, OptimizerState, RandomState
from foreshock.guard.state_seal import StateSeal

INTERVAL = int(os.environ.get("INTERVAL", "100"))
ROUNDS = int(os.environ.get("ROUNDS", "7"))
IS_TRIAL = bool({"INTERVAL", "ROUNDS"} & os.environ.keys())

Take = Callable[[int], object]


@dataclasses.dataclass(frozen=True)
class Size:
    """A model, its batch, and where it is."""

    name: str
    recipe: Recipe
    device: str


CPU_SIZE = Size(
    f"GPT of 10.7M parameters, 128 tokens a step, fused AdamW, {INTERVAL} steps",
    Recipe(model=GPTConfig(width=384, num_blocks=6, num_heads=6, context=128), batch_size=1),
    "cpu",
)
GPU_SIZE = Size(
    f"GPT of 124M parameters, 16384 tokens a step, fused AdamW, {INTERVAL} steps",
    Recipe(model=GPTConfig(width=896, num_blocks=13, num_heads=14, context=512), batch_size=32),
    "cuda",
)


class Training(NamedTuple):
    """A run, and what one interval of it is."""

    run: Run
    interval: Callable[[], None]


def training(size: Size, take: Callable[[Run], tuple[Take, Callable[[], object]]]) -> Training:
    """A run whose intervals begin with a snapshot.

    Args:
        take: gives what takes one, and what is called before each update.
    """
    run = build(0, size.recipe)
    run.model.to(size.device)
    optimizer = torch.optim.AdamW(run.model.parameters(), lr=1e-3, fused=True)
    run = run._replace(optimizer=optimizer)
    ready = [tuple(t.to(size.device) for t in run.batches.batch_at(i)) for i in range(8)]
    batches, count = itertools.cycle(ready), itertools.count()
    snapshot, before_update = take(run)

    def step() -> None:
        x, y = next(batches)
        optimizer.zero_grad()
        next_token_loss(run.model(x), y).backward()
        before_update()
        optimizer.step()

    def interval() -> None:
        snapshot(next(count))
        for _ in range(INTERVAL):
            step()

    step()  # makes the moments
    return Training(run, interval)


def ring_of(run: Run, depth: int = 3) -> SnapshotRing:
    parts = {
        "parameters": NamedTensors(lambda: dict(run.model.named_parameters())),
        "optimizer": OptimizerState(run.optimizer),
        "random": RandomState(),
    }
    return SnapshotRing(parts, depth, 0, print)


def nothing(run: Run) -> tuple[Take, Callable[[], object]]:
    return lambda step: None, lambda: None


def in_memory(run: Run) -> tuple[Take, Callable[[], object]]:
    ring = ring_of(run)
    return ring.take, ring.hold_back_update


def on_disk(folder: Path) -> Callable[[Run], tuple[Take, Callable[[], object]]]:
    def take_on_disk(run: Run) -> tuple[Take, Callable[[], object]]:
        ring, saver = ring_of(run), Saver(SnapshotFolder(folder), 3)

        def take(step: int) -> None:
            ring.take(step)
            good = ring.newest_good(step - 1)  # as the guard does: when it is proven
            if good is not None:
                saver.save(good)

        return take, ring.hold_back_update

    return take_on_disk


def by_torch_save(folder: Path) -> Callable[[Run], tuple[Take, Callable[[], object]]]:
    def take_by_torch_save(run: Run) -> tuple[Take, Callable[[], object]]:
        def take(step: int) -> None:
            state = {"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}
            torch.save(state, folder / f"checkpoint-{step % 3}.pt")

        return take, lambda: None

    return take_by_torch_save


def measure_intervals(benchmark: Any, size: Size, folder: Path) -> None:
    trainings = {
        "no snapshots": training(size, nothing),
        "foreshock, in memory": training(size, in_memory),
        "foreshock, in memory and on disk": training(size, on_disk(folder / "snapshots")),
        "torch.save": training(size, by_torch_save(folder)),
    }
    timings = time_in_turn(
        benchmark, {name: t.interval for name, t in trainings.items()}, ROUNDS, size.device
    )
    first = list(trainings["no snapshots"].run.model.parameters())
    for other in trainings.values():  # taking snapshots changes no bit of what is learned
        pairs = zip(first, other.run.model.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    base = timings["no snapshots"]
    found = {
        name: {**timing.row(), "loss_of_throughput": 1 - 1 / timing.over(base)}
        for name, timing in timings.items()
    }
    if not IS_TRIAL:
        rows.store("snapshots", size.name, size.device, found)


def measure_copies(benchmark: Any, size: Size, folder: Path) -> None:
    run = training(size, nothing).run
    state = [*run.model.parameters()]
    state += [t for of_one in run.optimizer.state.values() for t in of_one.values()]
    ring, seal, step = ring_of(run), StateSeal(dict(run.model.named_parameters()), run.optimizer), 0
    seal.set()
    kept: list[torch.Tensor] = []

    def take() -> None:
        nonlocal step
        step += 1
        ring.take(step)

    def clone() -> None:
        kept[:] = [t.detach().to("cpu", copy=True) for t in state]

    for _ in range(5):
        take()
    clone()
    saved = ring.entries[-1].saved
    ours = [*saved["parameters"].values()]
    ours += [t for of_one in saved["optimizer"]["state"] for t in of_one.values()]
    assert all(torch.equal(a, b) for a, b in zip(ours, kept, strict=True))
    take_by_save, _ = by_torch_save(folder)(run)
    timings = time_in_turn(
        benchmark,
        {
            "foreshock: copy, scan and checksum": take,
            "plain copy of the state": clone,
            "torch.save": lambda: take_by_save(0),
            "verify_state, a look": seal.differs,
        },
        3 * ROUNDS,
        size.device,
    )
    base = timings["plain copy of the state"]
    found = {name: {**t.row(), "times_a_copy": t.over(base)} for name, t in timings.items()}
    if not IS_TRIAL:
        rows.store("snapshot_copy", size.name.rpartition(",")[0], size.device, found)


def test_interval_throughput_on_the_cpu(benchmark: Any, tmp_path: Path) -> None:
    measure_intervals(benchmark, CPU_SIZE, tmp_path)


def test_copies_on_the_cpu(benchmark: Any, tmp_path: Path) -> None:
    measure_copies(benchmark, CPU_SIZE, tmp_path)


@pytest.mark.gpu
def test_interval_throughput_on_the_gpu(benchmark: Any, tmp_path: Path) -> None:
    measure_intervals(benchmark, GPU_SIZE, tmp_path)


@pytest.mark.gpu
def test_copies_on_the_gpu(benchmark: Any, tmp_path: Path) -> None:
    measure_copies(benchmark, GPU_SIZE, tmp_path)
