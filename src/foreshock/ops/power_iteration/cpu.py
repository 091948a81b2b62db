"""power_iteration in C++ (csrc/power_iteration/cpu.cpp), once for each instruction set."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from foreshock.ops._backend import active_isa, load_kernels
from foreshock.ops._tensors import DTYPE_CODES
from foreshock.ops.power_iteration.matrices import Layout, gathered_columns, layout_of


def why_unavailable(device_type: str) -> str | None:
    """What keeps this implementation from tensors of a device; None if nothing does."""
    if device_type != "cpu":
        return "reads the memory of the host only"
    kernels = load_kernels()
    return kernels if isinstance(kernels, str) else None


def _table(weights: Sequence[Tensor], layouts: Sequence[Layout]) -> tuple[Tensor, list[Tensor]]:
    """Rows of `Matrix` (csrc/power_iteration/kernel.h) as int64 words, and what they point to."""
    rows, owned = [], []
    first = 0
    for weight, layout in zip(weights, layouts, strict=True):
        offsets_address = 0
        if (offsets := gathered_columns(weight, layout)) is not None:
            owned.append(offsets)
            offsets_address = offsets.data_ptr()
        row_stride = weight.stride(layout.order[0])
        place = (weight.data_ptr(), layout.rows, layout.columns, row_stride, offsets_address)
        rows.append((*place, first, DTYPE_CODES[weight.dtype]))
        first += layout.columns
    return torch.tensor(rows, dtype=torch.int64).view(-1, 7), owned


def bind(
    weights: Sequence[Tensor],
    vectors: Tensor,
    packed: Tensor,
    layouts: Sequence[Layout] | None = None,
    isa: str | None = None,
) -> Callable[[], None]:
    """Returns a call that passes over these weights once and moves their vectors a step.

    Args:
        weights: M tensors of two or more dimensions.
        vectors: (2, N) contiguous float64, in place: v and, below it, the step before, for each
            matrix as many columns as its `Layout` says.
        packed: (M, 5) contiguous float64, for the result; see `SpectralStats.packed`.
        layouts: how each weight is read; None for what reads its memory best.
        isa: the instruction set; None for the active one.

    The call owns what it needs but the weights' memory, which the caller keeps alive.
    """
    kernels = load_kernels()
    if isinstance(kernels, str):
        raise RuntimeError(kernels)
    table, owned = _table(weights, layouts or [layout_of(weight) for weight in weights])
    plan_bytes = kernels.power_iteration_plan_bytes(table.data_ptr(), len(table))
    memory = torch.empty(plan_bytes + 64, dtype=torch.uint8)
    plan = memory.data_ptr() + -memory.data_ptr() % 64
    kernels.power_iteration_plan(table.data_ptr(), len(table), plan)
    v, previous = vectors[0].data_ptr(), vectors[1].data_ptr()
    advance = getattr(kernels, f"power_iteration_advance_{isa or active_isa()}")
    bound = functools.partial(advance, plan, v, previous, packed.data_ptr())
    bound.owns = (table, owned, memory, vectors, packed)  # type: ignore[attr-defined]
    return bound
