"""A run is taken up by another number of ranks, or split in another way, with the same bits."""

from __future__ import annotations

import contextlib
import copy
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

import foreshock as fs
from foreshock.distributed_part import local_part, whole
from foreshock.guard import snapshot_file
from foreshock.guard.containers import tensors_in
from foreshock.guard.parts import all_steps_in, folder_of
from foreshock.guard.state import bare
from foreshock.records import read_telemetry
from tests.ranks.training import Batches, gathered, ranks

FEATURES = 6
State = dict[str, Any]


class Net(nn.Module):
    """Whose tensors cannot be split evenly, and some not over four ranks at all."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(FEATURES, 6)
        self.down = nn.Linear(6, 3)
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("offset", torch.tensor([0.5, 0.25]))

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.dropout(torch.tanh(self.up(self.scale * x)), 0.1)
        return self.down(hidden) + self.offset.sum()


@functools.cache
def groups() -> dict[int, Any]:
    """Of the first ranks; made by all."""
    return {size: dist.new_group(list(range(size))) for size in (1, 2, 4)}


def make_model(kind: str, size: int) -> nn.Module:
    torch.manual_seed(0)
    model = Net()
    if kind == "plain":
        return model
    if kind == "ddp":
        return DistributedDataParallel(model, process_group=groups()[size])
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    if kind in ("hsdp", "fsdp2 and tp"):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
        if kind != "hsdp":
            parallelize_module(model, mesh["b"], plan)
            mesh = mesh["a"]
    else:
        mesh = DeviceMesh.from_group(groups()[size], "cpu")
    if kind == "tp":
        return parallelize_module(model, mesh, plan)
    for part in () if kind == "fsdp2 and tp" else (model.up, model.down):
        fully_shard(part, mesh=mesh)
    return fully_shard(model, mesh=mesh)


class Run:
    """On the first `size` ranks."""

    def __init__(self, kind: str, size: int, out: Path, kept: Path, **guard: Any) -> None:
        self.kind, self.out = kind, out
        self.model = make_model(kind, size)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, foreach=False)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 20)
        torch.manual_seed(100 + dist.get_rank())
        given = {"mode": "recover", "snapshot_interval": 2, "clean_steps": 1, "depth": 2}
        given |= {"lr_backoff": 1.0, **guard}
        self.monitor = fs.Monitor(
            self.model,
            self.optimizer,
            out,
            fs.Guard(persist_dir=kept, **given),
            state={"scheduler": self.scheduler},
            process_group=None if size == 1 else groups()[size],
            rank_records=size > 1,
        )
        self.no_sync: Any = getattr(self.model, "no_sync", contextlib.nullcontext)
        self.states: dict[int, State] = {}
        self.verdicts: list[fs.Verdict] = []

    def train(self, to: int, accumulation: int = 1) -> None:
        """To a step; keeps what the whole state was at each, as when its snapshot is taken."""
        has_tp = self.kind.endswith("tp")
        batches = Batches(dist.get_rank() // 2 if has_tp else dist.get_rank(), 20)
        for step, (x, y) in self.monitor.loop(batches):
            self.states[step] = self.state()
            if step == to:
                break
            if step % accumulation == 0:
                self.optimizer.zero_grad()
            is_end = (step + 1) % accumulation == 0
            # DistributedDataParallel only: each rank then adds up its own gradients.
            alone = contextlib.nullcontext if is_end else self.no_sync
            with alone():
                loss = nn.functional.cross_entropy(self.model(x), y)
                loss.backward()
            self.verdicts.append(self.monitor.step(loss))
            if is_end:
                self.optimizer.step()
                self.scheduler.step()
            self.monitor._watch.history._saver.wait()  # so that every snapshot is written
        self.monitor.finalize()

    def state(self) -> State:
        """The whole of it, as one process would have it."""
        named = {bare(name): p for name, p in self.model.named_parameters()}
        live = {
            "parameters": named,
            # After an update they are leftovers, which are in no snapshot.
            "gradients": {
                n: p.grad for n, p in named.items() if self.monitor._watch._is_within_accumulation
            },
            "buffers": {bare(name): b for name, b in self.model.named_buffers()},
            "moments": [self.optimizer.state.get(p, {}) for p in self.model.parameters()],
        }
        tensors = {path: whole(t).detach().clone() for path, t in tensors_in(live)}
        return {
            "tensors": tensors,
            "scheduler": copy.deepcopy(self.scheduler.state_dict()),
            "lr": self.optimizer.param_groups[0]["lr"],
            "spikes": copy.deepcopy(self.monitor._watch._spikes.state_dict()),
        }

    def generators(self) -> tuple[bytes, ...]:
        """What the next random numbers depend on."""
        import random

        on_host = torch.get_rng_state().numpy().tobytes()
        numpy = np.random.get_state()[1].tobytes()
        return on_host, numpy, repr(random.getstate()).encode()


def assert_same(state: State, other: State) -> None:
    tensors, others = state["tensors"], other["tensors"]
    assert tensors.keys() == others.keys()
    for path, tensor in tensors.items():
        assert torch.equal(tensor, others[path]), path
        assert tensor.dtype == others[path].dtype, path
    torch.testing.assert_close(
        {k: v for k, v in state.items() if k != "tensors"},
        {k: v for k, v in other.items() if k != "tensors"},
        rtol=0,
        atol=0,
        equal_nan=True,
    )


def taken_by(
    kind: str, size: int, out: Path, to: int = 7, accumulation: int = 1, **guard: Any
) -> dict[int, State]:
    """The states of a run on some ranks that has left its snapshots in `out / "kept"`."""
    groups()  # all ranks make them
    states: dict[int, State] = {}
    if dist.get_rank() < size:
        run = Run(kind, size, out / "first", out / "kept", **guard)
        run.train(to, accumulation)
        states = run.states
    found = gathered(states)[:size]
    for step, state in found[0].items():
        for path, tensor in state["tensors"].items():
            of_all = [of_rank[step]["tensors"][path] for of_rank in found]
            if not all(torch.equal(tensor, other) for other in of_all):
                assert path.startswith("gradients"), path  # that each rank adds up by itself
                state["tensors"][path] = sum(of_all) / size
    return found[0]


def events(out: Path, name: str) -> list[dict[str, Any]]:
    return [e for e in read_telemetry(out / "telemetry.jsonl").records if e["event"] == name]


MOVES = (
    ("fsdp2", 2, "fsdp2", 4),
    ("fsdp2", 4, "fsdp2", 2),
    ("fsdp2", 2, "plain", 1),
    ("plain", 1, "fsdp2", 2),
    ("ddp", 4, "ddp", 2),
    ("ddp", 2, "plain", 1),
    ("plain", 1, "ddp", 4),
    ("tp", 2, "fsdp2", 2),
    ("fsdp2", 4, "tp", 2),
    ("hsdp", 4, "fsdp2", 2),
    ("fsdp2 and tp", 4, "plain", 1),
    ("fsdp2", 2, "fsdp2 and tp", 4),
)


@ranks(4)
def check_another_number_of_ranks_takes_up_the_same_bits_and_goes_on(out: Path) -> None:
    for before, old, after, new in MOVES:
        where = out / f"{before} {old} {after} {new}"
        states = taken_by(before, old, where)
        seen = None
        if dist.get_rank() < new:
            run = Run(after, new, where / "second", where / "kept")
            assert run.monitor.resume() == 6, where.name
            assert_same(run.state(), states[6])
            seen = run.generators()
            run.train(13)
            assert all(run.verdicts), where.name
            assert sorted(run.states) == list(range(6, 14))
        all_seen = [s for s in gathered(seen) if s is not None]
        assert all(len(set(kind)) == new for kind in zip(*all_seen, strict=True)), where.name
        if dist.get_rank() < old:
            run = Run(before, old, where / "third", where / "kept")
            assert run.monitor.resume() == 12, where.name
            run.monitor.finalize()
        gathered(None)
        assert all_steps_in(where / "kept") == [10, 12], where.name
        folders = {p.name for p in (where / "kept").glob("rank_*")}
        assert folders == {f"rank_{rank:05d}" for rank in range(new) if new > 1}, where.name


@ranks(4)
def check_a_part_that_is_damaged_or_missing_sends_all_to_the_older_snapshot(out: Path) -> None:
    for fault in ("damaged", "missing"):
        where = out / fault
        states = taken_by("fsdp2", 4, where)
        bad = folder_of(where / "kept", 3) / "step_000000006.safetensors"
        if dist.get_rank() == 0:
            spoil(bad, fault)
        gathered(None)
        if dist.get_rank() < 2:
            run = Run("fsdp2", 2, where / "second", where / "kept")
            assert run.monitor.resume() == 4
            assert_same(run.state(), states[4])
            run.monitor.finalize()
        told = gathered(dropped_events(where / "second")) if dist.get_rank() < 2 else gathered([])
        assert [e["step"] for of_rank in told for e in of_rank] == [6]
        assert str(bad) in str(told)


def spoil(file: Path, fault: str) -> None:
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    if fault == "missing":
        file.unlink()
    else:
        file.write_bytes(data)


def dropped_events(out: Path) -> list[dict[str, Any]]:
    rank = dist.get_rank()
    return events(out / f"rank_{rank:05d}" if rank else out, "snapshot_dropped")


@ranks(4)
def check_a_run_that_was_killed_while_it_wrote_leaves_a_snapshot_of_all_parts(out: Path) -> None:
    """The four ranks' last one, until there is one of which both of the two have their part."""
    states = taken_by("fsdp2", 4, out)
    inner = snapshot_file.write_pages

    def write_pages(path: Path, pages: Any) -> int:
        if dist.get_rank() == 1:
            raise OSError("no space left")
        return inner(path, pages)

    if dist.get_rank() < 2:
        snapshot_file.write_pages = write_pages
        try:
            run = Run("fsdp2", 2, out / "second", out / "kept", depth=1)
            assert run.monitor.resume() == 6
            run.train(13)
        finally:
            snapshot_file.write_pages = inner
    gathered(None)
    assert 12 in all_steps_in(out / "kept")
    for size in (4, 1, 2):
        if dist.get_rank() < size:
            kind = "plain" if size == 1 else "fsdp2"
            run = Run(kind, size, out / f"again {size}", out / "kept")
            assert run.monitor.resume() == 6
            assert_same(run.state(), states[6])
            run.monitor.finalize()
        gathered(None)
        assert all_steps_in(out / "kept")[-1] == 6  # the others are set aside


