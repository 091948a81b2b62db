"""power_iteration in CUDA C++ (csrc/power_iteration/cuda.cu): one read of every matrix."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from foreshock.ops._backend import load_kernels
from foreshock.ops._device import bind_launch, why_no_cuda
from foreshock.ops._tensors import DTYPE_CODES
from foreshock.ops.power_iteration.device_table import SEGMENT_BYTES, DeviceTable, Shape, sum_bytes
from foreshock.ops.power_iteration.matrices import DTYPES, Layout

USUAL, CUT, LONGER = range(3)  # as in TaskCounts of csrc/power_iteration/kernel.h


def why_unavailable(device_type: str) -> str | None:
    """What keeps this implementation from tensors of a device; None if nothing does."""
    return why_no_cuda(device_type)


@functools.cache
def _load_kernels(index: int) -> tuple[Any, int]:
    """`advance_cuda`, its machine code loaded: that must not be left to a graph's capture.

    And what rows it reads whole on that device; see `DeviceTable`.
    """
    kernels = load_kernels()
    if isinstance(kernels, str):
        raise RuntimeError(kernels)
    advance_cuda = kernels.power_iteration_advance_cuda
    with torch.cuda.device(index):
        advance_cuda(0, 0)
        return advance_cuda, kernels.power_iteration_cuda_whole_bytes()


def key_of(shape: Shape) -> tuple[int, int]:
    """Element type, and how long the rows are."""
    is_longer = shape.columns * sum_bytes(shape.dtype) > SEGMENT_BYTES
    return DTYPE_CODES[shape.dtype], CUT if shape.is_cut else LONGER if is_longer else USUAL


def make_plan(
    weights: Sequence[Tensor],
    vectors: Tensor,
    packed: Tensor,
    whole_bytes: int,
    layouts: Sequence[Layout] | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """The words of a `DevicePlan` (csrc/power_iteration/kernel.h), and the memory it names."""
    table = DeviceTable(weights, packed.device, whole_bytes, key_of, layouts)
    counts = {kind.key: kind.task_count for kind in table.kinds}
    sizes = [3 * table.tasks, 2 * table.chunks, table.partial_words, table.dots_words]
    scratch = packed.new_empty(sum(sizes) + vectors.shape[1])
    parts = scratch.split([*sizes, vectors.shape[1]])
    named = [table.rows, table.owners, table.chunk_owners, table.tickets, *parts, *vectors, packed]
    words = [memory.data_ptr() for memory in named] + [table.chunks]
    for dtype in DTYPES:
        words += [counts.get((DTYPE_CODES[dtype], length), 0) for length in (USUAL, CUT, LONGER)]
    return torch.tensor(words, dtype=torch.int64), [table.words, scratch, vectors, packed]


def bind(
    weights: Sequence[Tensor],
    vectors: Tensor,
    packed: Tensor,
    layouts: Sequence[Layout] | None = None,
) -> Callable[[], object]:
    """Returns a call that passes over these weights once; see `cpu.bind`.

    On the current stream it launches one kernel for each dtype among the weights, up to two more
    where there are rows of more than 8192 elements (4096 of float64), and one at the end; it may be
    captured into a graph, for which it must be kept. Two calls at the same time on different
    streams would write to the same memory. Rows of more than 16384 elements (8192) are read twice,
    and of half as many where a block has less than 130 KiB of shared memory.
    Rows that do not begin at multiples of 16 bytes are read more slowly, element by element.

    It owns what it needs but the weights' memory: up to 6 % of that, and 2 % where matrices are
    large.
    """
    if not weights:
        return lambda: None
    advance_cuda, whole_bytes = _load_kernels(packed.get_device())
    plan, memory = make_plan(weights, vectors, packed, whole_bytes, layouts)
    launch = functools.partial(advance_cuda, plan.data_ptr())
    call = bind_launch(launch, memory, packed.device)
    call.owns = plan  # type: ignore[attr-defined]
    return call
