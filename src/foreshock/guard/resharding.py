"""A snapshot that was taken by other ranks, or split in another way, as the part of this rank."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from foreshock.distributed_part import Chunk, chunk_of, is_distributed
from foreshock.guard import snapshot_file
from foreshock.guard.containers import copy_with, tensors_in
from foreshock.guard.parts import Parts
from foreshock.guard.snapshot_file import Box, Content, Header, read_boxes
from foreshock.guard.state import GradientState, OptimizerState, Part, bare


class UnknownSplit(Exception):
    """Nothing says how a tensor is split.

    Args:
        is_split_here: whether it belongs to a parameter that is split here.
    """

    def __init__(self, *, is_split_here: bool) -> None:
        super().__init__()
        self.is_split_here = is_split_here


class Layout:
    """Which part of each tensor of the state belongs on this rank, by the state that is here.

    Moments that an optimizer has not made yet are split as their parameters are, and so are
    gradients.

    Args:
        parts: of the state, by name.
    """

    def __init__(self, parts: Mapping[str, Part]) -> None:
        self._parts = parts
        self._found: dict[str, dict[str, torch.Tensor]] = {}
        parameters = self._live("parameters")
        self._has_split = any(map(is_distributed, parameters.values()))
        self._names = {_bare_path(path): path for path in [*parameters, *self._live("buffers")]}

    def _live(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of a part of the state, by path."""
        if name not in self._found:
            self._found[name] = dict(tensors_in(self._parts[name].live(), name))
        return self._found[name]

    def chunk(self, path: str, shape: tuple[int, ...]) -> Chunk | None:
        """What of a tensor of this shape belongs here; None: all of it.

        Raises:
            UnknownSplit: there is no such tensor here to go by.
            ValueError: the tensor has another shape here.
        """
        name = path.partition(".")[0]
        live = self._live(name) if name in self._parts else {}
        tensor = live.get(path, live.get(self._names.get(_bare_path(path), "")))
        if tensor is None:
            return self._chunk_like_parameter(path, shape)
        chunk = chunk_of(tensor)
        if chunk is not None and chunk.shape != shape:
            raise ValueError(
                f"{path} has shape {chunk.shape} here and {shape} in the snapshot; accepted: the "
                "same model and state"
            )
        return chunk

    def _chunk_like_parameter(self, path: str, shape: tuple[int, ...]) -> Chunk | None:
        name, _, rest = path.partition(".")
        part = self._parts.get(name)
        parameter = None
        if isinstance(part, OptimizerState | GradientState):
            parameter = part.parameter_of(rest)
        if parameter is None:
            raise UnknownSplit(is_split_here=False)
        chunk = chunk_of(parameter)
        if chunk is not None and chunk.shape != shape:
            raise UnknownSplit(is_split_here=math.prod(shape) > 1)
        return chunk

    def is_that_of(self, header: Header) -> bool:
        """Whether each tensor is split here as it is in a part of this rank; unknown ones are."""
        if not header.chunks and not self._has_split:
            return True
        for path, (_, sizes) in header.tensors.items():
            there = header.chunks.get(path)
            shape = sizes if there is None else there.shape
            try:
                here = self.chunk(path, shape)
            except UnknownSplit:
                continue
            except ValueError:
                return True  # of another model, which is refused by name
            is_sum = there is not None and there.offsets is None
            if not is_sum and (here or _whole(shape)) != (there or _whole(shape)):
                return False
        return True


def _bare_path(path: str) -> str:
    part, _, name = path.partition(".")
    return f"{part}.{bare(name)}"


