"""Host memory for the tensors of one snapshot: filled, scanned and summed up in one pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import xxhash

from foreshock.guard.inspection import can_scan, readable
from foreshock.host_read import read
from foreshock.ops import HealthScanner

_PIECE_BYTES = 1 << 20
"""What stays in a core's own cache from the copy to the scan and the checksum: measured between
128 KiB and 2 MiB, the copy with both then takes 1.3 times as long as without."""


class Filling(NamedTuple):
    """What a pass over an arena found."""

    nonfinite: list[int]
    """Which tensors have a value that is not finite."""
    digest: xxhash.xxh3_128
    """Of all bytes, in the order of memory."""


class _Form(NamedTuple):
    """What decides where a tensor lies, and how it is copied."""

    shape: torch.Size
    dtype: torch.dtype
    is_flat: bool


@dataclasses.dataclass
class _Piece:
    """Elements of one or more tensors that lie next to each other."""

    targets: list[torch.Tensor]
    sources: list[tuple[int, slice | None]]
    """For each target the tensor's place and its elements; None: all, whatever their order."""
    begin: int
    end: int
    scanned: list[int]
    """Which of the targets have a scan."""
    scanner: HealthScanner | None = None

    def find_nonfinite(self) -> list[int]:
        if not self.scanned:
            return []
        if self.scanner is None:
            views = [readable(self.targets[i]) for i in self.scanned]
            self.scanner = HealthScanner(views, recheck=False)
        counts = read(self.scanner().packed).view(np.int64)[:, 1:3]
        if not counts.any():
            return []
        return [self.sources[self.scanned[i]][0] for i in np.flatnonzero(counts.any(1))]


class Arena:
    """One block of host memory, in which copies of given tensors lie one after the other.

    Those with the largest elements come first, so that all are aligned without gaps.

    Args:
        tensors: dense ones, on any device; the memory is pinned if one is on a CUDA device.
    Raises:
        RuntimeError: there is not enough memory.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._forms = [_form(t) for t in tensors]
        self.is_pinned = any(t.device.type == "cuda" for t in tensors)
        size = sum(t.nbytes for t in tensors)
        self.memory = torch.empty(size, dtype=torch.uint8, pin_memory=self.is_pinned)
        self._bytes = self.memory.numpy().data
        self.views: list[torch.Tensor] = [self.memory] * len(tensors)
        """The copies, in the order of the tensors; contiguous."""
        self._flat = list(self.views)
        begin = 0
        for i in in_memory_order(tensors):
            of_tensor = self.memory[begin : begin + tensors[i].nbytes]
            self._flat[i] = of_tensor.view(tensors[i].dtype)
            self.views[i] = self._flat[i].view(tensors[i].shape)
            begin += tensors[i].nbytes
        self._pieces: list[_Piece] | None = None

    def fits(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether copies of these tensors lie in it just as those that it was made for do."""
        forms = self._forms
        return len(forms) == len(tensors) and all(
            form == _form(t) for form, t in zip(forms, tensors, strict=True)
        )

    def fill(self, tensors: Sequence[torch.Tensor]) -> Filling:
        """Copies the tensors in, from the CPU.

        Cost: one read of the tensors and one write; scan and checksum work from the cache.
        """
        return self._go_over(tensors)

    def look_over(self) -> Filling:
        """Scans and sums up what is in it already.

        Cost: one read.
        """
        return self._go_over(None)

    def _go_over(self, tensors: Sequence[torch.Tensor] | None) -> Filling:
        if self._pieces is None:
            self._pieces = self._cut()
        digest, nonfinite = xxhash.xxh3_128(), set[int]()
        flat = None if tensors is None else self._flattened(tensors)
        for piece in self._pieces:
            if flat is not None and piece.targets:
                sources = [flat[i] if part is None else flat[i][part] for i, part in piece.sources]
                torch._foreach_copy_(piece.targets, sources)
            nonfinite.update(piece.find_nonfinite())
            digest.update(self._bytes[piece.begin : piece.end])
        return Filling(sorted(nonfinite), digest)

    def _flattened(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [
            t.detach().view(-1) if form.is_flat else t.detach()
            for t, form in zip(tensors, self._forms, strict=True)
        ]

    def _cut(self) -> list[_Piece]:
        pieces = [_Piece([], [], 0, 0, [])]
        for i in in_memory_order(self.views):
            flat, view, begin = self._flat[i], self.views[i], 0
            while begin < flat.numel():
                piece = pieces[-1]
                room = (_PIECE_BYTES - (piece.end - piece.begin)) // flat.itemsize
                if room <= 0:
                    piece = _Piece([], [], piece.end, piece.end, [])
                    pieces.append(piece)
                    room = _PIECE_BYTES // flat.itemsize
                is_flat = self._forms[i].is_flat
                end = min(begin + room, flat.numel()) if is_flat else flat.numel()
                if can_scan(flat):
                    piece.scanned.append(len(piece.targets))
                piece.targets.append(flat[begin:end] if is_flat else view)
                piece.sources.append((i, slice(begin, end) if is_flat else None))
                piece.end += (end - begin) * flat.itemsize
                begin = end
        return pieces


def _form(tensor: torch.Tensor) -> _Form:
    return _Form(tensor.shape, tensor.dtype, tensor.is_contiguous())


def in_memory_order(tensors: Sequence[torch.Tensor]) -> list[int]:
    """Places of the tensors, in the order in which they lie in an arena."""
    return sorted(range(len(tensors)), key=lambda i: -tensors[i].itemsize)
