"""Where torch keeps what a changed tensor would change, found by looking at tensors we know.

Reading 148 tensors through any interface of torch costs 8 us and more; reading eight words of each
costs under one. The words' offsets differ between versions of torch, so they are not written down:
tensors with telling sizes are made, their memory is searched for those numbers, and the offsets
found are then tried on other tensors. If anything is not as expected there is no layout, and the
slower interface is used.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

_WORD = 8
_IMPL_BYTES = 176  # no more than torch 2.13 has allocated
_STORAGE_BYTES = 64
_DTYPES = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)


class TensorLayout(NamedTuple):
    """Byte offsets: in the Python object, in the tensor behind it, and in that one's storage."""

    object_impl: int
    impl_storage: int
    impl_storage_offset: int
    impl_numel: int
    impl_sizes: int
    impl_strides: int
    impl_dtype: int
    storage_data: int


def _probe(dtype: torch.dtype, sizes: tuple[int, int, int], offset: int) -> torch.Tensor:
    a, b, c = sizes
    base = torch.empty(offset + a * b * c + 1, dtype=dtype)
    return base.as_strided((c, a, b), (1, b * c, c), offset)


def _words(address: int, size: int) -> tuple[int, ...]:
    return struct.unpack(f"{size // _WORD}q", ctypes.string_at(address, size))


def _impl(tensor: torch.Tensor) -> int:
    return int(tensor._cdata)


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _find(words: tuple[int, ...], wanted: tuple[int, ...]) -> int | None:
    """Byte offset at which these words stand, if they stand there once and nowhere else."""
    n = len(wanted)
    hits = [i for i in range(len(words) - n + 1) if words[i : i + n] == wanted]
    return hits[0] * _WORD if len(hits) == 1 else None


def _find_dtype(tensors: Iterable[torch.Tensor]) -> int | None:
    """First 16-bit place that is the same in all tensors of a dtype and differs between dtypes."""
    images = [(t.dtype, ctypes.string_at(_impl(t), _IMPL_BYTES)) for t in tensors]
    for at in range(0, _IMPL_BYTES, 2):
        seen: dict[torch.dtype, set[bytes]] = {}
        for dtype, image in images:
            seen.setdefault(dtype, set()).add(image[at : at + 2])
        if all(len(v) == 1 for v in seen.values()) and len(set.union(*seen.values())) == len(seen):
            return at
    return None


def _holds(layout: TensorLayout, tensor: torch.Tensor) -> bool:
    words = _words(_impl(tensor), _IMPL_BYTES)
    head = _words(id(tensor), tensor.__class__.__basicsize__ // _WORD * _WORD)
    dims = tensor.dim()

    def at(offset: int, count: int = 1) -> tuple[int, ...]:
        return words[offset // _WORD : offset // _WORD + count]

    storage = _words(_storage(tensor), _STORAGE_BYTES)
    return (
        head[layout.object_impl // _WORD] == _impl(tensor)
        and at(layout.impl_storage) == (_storage(tensor),)
        and at(layout.impl_storage_offset) == (tensor.storage_offset(),)
        and at(layout.impl_numel) == (tensor.numel(),)
        and at(layout.impl_sizes, dims) == tuple(tensor.shape)
        and at(layout.impl_strides, dims) == tensor.stride()
        and storage[layout.storage_data // _WORD] == tensor.untyped_storage().data_ptr()
    )


def find_tensor_layout() -> TensorLayout | None:
    """The layout in this version of torch, or None if it could not be made out with certainty.

    Cost: some 0.3 ms, once.
    """
    known = _probe(torch.float32, (7, 11, 13), 1009)
    # Memory that torch allocates is its own deleter's argument too; borrowed memory is not.
    borrowed = torch.frombuffer(bytearray(64), dtype=torch.uint8)
    words = _words(_impl(known), _IMPL_BYTES)
    head = _words(id(known), torch.Tensor.__basicsize__ // _WORD * _WORD)
    every: list[torch.Tensor] = []
    shapes = [((7, 11, 13), 1009), ((3, 29, 5), 77), ((2, 2, 17), 4001)]
    make: list[Callable[[torch.Tensor], torch.Tensor]] = [lambda t: t, torch.nn.Parameter]
    for dtype in _DTYPES:
        every += [m(_probe(dtype, sizes, offset)) for sizes, offset in shapes for m in make]
    found = (
        _find(head, (_impl(known),)),
        _find(words, (_storage(known),)),
        _find(words, (1009,)),
        _find(words, (7 * 11 * 13,)),
        _find(words, tuple(known.shape)),
        _find(words, known.stride()),
        _find_dtype(every),
        _find(_words(_storage(borrowed), _STORAGE_BYTES), (borrowed.data_ptr(),)),
    )
    if any(offset is None for offset in found):
        return None
    layout = TensorLayout(*(offset for offset in found if offset is not None))
    every.append(torch.empty(23))
    every.append(torch.empty(2, 3, 5, 7, 11))
    return layout if all(_holds(layout, tensor) for tensor in every) else None
