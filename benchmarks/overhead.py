"""What watching costs: whole training loops, step against step; see docs/overhead.md.

Every loop trains its own copy of one GPT on the same batches. A round runs one step of each, so
that all of them meet the machine in the same mood. Snapshots are due every 100 steps: their cost is
timed by itself and spread over the interval, which is what throughput feels.
"""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import foreshock as fs
from benchmarks import rows
from benchmarks.interleave import time_in_turn
from foreshock.drill.gpt import GPTConfig, Recipe, Run, build, next_token_loss
from foreshock.guard.snapshots import SnapshotRing
from foreshock.guard.state import NamedTensors, OptimizerState, RandomState

SNAPSHOT_INTERVAL = 100


@dataclasses.dataclass(frozen=True)
class Size:
    """A model and its batch."""

    name: str
    recipe: Recipe
    rounds: int


CPU_SIZE = Size(
    "GPT of 10.7M parameters, 1024 tokens a step",
    Recipe(model=GPTConfig(width=384, num_blocks=6, num_heads=6, context=128), batch_size=8),
    rounds=41,
)
GPU_SIZE = Size(
    "GPT of 124M parameters, 16384 tokens a step",
    Recipe(model=GPTConfig(width=896, num_blocks=13, num_heads=14, context=512), batch_size=32),
    rounds=31,
)


Optimize = Callable[[Any], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Optimize] = {
    "fused AdamW": lambda ps: torch.optim.AdamW(ps, lr=1e-3, fused=True),
    "foreach AdamW": lambda ps: torch.optim.AdamW(ps, lr=1e-3, foreach=True),
    "foreach SGD": lambda ps: torch.optim.SGD(ps, lr=1e-2, momentum=0.9, foreach=True),
}


class Loop(NamedTuple):
    """A training loop with a model of its own; `step()` runs one step."""

    model: torch.nn.Module
    step: Callable[[], object]


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is trained, by what, and where."""

    size: Size
    optimizer: str
    device: str

    def fresh(self) -> Run:
        run = build(0, self.size.recipe)
        run.model.to(self.device)
        parameters = run.model.parameters()
        return run._replace(optimizer=OPTIMIZERS[self.optimizer](parameters))  # type: ignore[arg-type]


def batches(run: Run, device: str) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    ready = [tuple(t.to(device) for t in run.batches.batch_at(i)) for i in range(8)]
    endless = itertools.cycle(ready)
    return lambda: next(endless)  # type: ignore[return-value]


def backward(run: Run, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    run.optimizer.zero_grad()
    loss = next_token_loss(run.model(batch[0]), batch[1])
    loss.backward()
    return loss


def plain(setting: Setting, max_norm: float | None) -> Loop:
    run = setting.fresh()
    draw = batches(run, setting.device)

    def step() -> None:
        backward(run, draw())
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(run.model.parameters(), max_norm)
        run.optimizer.step()

    return Loop(run.model, step)


def watched(setting: Setting, max_norm: float | None, mode: str, out_dir: Path) -> Loop:
    """Ours, everything on at its default cadence but the snapshots, which are timed apart."""
    run = setting.fresh()
    draw = batches(run, setting.device)
    guard = fs.Guard(mode=mode, snapshot_interval=10**9)  # type: ignore[arg-type]
    monitor = fs.Monitor(run.model, run.optimizer, out_dir, guard)

    def step() -> None:
        loss = backward(run, draw())
        if max_norm is not None:
            monitor.clip_grad_norm_(max_norm)
        assert monitor.step(loss)
        run.optimizer.step()

    return Loop(run.model, step)


def checked_one_by_one(setting: Setting, max_norm: float) -> Loop:
    """The guard that people write: isnan of every gradient and parameter, with .item()."""
    run = setting.fresh()
    draw = batches(run, setting.device)

    def step() -> None:
        backward(run, draw())
        for p in run.model.parameters():
            assert p.grad is not None
            if torch.isnan(p.grad).any().item() or torch.isnan(p).any().item():
                raise FloatingPointError("NaN")
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), max_norm)
        run.optimizer.step()

    return Loop(run.model, step)


def snapshot_variants(setting: Setting, folder: Path) -> dict[str, Callable[[], object]]:
    """One snapshot each: in memory and verified, as ours are, and by torch.save to disk."""
    run = setting.fresh()
    backward(run, batches(run, setting.device)())
    run.optimizer.step()
    parts = {
        "parameters": NamedTensors(lambda: dict(run.model.named_parameters())),
        "optimizer": OptimizerState(run.optimizer),
        "random": RandomState(),
    }
    ring = SnapshotRing(parts, fs.Guard().depth, 0, print)
    step = itertools.count()

    def save() -> None:
        state = {"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}
        torch.save(state, folder / "checkpoint.pt")

    return {
        "snapshot, foreshock": lambda: ring.take(next(step)),
        "snapshot, torch.save": save,
    }


def measure(benchmark: Any, setting: Setting, folder: Path) -> None:
    max_norm = setting.size.recipe.max_norm
    loops = {
        "plain loop": plain(setting, None),
        "plain loop with clip": plain(setting, max_norm),
        "foreshock observe": watched(setting, None, "observe", folder / "a"),
        "foreshock observe with clip": watched(setting, max_norm, "observe", folder / "b"),
        "foreshock recover with clip": watched(setting, max_norm, "recover", folder / "c"),
        "isnan of each tensor, with clip": checked_one_by_one(setting, max_norm),
    }
    timings = time_in_turn(
        benchmark,
        {name: loop.step for name, loop in loops.items()} | snapshot_variants(setting, folder),
        rounds=setting.size.rounds,
        device=setting.device,
        slow={"snapshot, foreshock": 7, "snapshot, torch.save": 7},
    )
    bare, clipped = timings["plain loop"], timings["plain loop with clip"]
    found: dict[str, dict[str, Any]] = {}
    for name, timing in timings.items():
        if name.startswith("snapshot"):
            percent = 100 * timing.median_ms / SNAPSHOT_INTERVAL / clipped.median_ms
        else:
            percent = 100 * (timing.over(clipped if "clip" in name else bare) - 1)
        found[name] = {**timing.row(), "percent": percent}
    rows.store("overhead", f"{setting.size.name}, {setting.optimizer}", setting.device, found)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_overhead_on_the_cpu(benchmark: Any, optimizer: str, tmp_path: Path) -> None:
    measure(benchmark, Setting(CPU_SIZE, optimizer, "cpu"), tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_overhead_on_the_gpu(benchmark: Any, optimizer: str, tmp_path: Path) -> None:
    measure(benchmark, Setting(GPU_SIZE, optimizer, "cuda"), tmp_path)


def test_the_watched_loop_learns_the_same(benchmark: Any) -> None:
    """The answer first: watching changes no bit of what is learned."""
    small = dataclasses.replace(
        CPU_SIZE, recipe=Recipe(model=GPTConfig(width=32, num_blocks=1, num_heads=2, context=16))
    )
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(small, "fused AdamW", "cpu")
        left = plain(setting, None)
        right = watched(setting, None, "observe", Path(folder))
        benchmark.pedantic(lambda: (left.step(), right.step()), rounds=3)
    pairs = zip(left.model.parameters(), right.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
