"""Snapshots on disk as torch.distributed.checkpoint reads them, onto whatever ranks there are."""

from __future__ import annotations

import contextlib
import math
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from foreshock.distributed_part import Chunk
from foreshock.guard.parts import Parts, all_steps_in, find_parts
from foreshock.guard.snapshot_file import Box, DamagedFile, read_boxes

_Size = tuple[int, ...]


class SnapshotReader(StorageReader):
    """Reads a snapshot that a guard has written, for `torch.distributed.checkpoint.load`.

    The names are those of the state: `parameters.NAME`, `buffers.NAME`, `optimizer.state.I.KEY`,
    and NAME.PATH for what was registered under a name. Tensors are put together from the parts of
    all ranks, or cut anew; what no rank holds but one part of a sum is not there. All else that is
    in a snapshot is for `Monitor.resume` alone. Nothing that is read is ever run: torch's own
    `FileSystemReader` would load a pickle.

    >>> state = {"parameters": dict(model.named_parameters())}
    >>> torch.distributed.checkpoint.load(state, storage_reader=SnapshotReader("snapshots"))

    Args:
        path: a directory of snapshots, `guard.persist_dir`.
        step: of the snapshot; None: the newest of which all parts are there.
    Raises:
        FileNotFoundError: there is none; while loading, as all of the following.
        DamagedFile: naming the file that is missing, or is not what was written.
    Cost:
        A look at the headers of all parts, one read of each part that something is taken from, for
        its checksum, and one of what is taken.
    """

    def __init__(self, path: str | os.PathLike[str], step: int | None = None) -> None:
        super().__init__()
        self._path = Path(path)
        self._step = step
        self._parts: Parts | None = None
        self._checked: set[int] = set()
        self._places: dict[tuple[str, _Size], int] = {}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begins anew."""
        if checkpoint_id is not None:
            self._path, self._parts = Path(checkpoint_id), None
            self._checked = set()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The tensors of the snapshot, and which boxes of them there are."""
        if self._parts is None:
            self._parts = self._find()
        self._places = {}
        found = _boxes_by_name(self._parts)
        whole = {name: (of, boxes) for name, (of, boxes) in found.items() if _covers(of[1], boxes)}
        for name, (_, boxes) in whole.items():
            self._places.update({(name, offsets): rank for offsets, (rank, _) in boxes.items()})
        return Metadata(
            {
                name: TensorStorageMetadata(
                    TensorProperties(dtype),
                    torch.Size(shape),
                    [_chunk(offsets, sizes) for offsets, (_, sizes) in boxes.items()],
                )
                for name, ((dtype, shape), boxes) in whole.items()
            }
        )

    def _find(self) -> Parts:
        if self._step is not None:
            return find_parts(self._path, self._step)
        steps = all_steps_in(self._path)
        if not steps:
            raise FileNotFoundError(f"there are no snapshots in {str(self._path)!r}")
        for step in reversed(steps[1:]):
            with contextlib.suppress(DamagedFile):
                return find_parts(self._path, step)
        return find_parts(self._path, steps[0])

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing is left to be done."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """As they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Reads what the plan asks for, part by part, each of which is checked before."""
        assert self._parts is not None
        of_rank: dict[int, list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            at = item.storage_index
            of_rank[self._places[at.fqn, tuple(at.offset or ())]].append(item)
        self._parts.check(sorted(of_rank.keys() - self._checked))
        self._checked |= of_rank.keys()
        for rank, items in of_rank.items():
            found = read_boxes(self._parts.files[rank], map(_box, items))
            for item, values in zip(items, found, strict=True):
                target = planner.resolve_tensor(item).detach()
                target.copy_(values)
                planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether it is a directory."""
        return Path(checkpoint_id).is_dir()


def fill(parts: Parts, wanted: Mapping[str, tuple[Chunk, torch.Tensor]]) -> None:
    """Reads boxes of tensors, cut anew by the planner of torch.distributed.checkpoint.

    Args:
        parts: read through already.
        wanted: by path, which box, and the memory for it.
    Raises:
        ValueError: naming the tensor that the parts do not make up.
    """
    reader = SnapshotReader(parts.files[0].parent, parts.step)
    reader._parts, reader._checked = parts, set(range(parts.ranks))
    stored = reader.read_metadata().state_dict_metadata
    items: list[ReadItem] = []
    for path, (chunk, _) in wanted.items():
        tensor = stored.get(path)
        if not isinstance(tensor, TensorStorageMetadata):
            raise ValueError(
                f"{path} cannot be put together from the parts of {parts.ranks} ranks; accepted: "
                "as many ranks and the same way of splitting as when they were taken"
            )
        if chunk.offsets is not None:
            boxes = [_chunk(chunk.offsets, chunk.sizes)]
            items += create_read_items_for_chunk_list(path, tensor, boxes)
    memory = {path: tensor for path, (_, tensor) in wanted.items()}
    reader.read_data(LoadPlan(items), _BoxPlanner(memory))


class _BoxPlanner(DefaultLoadPlanner):
    """Reads one box of each tensor, of which no whole is here."""

    def __init__(self, memory: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self._memory = memory

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        return self._memory[index.fqn]


_Boxes = dict[_Size, tuple[int, _Size]]
"""By their offsets: the rank that has it, and its sizes."""


def _boxes_by_name(parts: Parts) -> dict[str, tuple[tuple[torch.dtype, _Size], _Boxes]]:
    """Type and shape of each tensor, and its boxes, each of one of the ranks that have it."""
    found: dict[str, tuple[tuple[torch.dtype, _Size], _Boxes]] = {}
    for rank, header in enumerate(parts.headers):
        for name, (dtype, sizes) in header.tensors.items():
            chunk = header.chunks.get(name)
            shape = sizes if chunk is None else chunk.shape
            _, boxes = found.setdefault(name, ((dtype, shape), {}))
            if chunk is None:
                boxes.setdefault((0,) * len(sizes), (rank, sizes))
            elif chunk.offsets is not None and (0 not in chunk.sizes or 0 in shape):
                boxes.setdefault(chunk.offsets, (rank, chunk.sizes))
    return found


def _covers(shape: _Size, boxes: _Boxes) -> bool:
    """Whether boxes fill a tensor, each element once."""
    if sum(math.prod(sizes) for _, sizes in boxes.values()) != math.prod(shape):
        return False
    ordered = sorted((offsets, sizes) for offsets, (_, sizes) in boxes.items())
    for i, (offsets, sizes) in enumerate(ordered):
        for others, more in ordered[i + 1 :]:
            if shape and others[0] >= offsets[0] + sizes[0]:
                break
            if _overlap(offsets, sizes, others, more):
                return False
    return bool(boxes)


def _overlap(begin: _Size, sizes: _Size, others: _Size, more: _Size) -> bool:
    sides = zip(begin, sizes, others, more, strict=True)
    return all(a < b + m and b < a + n for a, n, b, m in sides)


def _chunk(offsets: Sequence[int], sizes: Sequence[int]) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))


def _box(item: ReadItem) -> Box:
    return Box(item.storage_index.fqn, tuple(item.storage_offsets), tuple(item.lengths))
