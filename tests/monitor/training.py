"""A small training run that can be struck by faults, and compared with another bit by bit."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

import foreshock as fs
from foreshock.guard.clipping import (
    clip_factor,
    divisor_of,
    is_fused,
    scale_gradients,
    scaled_in_step,
)
from foreshock.records import read_telemetry

FEATURES, WIDTH, CLASSES, SAMPLES, BATCH = 6, 8, 3, 48, 8
STEPS_PER_EPOCH = SAMPLES // BATCH


@dataclasses.dataclass
class Strike:
    """A fault that hits a run at a step, as often as it has lives left."""

    step: int
    hit: Callable[[Run], None]
    when: str = "start"
    """start, backward (after it) or update (after it)."""
    lives: int = 1


@dataclasses.dataclass
class Run:
    """All that a training loop needs, and how it goes about it."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loader: Iterable[Any]
    epochs: int = 2
    scheduler: Any = None
    average: AveragedModel | None = None
    accumulation: int = 1
    judges_first: bool = True
    zeroes_first: bool = True
    sets_to_none: bool = True
    max_norm: float | None = 1.0
    clip_factor: float = 1.0
    strikes: list[Strike] = dataclasses.field(default_factory=list)
    steps: list[int] = dataclasses.field(default_factory=list)
    losses: dict[int, float] = dataclasses.field(default_factory=dict)
    verdicts: list[fs.Verdict] = dataclasses.field(default_factory=list)

    @property
    def state(self) -> dict[str, Any]:
        """What a monitor is to be told of."""
        known = {"scheduler": self.scheduler, "average": self.average}
        return {name: owner for name, owner in known.items() if owner is not None}

    def batches(self, monitor: fs.Monitor | None) -> Iterator[tuple[int, Any]]:
        if monitor is not None:
            yield from monitor.loop(self.loader, epochs=self.epochs)
            return
        step = 0
        for _ in range(self.epochs):
            for batch in self.loader:
                yield step, batch
                step += 1


def train(run: Run, monitor: fs.Monitor | None = None) -> Run:
    """Trains to the end, or until the monitor says no."""
    for step, batch in run.batches(monitor):
        run.steps.append(step)
        if not train_step(run, step, batch, monitor):
            break
    return run


def train_step(run: Run, step: int, batch: Any, monitor: fs.Monitor | None) -> bool:
    """One turn of the loop; whether to go on."""
    begins, ends = step % run.accumulation == 0, (step + 1) % run.accumulation == 0
    x, y = batch
    strike(run, step, "start")
    if run.zeroes_first and begins:
        run.optimizer.zero_grad(set_to_none=run.sets_to_none)
    loss = nn.functional.cross_entropy(run.model(x), y) / run.accumulation
    loss.backward()
    run.losses[step] = loss.item()
    strike(run, step, "backward")
    if ends:
        clip(run, monitor)
    goes_on = judge(run, loss, monitor) if run.judges_first else True
    if ends:
        update(run, monitor)
        strike(run, step, "update")
    if not run.judges_first:
        goes_on = judge(run, loss, monitor)
    return goes_on


def clip(run: Run, monitor: fs.Monitor | None) -> None:
    if run.max_norm is None:
        return
    if monitor is None:
        # The norm is summed up in another order by torch, which would be no error but other bits.
        run.clip_factor = clip_factor(foreshock_norm(run.model), run.max_norm)
        if not is_fused(run.optimizer):
            scale_gradients(list(run.model.parameters()), run.clip_factor)
    else:
        monitor.clip_grad_norm_(run.max_norm)


def foreshock_norm(model: nn.Module) -> float:
    return fs.guard.inspect_gradients(dict(model.named_parameters())).inspect().norm


def judge(run: Run, loss: Tensor, monitor: fs.Monitor | None) -> bool:
    if monitor is None:
        return True
    run.verdicts.append(monitor.step(loss))
    return bool(run.verdicts[-1])


def update(run: Run, monitor: fs.Monitor | None) -> None:
    if monitor is None and is_fused(run.optimizer) and run.clip_factor != 1:
        with scaled_in_step(run.optimizer, divisor_of(run.clip_factor)):
            run.optimizer.step()
    else:
        run.optimizer.step()
    if run.scheduler is not None:
        run.scheduler.step()
    if run.average is not None:
        run.average.update_parameters(run.model)
    if not run.zeroes_first:
        run.optimizer.zero_grad(set_to_none=run.sets_to_none)