@ranks(4)
def check_gradients_that_are_being_added_up_go_along(out: Path) -> None:
    moves = (("fsdp2", 4, "fsdp2", 2), ("fsdp2", 2, "plain", 1), ("ddp", 2, "ddp", 4))
    for before, old, after, new in moves:
        where = out / f"{old} {new}"
        states = taken_by(before, old, where, to=9, accumulation=4)
        assert any(path.startswith("gradients") for path in states[6]["tensors"])
        if dist.get_rank() < new:
            run = Run(after, new, where / "second", where / "kept")
            assert run.monitor.resume() == 6
            assert_same(run.state(), states[6])
            run.monitor.finalize()
        gathered(None)


@ranks(4)
def check_what_cannot_be_split_anew_is_refused_by_name_on_all_ranks(out: Path) -> None:
    def add_odd(run: Run) -> None:
        """A state that is no moment: a number for each row, as Adafactor has."""
        p = run.model.up.weight
        run.optimizer.state[p]["row"] = local_part(p).detach().sum(1)

    if dist.get_rank() < 2:
        run = Run("fsdp2", 2, out / "first", out / "kept")
        run.optimizer.register_step_post_hook(lambda *_: add_odd(run))
        run.train(7)
    gathered(None)
    if dist.get_rank() < 4:
        run = Run("fsdp2", 4, out / "second", out / "kept")
        with pytest.raises(ValueError, match=r"optimizer\.state\.1\.row of shape .*accepted"):
            run.monitor.resume()
        run.monitor.finalize()
    gathered(None)
    if dist.get_rank() < 2:
        run = Run("fsdp2", 2, out / "third", out / "kept")
        assert run.monitor.resume() == 6  # as it was split, it is taken as it is
        run.monitor.finalize()
