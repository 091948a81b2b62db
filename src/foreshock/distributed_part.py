"""What of a distributed tensor this process holds, and who else holds the same."""

from __future__ import annotations

import functools
import math
import sys
from typing import Any, NamedTuple

import torch

_WHOLE = frozenset({torch.Tensor, torch.nn.Parameter})


def is_distributed(tensor: object) -> bool:
    """Whether this is a DTensor."""
    if type(tensor) in _WHOLE:
        return False
    distributed: Any = sys.modules.get("torch.distributed.tensor")
    return distributed is not None and isinstance(tensor, distributed.DTensor)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself; of a DTensor the part in this process, which shares its memory."""
    if type(tensor) in _WHOLE:
        return tensor
    if is_distributed(tensor):
        with torch.no_grad():
            tensor = tensor.to_local()  # type: ignore[attr-defined]
    return _arrived(tensor)


def _arrived(tensor: Any) -> torch.Tensor:
    """What a collective that is still under way will have brought."""
    collectives: Any = sys.modules.get("torch.distributed._functional_collectives")
    is_on_its_way = collectives is not None and isinstance(
        tensor, collectives.AsyncCollectiveTensor
    )
    arrived: torch.Tensor = tensor.wait() if is_on_its_way else tensor
    return arrived


class Chunk(NamedTuple):
    """Which box of a distributed tensor this process holds."""

    shape: tuple[int, ...]
    """Of the tensor."""
    offsets: tuple[int, ...] | None
    """Where the box begins; None: what is held is none, but a sum that is still to be added up over
    ranks, or nothing, by a process that is not in the mesh."""
    sizes: tuple[int, ...]


def chunk_of(tensor: torch.Tensor) -> Chunk | None:
    """What of a DTensor is in this process; None of any other tensor.

    Cost: nothing is sent; some ten microseconds, of a layout that was asked for before one or two.
    """
    if not is_distributed(tensor):
        return None
    shape = tuple(tensor.shape)
    if any(p.is_partial() for p in _placements(tensor)):
        return Chunk(shape, None, ())
    return _chunk(shape, tensor.device_mesh, _placements(tensor))  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=4096)
def _chunk(shape: tuple[int, ...], mesh: Any, placements: tuple[Any, ...]) -> Chunk:
    # Of torch's own, this is what torch.distributed.checkpoint asks too.
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if mesh.get_coordinate() is None:
        return Chunk(shape, None, ())
    sizes, offsets = compute_local_shape_and_global_offset(shape, mesh, placements)
    return Chunk(shape, tuple(offsets), tuple(sizes))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself; of a DTensor all of it, for which all ranks of its mesh must ask."""
    if type(tensor) in _WHOLE:
        return tensor
    if is_distributed(tensor):
        with torch.no_grad():
            tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return _arrived(tensor)


def is_split(tensor: torch.Tensor) -> bool:
    """Whether no process holds all of it."""
    return is_distributed(tensor) and not all(p.is_replicate() for p in _placements(tensor))


def how_split(tensor: torch.Tensor) -> str:
    """How a tensor is spread over ranks, in words that are the same on all of them."""
    if not is_distributed(tensor):
        return ""
    return f"{tuple(tensor.device_mesh.shape)} {_placements(tensor)}"  # type: ignore[attr-defined]


def distinct_parts(tensor: torch.Tensor) -> int:
    """Different parts that a tensor is split into; 1 for one that every rank holds as a whole."""
    if not is_distributed(tensor):
        return 1
    return math.prod(tensor.device_mesh.size(dim) for dim in split_dims(tensor))  # type: ignore[attr-defined]


def split_dims(tensor: torch.Tensor) -> list[int]:
    """Dimensions of its mesh along which the ranks hold different parts."""
    return [dim for dim, p in enumerate(_placements(tensor)) if not p.is_replicate()]


def copied_dims(tensor: torch.Tensor) -> list[int]:
    """Dimensions of its mesh along which the ranks hold copies."""
    return [dim for dim, p in enumerate(_placements(tensor)) if p.is_replicate()]


def _placements(tensor: Any) -> tuple[Any, ...]:
    placements: tuple[Any, ...] = tensor.placements
    return placements
