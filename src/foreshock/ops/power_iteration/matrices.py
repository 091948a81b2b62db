"""How a weight is read as a matrix: which dimension is the rows, and what lies in a row."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from foreshock.ops._tensors import FLOATING_DTYPES, local_tensors

DTYPES = FLOATING_DTYPES[:4]


class Layout(NamedTuple):
    """The shape of a weight and the order that its dimensions are read in.

    The first in `order` is the rows; the others together are the columns, slowest first. A row
    must be read as a whole, so it is what lies together in memory: of a transposed matrix W^T is
    read, and the columns of a channels-last convolution come in the order of memory. Neither
    changes a singular value.
    """

    shape: tuple[int, ...]
    order: tuple[int, ...]

    @property
    def rows(self) -> int:
        return self.shape[self.order[0]]

    @property
    def columns(self) -> int:
        return math.prod(self.shape[d] for d in self.order[1:])


def layout_of(weight: torch.Tensor) -> Layout:
    """How a tensor of two or more dimensions is read."""
    shape, strides = tuple(weight.shape), weight.stride()
    dims = range(weight.dim())
    if weight.dim() == 2:
        inner = min((1, 0), key=lambda d: (shape[d] <= 1, strides[d] != 1, strides[d]))
        return Layout(shape, (1 - inner, inner))
    if math.prod(shape[1:]) == 1:  # a single column is better read as a single row
        return Layout(shape, (*dims[1:], 0))
    return Layout(shape, (0, *sorted(dims[1:], key=lambda d: (shape[d] == 1, -strides[d]))))


def as_matrix(weight: torch.Tensor, layout: Layout) -> torch.Tensor:
    """(rows, columns): a view wherever one can be had."""
    return weight.detach().permute(layout.order).reshape(layout.rows, layout.columns)


def column_strides(weight: torch.Tensor, layout: Layout) -> list[tuple[int, int]]:
    """(size, stride) of what a row consists of, slowest first; neighbours that can be are one."""
    merged: list[tuple[int, int]] = []
    for d in layout.order[1:]:
        size, stride = weight.shape[d], weight.stride(d)
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            size *= merged.pop()[0]
        merged.append((size, stride))
    return merged


def column_offsets(strides: Sequence[tuple[int, int]]) -> torch.Tensor:
    """(columns,) int64: where the elements of a row lie, from its first."""
    offsets = torch.zeros(1, dtype=torch.int64)
    for size, stride in strides:
        offsets = (offsets[:, None] + stride * torch.arange(size)).flatten()
    return offsets


def gathered_columns(weight: torch.Tensor, layout: Layout) -> torch.Tensor | None:
    """`column_offsets` where the elements of a row do not lie next to each other; else None."""
    strides = column_strides(weight, layout)
    if not strides or (len(strides) == 1 and strides[0][1] == 1):
        return None
    return column_offsets(strides)


def select_matrices(
    weights: Iterable[torch.Tensor | None] | torch.Tensor,
) -> tuple[list[torch.Tensor | None], list[int]]:
    """The weights that this process holds, and the places of those with two or more dimensions.

    Raises:
        TypeError, ValueError: naming the place in `weights`, what stands there and what may.
    """
    local = local_tensors(weights, DTYPES, "weights")
    return local, [i for i, w in enumerate(local) if w is not None and w.dim() >= 2]