def strike(run: Run, step: int, when: str) -> None:
    for fault in run.strikes:
        if fault.step == step and fault.when == when and fault.lives > 0:
            fault.lives -= 1
            with torch.no_grad():
                fault.hit(run)


# ---- what is trained


class Model(nn.Module):
    """Batch normalisation and dropout, so that buffers and random numbers matter."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(FEATURES, WIDTH), nn.BatchNorm1d(WIDTH), nn.Tanh(), nn.Dropout(0.2)
        )
        self.head = nn.Linear(WIDTH, CLASSES)
        self.register_buffer("noise_scale", torch.tensor(0.05), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        noise = random.random() + float(np.random.random())
        return self.head(self.body(x) + self.noise_scale * noise)


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def make_dataset() -> TensorDataset:
    generator = torch.Generator().manual_seed(99)
    x = torch.randn(SAMPLES, FEATURES, generator=generator)
    return TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long())


def make_loader(num_workers: int = 0) -> DataLoader[Any]:
    return DataLoader(make_dataset(), batch_size=BATCH, shuffle=True, num_workers=num_workers)


class ResumableLoader:
    """Shuffled batches from a generator of its own, that can be sent back within an epoch."""

    def __init__(self, *, resumes_with_next_epoch: bool = False) -> None:
        self.x, self.y = make_dataset().tensors
        self.resumes_with_next_epoch = resumes_with_next_epoch
        self.epoch = self.position = 0
        self.fetched = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.resumes_with_next_epoch and self.position == STEPS_PER_EPOCH:
            self._turn()
        generator = torch.Generator().manual_seed(self.epoch)
        order = torch.randperm(SAMPLES, generator=generator)
        while self.position < STEPS_PER_EPOCH:
            chosen = order[self.position * BATCH : (self.position + 1) * BATCH]
            self.position += 1
            self.fetched += 1
            yield self.x[chosen], self.y[chosen]
        if not self.resumes_with_next_epoch:
            self._turn()

    def _turn(self) -> None:
        self.epoch, self.position = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]


class DrawingLoader:
    """Draws its orders from the global generator, and resumes as torchdata's StatefulDataLoader
    does: the iterator that was saved is made again, with a draw, even if it was at its end, and
    then a new one with another draw.
    """

    def __init__(self) -> None:
        self.x, self.y = make_dataset().tensors
        self.iterator: DrawnOrder | None = None
        self.to_resume: dict[str, Any] | None = None

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.to_resume is not None:
            self.iterator, self.to_resume = DrawnOrder(self, self.to_resume), None
            if self.iterator.has_ended:
                self.iterator = DrawnOrder(self)
        elif self.iterator is None or self.iterator.has_begun:
            self.iterator = DrawnOrder(self)
        return self.iterator

    def state_dict(self) -> dict[str, Any]:
        if self.iterator is None:
            self.iterator = DrawnOrder(self)
        order = self.iterator
        return {"seed": order.seed, "position": order.position, "has_ended": order.has_ended}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.to_resume, self.iterator = state, None


class DrawnOrder:
    """An iterator of a DrawingLoader."""

    def __init__(self, loader: DrawingLoader, state: dict[str, Any] | None = None) -> None:
        self.loader = loader
        drawn = int(torch.randint(2**31, ()))
        self.seed = drawn if state is None else state["seed"]
        self.position = 0 if state is None else state["position"]
        self.has_ended = False if state is None else state["has_ended"]
        self.has_begun = self.position > 0

    def __iter__(self) -> DrawnOrder:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        self.has_begun = True
        if self.position == STEPS_PER_EPOCH:
            self.has_ended = True
            raise StopIteration
        order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(self.seed))
        chosen = order[self.position * BATCH : (self.position + 1) * BATCH]
        self.position += 1
        return self.loader.x[chosen], self.loader.y[chosen]


def make_run(
    seed: int = 0,
    optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer] | None = None,
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
    *,
    has_average: bool = False,
    loader: Callable[[], Iterable[Any]] = make_loader,
    model: nn.Module | None = None,
    **how: Any,
) -> Run:
    """A run that is the same, bit by bit, whenever it is made with the same arguments."""
    seed_everything(seed)
    model = Model() if model is None else model
    made = (optimizer or (lambda ps: torch.optim.AdamW(ps, lr=1e-2)))(model.parameters())
    return Run(
        model,
        made,
        loader(),
        scheduler=None if scheduler is None else scheduler(made),
        average=(
            AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)) if has_average else None
        ),
        **how,
    )


def make_monitor(run: Run, out_dir: Path, **guard: Any) -> fs.Monitor:
    """A monitor that recovers, by default without a change of the learning rate."""
    given = {"mode": "recover", "snapshot_interval": 4, "lr_backoff": 1.0, **guard}
    return fs.Monitor(run.model, run.optimizer, out_dir, fs.Guard(**given), state=run.state)


def train_guarded(run: Run, out_dir: Path, **guard: Any) -> dict[str, Any]:
    """Trains to the end under a monitor; its summary."""
    with make_monitor(run, out_dir, **guard) as monitor:
        train(run, monitor)
    return monitor.finalize()


# ---- faults


def nan_in_weight(run: Run) -> None:
    run.model.head.weight[1, 2] = math.nan


def nan_in_gradient(run: Run) -> None:
    run.model.head.weight.grad[0, 0] = math.nan


def inf_in_gradient(run: Run) -> None:
    run.model.body[0].weight.grad[2, 1] = -math.inf


def nan_in_buffer(run: Run) -> None:
    run.model.body[1].running_mean[3] = math.nan


def flipped_bit_in_weight(run: Run) -> None:
    flip_exponent(run.model.head.bias)


def flipped_bit_in_moment(run: Run) -> None:
    """In a first moment; a second one that is too large stops one weight, unseen by a guard."""
    first = run.optimizer.state[run.model.body[0].weight]
    moment = first.get("exp_avg", first.get("momentum_buffer"))
    flip_exponent(run.model.head.bias if moment is None else moment)


def flip_exponent(tensor: Tensor) -> None:
    """Flips the highest bit of the exponent of a number between -2 and 2: times 2^128."""
    flat = tensor.view(-1)
    at = int(torch.where(flat.abs() < 2, flat.abs(), 0).argmax())
    flat.view(torch.int32)[at] ^= 1 << 30


# ---- comparison


def state_of(run: Run) -> dict[str, Any]:
    """Everything that a run has changed, by path."""
    state = {
        "parameters": dict(run.model.named_parameters()),
        "buffers": dict(run.model.named_buffers()),
        "moments": [run.optimizer.state.get(p, {}) for p in run.model.parameters()],
        "groups": [
            {key: value for key, value in group.items() if key != "params"}
            for group in run.optimizer.param_groups
        ],
        "random": [random.getstate(), np.random.get_state(), torch.get_rng_state()],
    }
    if run.scheduler is not None:
        state["scheduler"] = run.scheduler.state_dict()
    if run.average is not None:
        state["average"] = run.average.state_dict()
    return dict(fs.guard.containers.leaves_in(state))


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Paths at which two states are not the same, bit by bit."""
    missing = one.keys() ^ other.keys()
    return sorted(missing) + [p for p in one.keys() & other.keys() if not same(one[p], other[p])]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        is_alike = a.dtype == b.dtype and a.shape == b.shape
        return is_alike and bits(a) == bits(b)
    if isinstance(a, np.ndarray):
        return a.tobytes() == b.tobytes()
    if callable(a) and callable(b):
        return True  # a scheduler's formula, made anew for each run
    return bool(a == b)


def bits(tensor: Tensor) -> bytes:
    flat = tensor.detach().contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).numpy())


def assert_same_bits(one: Run, other: Run) -> None:
    assert differing(state_of(one), state_of(other)) == []


def events(out_dir: Path, name: str | None = None) -> list[dict[str, Any]]:
    """Events of one name that telemetry.jsonl tells of, or of all but telemetry and autopsies."""
    records = read_telemetry(out_dir / "telemetry.jsonl").records
    if name is not None:
        return [r for r in records if r["event"] == name]
    return [r for r in records if r["event"] not in ("start", "telemetry", "autopsy")]
