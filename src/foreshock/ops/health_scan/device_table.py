"""What both GPU implementations read: a table of the tensors in device memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from foreshock.ops._device import Int64s, as_words, upload
from foreshock.ops._tensors import DTYPE_CODES, FLOATING_DTYPES

# A row of the table, in int64 words; csrc/health_scan/cuda.cu and triton.py read it by position.
ADDRESS, NUMEL, DTYPE, CHUNK_NUMEL, FIRST_CHUNK, IS_STRIDED, SIZES = range(7)
MAX_DIMS = 4
STRIDES = SIZES + MAX_DIMS
COLUMNS = STRIDES + MAX_DIMS

# A chunk is what one block reads: short, so that few multiprocessors idle while the last ones end,
# but longer in large tensors, whose last block adds up the results of all chunks. The length
# depends on the tensor alone, so that its sums do not depend on the list it is in.
CHUNK_BYTES = 64 << 10
LARGE_CHUNK_BYTES = 256 << 10
LARGE_BYTES = 1 << 30

_ITEM_BYTES = np.array([dtype.itemsize for dtype in FLOATING_DTYPES])


class Kind(NamedTuple):
    """Chunks that the same code reads; their numbers are consecutive."""

    dtype: torch.dtype
    is_strided: bool
    first_chunk: int
    chunk_count: int


def coalesce(sizes: Sequence[int], strides: Sequence[int]) -> list[tuple[int, int]]:
    """The fewest (size, stride) that reach the same elements, innermost first.

    The order of elements is not kept. Dense memory becomes one dimension of stride 1; of a single
    element nothing remains.
    """
    merged: list[tuple[int, int]] = []
    for stride, size in sorted(zip(strides, sizes, strict=True)):
        if size == 1:
            continue
        if merged and stride == merged[-1][0] * merged[-1][1]:
            merged[-1] = (merged[-1][0] * size, merged[-1][1])
        else:
            merged.append((size, stride))
    return merged


class DeviceTable:
    """T > 0 tensors cut into C chunks, as a table uploaded without waiting for the device.

    A place with None or without elements has one chunk of nothing, so that each place has a block
    that writes its result. A tensor that keeps more than `MAX_DIMS` dimensions when coalesced is
    in the table as a dense copy, which `refresh_copies` renews.

    Attributes:
        rows: (T, COLUMNS) int64; owners: (C,) int32, whose each chunk is; tickets: (T,) int32 of
            zeros, which kernels leave as they find them. All on the device.
        kinds: the chunks that there is something to read of.
        memory: what must outlive the launches that use the table.
    Cost:
        On the host about 0.5 us a tensor, 3 us if it is not contiguous, and 50 us a table.
    """

    def __init__(self, tensors: Sequence[torch.Tensor | None], device: torch.device) -> None:
        self.copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        rows = self._describe(tensors)
        owners = self._deal_chunks(rows)
        parts = rows.ravel(), as_words(owners), as_words(np.zeros_like(rows[:, 0]))
        words = torch.empty(sum(map(len, parts)), dtype=torch.int64, device=device)
        upload(np.concatenate(parts), words)
        table, owner_words, ticket_words = torch.split(words, [len(part) for part in parts])
        self.rows = table.view(-1, COLUMNS)
        self.owners = owner_words.view(torch.int32)[: len(owners)]
        self.tickets = ticket_words.view(torch.int32)[: len(rows)]
        self.memory = [words, *(copy for copy, _ in self.copies)]

    def refresh_copies(self) -> None:
        """Copies the tensors of too many dimensions as they are now."""
        for copy, source in self.copies:
            copy.copy_(source)

    # In NumPy, because its small operations cost a fifth of torch's, and this is done anew whenever
    # gradients have moved.
    def _describe(self, tensors: Sequence[torch.Tensor | None]) -> Int64s:
        """The table without its chunks."""
        addresses, numels, codes = [], [], []
        strided: dict[int, list[tuple[int, int]]] = {}
        for i, tensor in enumerate(tensors):
            numel = 0 if tensor is None else tensor.numel()
            numels.append(numel)
            if tensor is None or numel == 0:
                addresses.append(0)
                codes.append(0)
                continue
            if not tensor.is_contiguous():
                dims = coalesce(tensor.shape, tensor.stride())
                if len(dims) > MAX_DIMS:
                    tensor = self._copy_of(tensor)
                elif dims[1:] or dims[0][1] != 1:
                    strided[i] = dims + [(1, 0)] * (MAX_DIMS - len(dims))
            addresses.append(tensor.data_ptr())
            codes.append(DTYPE_CODES[tensor.dtype])
        rows = np.zeros((len(numels), COLUMNS), np.int64)
        rows[:, ADDRESS], rows[:, NUMEL], rows[:, DTYPE] = addresses, numels, codes
        if strided:
            places, places_dims = list(strided), np.array(list(strided.values()))
            rows[places, IS_STRIDED] = 1
            rows[places, SIZES:STRIDES] = places_dims[:, :, 0]
            rows[places, STRIDES:] = places_dims[:, :, 1]
        return rows

    def _copy_of(self, tensor: torch.Tensor) -> torch.Tensor:
        source = tensor.detach()
        copy = torch.empty_like(source, memory_format=torch.contiguous_format)
        self.copies.append((copy, source))
        return copy

    def _deal_chunks(self, rows: Int64s) -> Int64s:
        """Completes the table with chunks, numbered kind by kind, and returns the owner of each."""
        numel, dtype = rows[:, NUMEL], rows[:, DTYPE]
        item_bytes = _ITEM_BYTES[dtype]
        is_large = numel * item_bytes > LARGE_BYTES
        chunk_numel = np.where(is_large, LARGE_CHUNK_BYTES, CHUNK_BYTES) // item_bytes
        chunks = -(-numel // chunk_numel)
        kind = 2 * dtype + rows[:, IS_STRIDED]

        self.kinds = []
        first = 0
        for k, count in enumerate(np.bincount(kind, chunks).astype(int).tolist()):
            if count:
                self.kinds.append(Kind(FLOATING_DTYPES[k // 2], bool(k % 2), first, count))
                first += count

        # Places without elements come last, so that they do not part the chunks of a kind.
        order = np.where(numel == 0, 2 * len(FLOATING_DTYPES), kind).argsort(kind="stable")
        dealt = np.maximum(chunks, 1)[order]
        rows[:, CHUNK_NUMEL] = chunk_numel
        rows[order, FIRST_CHUNK] = dealt.cumsum() - dealt
        return order.repeat(dealt)
