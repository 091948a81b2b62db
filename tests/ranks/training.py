"""A small training on many ranks that can be struck by faults, and compared bit by bit."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, distribute_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import foreshock as fs
from foreshock.distributed_part import is_distributed, local_part
from foreshock.guard.containers import tensors_in
from foreshock.guard.persistence import Saver

FEATURES, WIDTH, CLASSES, STEPS, BATCH = 6, 8, 3, 16, 4
KINDS = ("ddp", "fsdp2", "tp")
SCALED_KINDS = ("ddp", "fsdp2", "tp alone")
"""Those that a GradScaler can be put beside: torch's refuses to mix DTensors with others."""

_Check = TypeVar("_Check", bound=Callable[[Path], None])


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(FEATURES)
        self.up = nn.Linear(FEATURES, WIDTH)
        self.down = nn.Linear(WIDTH, FEATURES)
        self.head = nn.Linear(FEATURES, CLASSES)
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.scale * self.down(torch.tanh(self.up(self.norm(x)))))


def ranks(size: int) -> Callable[[_Check], _Check]:
    """Marks a check that is of so many ranks only."""

    def mark(check: _Check) -> _Check:
        check.sizes = (size,)  # type: ignore[attr-defined]
        return check

    return mark


def make_model(kind: str) -> nn.Module:
    """The same on all ranks."""
    torch.manual_seed(0)
    model = Block()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if kind == "ddp":
        return DistributedDataParallel(model)
    if kind == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        for part in (model.up, model.down):
            fully_shard(part, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    if kind == "fsdp2 tp":
        from torch.distributed.fsdp import fully_shard

        both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "parts"))
        return fully_shard(_split(model, both["parts"]), mesh=both["data"])
    _split(model, mesh)
    if kind == "tp alone":
        for part in (model.norm, model.head):
            distribute_module(part, mesh, None, _to_mesh, _from_mesh)
    return model


def _split(model: Block, mesh: Any) -> nn.Module:
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    return parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def _to_mesh(module: nn.Module, inputs: Any, mesh: Any) -> tuple[DTensor, ...]:
    return tuple(DTensor.from_local(x, mesh, [Replicate()]) for x in inputs)


def _from_mesh(module: nn.Module, output: Any, mesh: Any) -> Tensor:
    return output.to_local()


