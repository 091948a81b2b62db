"""What of a distributed tensor this process holds, and who else holds the same."""

from __future__ import annotations

import math
import sys
from typing import Any

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
