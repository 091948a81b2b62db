"""What both GPU implementations read: the matrices, cut into tasks, as a table in device memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from foreshock.ops._device import Int64s, as_words, upload
from foreshock.ops._tensors import DTYPE_CODES
from foreshock.ops.power_iteration.matrices import Layout, gathered_columns, layout_of

# A row of the table, in int64 words; csrc/power_iteration/device.cuh and triton.py know them by
# position. The first seven are a `Matrix` of csrc/power_iteration/kernel.h.
ADDRESS, ROWS, COLUMNS, ROW_STRIDE, COLUMN_OFFSETS, FIRST, DTYPE = range(7)
BLOCK_ROWS, SEGMENT_COLUMNS, SEGMENTS, FIRST_TASK, TASKS, FIRST_CHUNK, CHUNKS = range(7, 14)
PARTIAL, PARTIAL_COLUMNS, DOTS, IS_ALIGNED = range(14, 18)
WORDS = 18

# A block of rows is what one task reads: enough of them in a matrix to occupy a device, each long
# enough to be worth starting, and of enough rows that its part of y is small beside it. It depends
# on the matrix alone, so that its sums do not depend on the list it is in.
BLOCKS = 128
MIN_BLOCK_BYTES = 128 << 10
MAX_BLOCK_BYTES = 2 << 20
MIN_BLOCK_ROWS = 32
MAX_BLOCK_ROWS = 1024  # over which float sums would lose too much
MAX_CUT_ROWS = 64  # whose u a block has room for, where rows are in segments

SEGMENT_BYTES = 32 << 10  # of a float vector, which the threads of one block hold
CHUNK_COLUMNS = 64  # that a block adds up at the end


class Shape(NamedTuple):
    """What decides which code reads a matrix."""

    dtype: torch.dtype
    columns: int  # of a row, or of a segment of it
    is_aligned: bool  # whether whole rows are made of aligned vectors of 16 bytes
    is_cut: bool  # whether rows are in segments


class Kind(NamedTuple):
    """Tasks that the same code reads; their numbers are consecutive."""

    key: Any
    first_task: int
    task_count: int


def sum_bytes(dtype: torch.dtype) -> int:
    """What vectors are multiplied and summed in while the weights are read."""
    return 8 if dtype is torch.float64 else 4


def rows_of_block(rows: int, row_bytes: int) -> int:
    """How many rows a task reads."""
    wanted = min(max(rows * row_bytes // BLOCKS, MIN_BLOCK_BYTES), MAX_BLOCK_BYTES)
    return min(max(-(-wanted // row_bytes), MIN_BLOCK_ROWS), MAX_BLOCK_ROWS)


def segment_columns(columns: int, dtype: torch.dtype, whole_bytes: int) -> int:
    """How many columns a task reads: all, or equal parts of them that begin on a boundary."""
    if columns * sum_bytes(dtype) <= whole_bytes:
        return columns
    segments = -(-columns * sum_bytes(dtype) // SEGMENT_BYTES)
    return -(-columns // (16 * segments)) * 16


class DeviceTable:
    """M > 0 matrices cut into tasks, uploaded without waiting for the device.

    Args:
        weights: the matrices.
        device: theirs.
        whole_bytes: rows as long as float vectors of so many bytes are read whole.
        key_of: of what is read by the same code; kinds are in the order of their keys.
        layouts: how each is read; None for what reads its memory best.

    Attributes:
        rows: (M, WORDS) int64; owners: int32, for each task its matrix; chunk_owners: int32, the
            same for each chunk of `CHUNK_COLUMNS`; tickets: (M,) int32 of zeros, which kernels
            leave as they find them. All on the device.
        kinds: the tasks by kind. A matrix without elements has none, but one chunk.
        tasks, chunks: how many there are.
        partial_words, dots_words: float64 words that the parts of y and of u need.
        words: the memory of it all.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        device: torch.device,
        whole_bytes: int,
        key_of: Callable[[Shape], Any],
        layouts: Sequence[Layout] | None = None,
    ) -> None:
        self._whole_bytes = whole_bytes
        self.partial_words = self.dots_words = 0
        first = 0
        rows, keys, offsets = [], [], []
        layouts = layouts or [layout_of(weight) for weight in weights]
        for weight, layout in zip(weights, layouts, strict=True):
            gathered = gathered_columns(weight, layout)
            row, shape = self._describe(weight, layout, first, gathered is not None)
            rows.append(row)
            keys.append(key_of(shape))
            offsets.append(gathered)
            first += layout.columns
        table = np.array(rows, np.int64)
        owners = self._deal_tasks(table, keys)
        chunk_owners = _deal(
            table, FIRST_CHUNK, np.maximum(-(-table[:, COLUMNS] // CHUNK_COLUMNS), 1)
        )
        table[:, CHUNKS] = np.bincount(chunk_owners, minlength=len(table))
        self.tasks, self.chunks = len(owners), len(chunk_owners)
        self._upload(table, owners, chunk_owners, offsets, device)

    def _describe(
        self, weight: Tensor, layout: Layout, first: int, is_gathered: bool
    ) -> tuple[list[int], Shape]:
        """A row of the table, without its tasks and chunks."""
        rows, columns, dtype = layout.rows, layout.columns, weight.dtype
        row_stride, item = weight.stride(layout.order[0]), dtype.itemsize
        address = weight.data_ptr()
        is_aligned = not is_gathered and address % 16 == 0
        is_aligned = is_aligned and (rows <= 1 or row_stride * item % 16 == 0)
        segment = segment_columns(columns, dtype, self._whole_bytes)
        segments = -(-columns // max(segment, 1))
        block_rows = rows_of_block(rows, max(columns, 1) * item)
        block_rows = min(block_rows, MAX_CUT_ROWS) if segments > 1 else block_rows
        blocks = -(-rows // block_rows)
        padded = -(-columns // 4) * 4
        words = dict.fromkeys(range(WORDS), 0) | {
            ADDRESS: address, ROWS: rows, COLUMNS: columns, ROW_STRIDE: row_stride, FIRST: first,
            DTYPE: DTYPE_CODES[dtype], BLOCK_ROWS: block_rows, SEGMENT_COLUMNS: segment,
            SEGMENTS: max(segments, 1), TASKS: blocks * segments, PARTIAL: self.partial_words,
            PARTIAL_COLUMNS: padded, DOTS: self.dots_words, IS_ALIGNED: int(is_aligned),
        }  # fmt: skip
        self.partial_words += blocks * padded * sum_bytes(dtype) // 8
        self.dots_words += segments * rows if segments > 1 else 0
        is_whole = is_aligned and columns * item % 16 == 0
        return list(words.values()), Shape(dtype, segment, is_whole, segments > 1)

    def _deal_tasks(self, table: Int64s, keys: list[Any]) -> Int64s:
        order = sorted(set(keys))
        places = np.array([order.index(key) for key in keys], np.int64)
        counts = np.bincount(places, table[:, TASKS]).astype(int).tolist()
        ends = np.cumsum(counts).tolist()
        self.kinds = [
            Kind(key, end - count, count)
            for key, end, count in zip(order, ends, counts, strict=True)
            if count
        ]
        return _deal(table, FIRST_TASK, table[:, TASKS], places.argsort(kind="stable"))

    def _upload(
        self,
        table: Int64s,
        owners: Int64s,
        chunk_owners: Int64s,
        offsets: list[Tensor | None],
        device: torch.device,
    ) -> None:
        numbers = [as_words(owners), as_words(chunk_owners), as_words(np.zeros_like(table[:, 0]))]
        gathered = [o.numpy() for o in offsets if o is not None]
        lengths = [table.size, *map(len, numbers), *map(len, gathered)]
        self.words = torch.empty(sum(lengths), dtype=torch.int64, device=device)
        parts = self.words.split(lengths)
        at = iter(parts[4:])
        table[:, COLUMN_OFFSETS] = [0 if o is None else next(at).data_ptr() for o in offsets]
        upload(np.concatenate([table.ravel(), *numbers, *gathered]), self.words)
        self.rows = parts[0].view(-1, WORDS)
        self.owners = parts[1].view(torch.int32)[: len(owners)]
        self.chunk_owners = parts[2].view(torch.int32)[: len(chunk_owners)]
        self.tickets = parts[3].view(torch.int32)[: len(table)]


def _deal(table: Int64s, column: int, counts: Int64s, order: Int64s | None = None) -> Int64s:
    """Numbers so many for each row, in an order, notes each one's first and returns all owners."""
    order = np.arange(len(table)) if order is None else order
    dealt = counts[order]
    table[order, column] = dealt.cumsum() - dealt
    return order.repeat(dealt)