def number_of_data(kind: str) -> int:
    """Of the part of the data that this rank trains on."""
    rank = dist.get_rank()
    return {"tp": 0, "tp alone": 0, "fsdp2 tp": rank // 2}.get(kind, rank)


@dataclasses.dataclass
class Strike:
    """A fault that hits one rank at a step, once."""

    step: int
    rank: int
    hit: Callable[[nn.Module, torch.optim.Optimizer], None]
    when: str = "start"
    """start, backward (after it), or clip (after it)."""
    lives: int = 1


class Batches:
    """Of this rank, or with tensor parallelism of all; can be sent back."""

    def __init__(self, seed: int, steps: int = STEPS) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(steps, BATCH, FEATURES, generator=generator)
        self.y = (self.x[..., 0] > 0).long() + (self.x[..., 1] > 0.5).long()
        self.at = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while self.at < len(self.x):
            self.at += 1
            yield self.x[self.at - 1], self.y[self.at - 1]
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


@dataclasses.dataclass
class Run:
    model: nn.Module
    optimizer: torch.optim.Optimizer
    out: Path
    verdicts: list[fs.Verdict] = dataclasses.field(default_factory=list)
    norms: list[float] = dataclasses.field(default_factory=list)
    summary: dict[str, Any] = dataclasses.field(default_factory=dict)
    saver: Saver | None = None
    """Of its monitor, where snapshots go to disk."""
    scaler: torch.amp.GradScaler | None = None

    @property
    def bad(self) -> list[fs.Verdict]:
        return [v for v in self.verdicts if v.action is not fs.Action.CONTINUE]

    def bits(self) -> dict[str, bytes]:
        """Of what this rank holds of parameters and moments."""
        state = {
            "parameters": dict(self.model.named_parameters()),
            "buffers": dict(self.model.named_buffers()),
            "moments": [self.optimizer.state.get(p, {}) for p in self.model.parameters()],
        }
        return {
            path: local_part(t)
            .detach()
            .contiguous()
            .reshape(-1)
            .view(torch.uint8)
            .numpy()
            .tobytes()
            for path, t in tensors_in(state)
        }


@dataclasses.dataclass
class How:
    """How a training loop goes about it."""

    clips: str = "with loss"
    """with loss, without loss, torch (clipped by torch), or not at all."""
    judges: str = "first"
    """first (before the update), last (after it), or never."""
    accumulation: int = 1
    is_fused: bool = False
    steps: int = STEPS
    max_norm: float = 0.5
    scale: float | None = None
    """With which a GradScaler begins, in half precision."""


def make_run(kind: str, out: Path, how: How) -> Run:
    model = make_model(kind)
    optimizer = make_optimizer(list(model.parameters()), 1e-2, is_fused=how.is_fused)
    scaler = None
    if how.scale is not None:
        scaler = torch.amp.GradScaler("cpu", init_scale=how.scale, growth_interval=5)
    return Run(model, optimizer, out, scaler=scaler)


def make_optimizer(parameters: list[Tensor], lr: float, *, is_fused: bool) -> torch.optim.Optimizer:
    """In groups, since torch's fused kernels refuse to mix DTensors with others."""
    groups = [[p for p in parameters if is_distributed(p) is kind] for kind in (True, False)]
    return torch.optim.AdamW([{"params": g} for g in groups if g], lr=lr, fused=is_fused)


def train(
    kind: str,
    out: Path,
    *strikes: Strike,
    how: How | None = None,
    monitor: dict[str, Any] | None = None,
    at_step: Callable[[Run, int], Any] | None = None,
    **guard: Any,
) -> Run:
    """Trains to the end, or until the monitor says no."""
    how = how or How()
    run = make_run(kind, out, how)
    given = {"mode": "recover", "snapshot_interval": 4, "lr_backoff": 1.0, **guard}
    batches = Batches(number_of_data(kind), how.steps)
    more = {"state": {} if run.scaler is None else {"scaler": run.scaler}, **(monitor or {})}
    with fs.Monitor(run.model, run.optimizer, out, fs.Guard(**given), **more) as watch:
        run.saver = watch._watch.history._saver
        for step, (x, y) in watch.loop(batches):
            _strike(run, strikes, step, "start")
            if at_step is not None:
                at_step(run, step)
            if not train_step(run, watch, step, x, y, strikes, how):
                break
    run.summary = watch.finalize()
    return run


def train_step(
    run: Run,
    watch: fs.Monitor,
    step: int,
    x: Tensor,
    y: Tensor,
    strikes: tuple[Strike, ...],
    how: How,
) -> bool:
    if step % how.accumulation == 0:
        run.optimizer.zero_grad()
    with torch.autocast("cpu", torch.float16, enabled=run.scaler is not None):
        loss = nn.functional.cross_entropy(run.model(x), y) / how.accumulation
    (loss if run.scaler is None else run.scaler.scale(loss)).backward()
    _strike(run, strikes, step, "backward")
    is_end = (step + 1) % how.accumulation == 0
    if is_end:
        if run.scaler is not None and how.clips != "none":
            run.scaler.unscale_(run.optimizer)
        clip(run, watch, loss, how)
        _strike(run, strikes, step, "clip")
    if how.judges == "first":
        run.verdicts.append(watch.step(loss))
    if is_end:
        update(run)
    if how.judges == "last":
        run.verdicts.append(watch.step(loss))
    return not run.verdicts or bool(run.verdicts[-1])


def update(run: Run) -> None:
    if run.scaler is None:
        run.optimizer.step()
    else:
        run.scaler.step(run.optimizer)
        run.scaler.update()


def clip(run: Run, watch: fs.Monitor, loss: Tensor, how: How) -> None:
    if how.clips == "with loss":
        run.norms.append(float(watch.clip_grad_norm_(how.max_norm, loss=loss)))
    elif how.clips == "without loss":
        run.norms.append(float(watch.clip_grad_norm_(how.max_norm)))
    elif how.clips == "torch":
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), how.max_norm)


def _strike(run: Run, strikes: tuple[Strike, ...], step: int, when: str) -> None:
    for fault in strikes:
        is_here = (fault.step, fault.rank, fault.when) == (step, dist.get_rank(), when)
        if is_here and fault.lives > 0:
            fault.lives -= 1
            with torch.no_grad():
                fault.hit(run.model, run.optimizer)


def parameter(model: nn.Module, name: str) -> Tensor:
    """By the end of its name, which a wrapper may have put something before."""
    return next(p for n, p in model.named_parameters() if n.endswith(name))


def gathered(value: Any) -> list[Any]:
    """What every rank has, rank by rank."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def assert_same_on_all_ranks(value: Any) -> None:
    found = gathered(value)
    assert all(other == found[0] for other in found), found


class Collectives(TorchDispatchMode):
    """Counts them, whoever starts them: torch.distributed, FSDP2, DTensor."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # its own dispatch comes by here again
        is_collective = func.namespace in ("c10d", "_c10d_functional", "c10d_functional")
        self.number += is_collective and "wait" not in func.__name__
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def counted() -> Iterator[list[tuple[int, str]]]:
    """The collectives that the python side starts meanwhile: bytes, and the operation."""
    calls: list[tuple[int, str]] = []
    inner = dist.all_reduce

    def all_reduce(tensor: Tensor, op: Any = dist.ReduceOp.SUM, *args: Any, **kwargs: Any) -> Any:
        calls.append((tensor.nbytes, str(op)))
        return inner(tensor, op, *args, **kwargs)

    dist.all_reduce = all_reduce  # type: ignore[assignment]
    try:
        yield calls
    finally:
        dist.all_reduce = inner  # type: ignore[assignment]


@functools.cache
def clean_bits(kind: str, out: Path, *, is_fused: bool = False) -> dict[str, bytes]:
    """Of a run that nothing happens to."""
    run = train(kind, out, how=How(is_fused=is_fused))
    assert not run.bad
    return run.bits()