def with_names_of(here: Mapping[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """What was saved of a state, with the names of a model that is wrapped in another way.

    Args:
        here: the parameters and buffers by name, as they are called here.
        saved: what each part of the state was.
    """
    names = {bare(name): name for name in here}

    def named(name: str) -> str:
        return name if name in here else names.get(bare(name), name)

    gradients = saved["gradients"]
    return saved | {
        **{
            part: {named(name): value for name, value in saved[part].items()}
            for part in ("parameters", "buffers")
        },
        "gradients": gradients
        | {
            "present": list(map(named, gradients["present"])),
            "values": {named(name): value for name, value in gradients["values"].items()},
        },
    }


def assemble(parts: Parts, rank: int, layout: Layout) -> tuple[Path, Content]:
    """Makes the part of this rank from those of the ranks that took the snapshot.

    What is split comes from all that have some of it. Gradients that the ranks were adding up each
    for itself are their mean, as DistributedDataParallel would make it. All else comes from the
    part of one of them, in turn; but random generators of a rank that was not there draw other
    numbers than any other, unless all of the ranks were drawing the same.

    Args:
        parts: of the snapshot, read through already.
        rank: this one.
        layout: of what belongs here.
    Returns:
        The file of the part that the rest is from, and the part.
    Raises:
        ValueError: naming the tensor that cannot be put together, or not be split as it is here.
    """
    origin = rank % parts.ranks
    file, header = parts.files[origin], parts.headers[origin]
    content = snapshot_file.read(file)
    shapes = {path: c.shape for h in parts.headers for path, c in h.chunks.items()}
    wanted: dict[str, tuple[Chunk, torch.Tensor]] = {}
    for path, tensor in tensors_in(content.tree["saved"]):
        here = _chunk_here(layout, path, shapes.get(path), tuple(tensor.shape))
        if here != header.chunks.get(path, _whole(tuple(tensor.shape))):
            wanted[path] = here, torch.empty(here.sizes, dtype=tensor.dtype)
    if wanted:
        # Not before it is needed: torch.distributed.checkpoint takes time to import.
        from foreshock.guard.snapshot_reader import fill

        fill(parts, wanted)
    filled = {path: tensor for path, (_, tensor) in wanted.items()}
    filled |= _mean_gradients(parts, content.tree["saved"], shapes)
    leaves = iter([filled.get(path, t) for path, t in tensors_in(content.tree["saved"])])
    saved = copy_with(content.tree["saved"], lambda _: next(leaves))
    if rank >= parts.ranks:
        saved["random"] = _fresh(saved["random"], parts, rank)
    return file, content._replace(tree={**content.tree, "saved": saved})


def _mean_gradients(
    parts: Parts, saved: Mapping[str, Any], split: Container[str]
) -> dict[str, torch.Tensor]:
    """Of gradients that each rank adds up by itself, before all of them take the mean."""
    values = tensors_in(saved["gradients"]["values"], "gradients.values")
    own = {path: t for path, t in values if path not in split and not t.is_sparse}
    boxes = [Box(path, (0,) * t.dim(), tuple(t.shape)) for path, t in own.items()]
    sums = {path: torch.zeros_like(t) for path, t in own.items()}
    differ = set[str]()
    for file in parts.files if boxes else ():
        for path, other in zip(own, read_boxes(file, boxes), strict=True):
            sums[path] += other
            if not torch.equal(own[path], other):
                differ.add(path)
    return {path: sums[path] / parts.ranks for path in differ}


def _chunk_here(
    layout: Layout, path: str, shape: tuple[int, ...] | None, sizes: tuple[int, ...]
) -> Chunk:
    try:
        here = layout.chunk(path, shape or sizes)
    except UnknownSplit as unknown:
        if unknown.is_split_here or (shape is not None and math.prod(shape) > 1):
            raise ValueError(
                f"{path} of shape {shape or sizes} belongs to what is split over ranks, and it is "
                "not known how it is to be split here; accepted: as many ranks and the same way "
                "of splitting as when it was taken, or a state of the parameter's own shape"
            ) from None
        here = None
    if here is None:
        return _whole(shape or sizes)
    return here if here.offsets is not None else Chunk(here.shape, None, (0,))


def _whole(shape: tuple[int, ...]) -> Chunk:
    return Chunk(shape, (0,) * len(shape), shape)


# ---- random generators


def _fresh(saved: Mapping[str, Any], parts: Parts, rank: int) -> Mapping[str, Any]:
    """The generators of a rank that has none in the snapshot."""
    box = Box("random.torch", (0,), tuple(saved["torch"].shape))
    states = [next(read_boxes(file, [box])) for file in parts.files]
    if len(states) > 1 and all(torch.equal(state, states[0]) for state in states):
        return saved
    seeds = (_seed(states[0], rank, kind) for kind in ("python", "numpy", "torch", "cuda"))
    python, numpy, on_host, on_device = seeds
    return {
        "python": random.Random(python).getstate(),
        "numpy": np.random.RandomState(numpy % 2**32).get_state(),
        "torch": torch.Generator().manual_seed(on_host).get_state(),
        "cuda": [
            torch.Generator(f"cuda:{i}").manual_seed(on_device + i).get_state()
            for i in range(torch.cuda.device_count() if saved["cuda"] else 0)
        ],
    }


def _seed(state: torch.Tensor, rank: int, kind: str) -> int:
    digest = hashlib.sha256(state.numpy().tobytes() + f"{kind} {rank}".encode()).digest()
    return int.from_bytes(digest[:7], "big")
