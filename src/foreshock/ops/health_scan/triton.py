"""health_scan in Triton: for CUDA devices where the extension has no CUDA kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from foreshock.ops._device import bind_launch, why_no_triton
from foreshock.ops.health_scan import device_table
from foreshock.ops.health_scan.device_table import DeviceTable, Kind

_IS_INTERPRETED = bool(triton.knobs.runtime.interpret)


def why_unavailable(device_type: str) -> str | None:
    """What keeps this implementation from tensors of a device; None if nothing does."""
    return why_no_triton(device_type, _IS_INTERPRETED)


class Format(NamedTuple):
    """How the memory of a dtype becomes floats; all dtypes are read alike, as integers.

    An element is moved to the top of a word and back down, with its sign, until its exponent ends
    where that of the word's own float does; copies of the sign are masked off. As a float this is
    exactly x / SCALE, denormal or not: nothing is rounded or flushed, and no device lacks an
    instruction for it. The scale is put right once per chunk.
    """

    RAW: tl.dtype
    WORD: tl.dtype
    FLOAT: tl.dtype
    PER_VECTOR: int  # elements in 16 bytes
    VECTORS: int  # that a thread loads before it uses the first, as registers allow
    UP: int
    DOWN: int
    MASK: int
    MAGNITUDE: int
    INFINITY: int
    FIRST_NONFINITE: int
    SCALE: float


def _format(dtype: torch.dtype, exponent_bits: int, has_infinity: bool = True) -> Format:
    bits = 8 * dtype.itemsize
    word_bits, word_exponent_bits = (64, 11) if bits == 64 else (32, 8)
    mantissa_end = word_bits - 1 - word_exponent_bits
    all_ones = ((1 << (bits - 1)) - 1) << (mantissa_end - (bits - 1 - exponent_bits))
    infinity = ((1 << exponent_bits) - 1) << mantissa_end
    return Format(
        RAW=tl.core.get_int_dtype(bits, signed=True),
        WORD=tl.core.get_int_dtype(word_bits, signed=True),
        FLOAT=tl.float64 if word_bits == 64 else tl.float32,
        PER_VECTOR=128 // bits,
        VECTORS=2 if bits == 8 else 4,
        UP=word_bits - bits,
        DOWN=word_exponent_bits - exponent_bits,
        MASK=all_ones - (1 << (word_bits - 1)),
        MAGNITUDE=(1 << (word_bits - 1)) - 1,
        INFINITY=infinity,
        FIRST_NONFINITE=infinity if has_infinity else all_ones,
        SCALE=2.0 ** ((1 << (word_exponent_bits - 1)) - (1 << (exponent_bits - 1))),
    )


FORMATS = {
    torch.float64: _format(torch.float64, 11),
    torch.float32: _format(torch.float32, 8),
    torch.bfloat16: _format(torch.bfloat16, 8),
    torch.float16: _format(torch.float16, 5),
    torch.float8_e4m3fn: _format(torch.float8_e4m3fn, 4, has_infinity=False),
    torch.float8_e5m2: _format(torch.float8_e5m2, 5),
}

# Fixed: a search for better ones at run time would stall a first step.
THREADS = 256
OPTIONS = {"num_warps": THREADS // 32, "enable_fp_fusion": True}

_THREADS = tl.constexpr(THREADS)
_COLUMNS = tl.constexpr(device_table.COLUMNS)
_ADDRESS = tl.constexpr(device_table.ADDRESS)
_NUMEL = tl.constexpr(device_table.NUMEL)
_CHUNK_NUMEL = tl.constexpr(device_table.CHUNK_NUMEL)
_FIRST_CHUNK = tl.constexpr(device_table.FIRST_CHUNK)
_SIZES = tl.constexpr(device_table.SIZES)
_STRIDES = tl.constexpr(device_table.STRIDES)
_OUTER_DIM = tl.constexpr(device_table.MAX_DIMS - 1)


@triton.jit
def _tile(PER_THREAD: tl.constexpr):  # type: ignore[no-untyped-def]
    """Positions of (THREADS, PER_THREAD) elements, consecutive for each thread."""
    return tl.arange(0, _THREADS)[:, None] * PER_THREAD + tl.arange(0, PER_THREAD)[None, :]


@triton.jit
def _add(raw, sum, sumsq, most, nonfinite, inf, F: tl.constexpr, EXACT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Adds a tile to what each thread has seen; if not EXACT, as though all were finite."""
    bits = (raw.to(F.WORD) << F.UP >> F.DOWN) & F.MASK
    magnitude = bits & F.MAGNITUDE
    if EXACT:
        is_nonfinite = magnitude >= F.FIRST_NONFINITE
        nonfinite += tl.sum(is_nonfinite.to(tl.int32), 1)
        if F.FIRST_NONFINITE == F.INFINITY:
            inf += tl.sum((magnitude == F.INFINITY).to(tl.int32), 1)
        bits = tl.where(is_nonfinite, 0, bits)
        magnitude = tl.where(is_nonfinite, 0, magnitude)
    x = bits.to(F.FLOAT, bitcast=True).to(tl.float64)
    sum += tl.sum(x, 1)
    sumsq += tl.sum(x * x, 1)
    most = tl.maximum(most, tl.max(magnitude, 1))
    return sum, sumsq, most, nonfinite, inf


@triton.jit
def _nothing(F: tl.constexpr):  # type: ignore[no-untyped-def]
    """What each thread has seen before the first tile: sum, sumsq, most, nonfinite, inf."""
    zero = tl.zeros([_THREADS], tl.float64)
    count = tl.zeros([_THREADS], tl.int32)
    return zero, zero, tl.zeros([_THREADS], F.WORD), count, count


@triton.jit
def _scan_dense(address, size, F: tl.constexpr, EXACT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Reads consecutive elements: 16 bytes at a time from a boundary on, then those around them."""
    VECTORS: tl.constexpr = 1 if EXACT else F.VECTORS
    TILE: tl.constexpr = _THREADS * F.PER_VECTOR
    ITEM_BYTES: tl.constexpr = 16 // F.PER_VECTOR
    tile = _tile(F.PER_VECTOR)
    head = tl.minimum(((16 - address % 16) % 16 // ITEM_BYTES).to(tl.int32), size)
    whole = (size - head) // (VECTORS * TILE) * (VECTORS * TILE)
    body = tl.multiple_of((address + head * ITEM_BYTES).to(tl.pointer_type(F.RAW)), 16)
    sum, sumsq, most, nonfinite, inf = _nothing(F)
    for i in range(0, whole, VECTORS * TILE):
        for v in tl.static_range(VECTORS):
            raw = tl.load(body + i + v * TILE + tile)
            sum, sumsq, most, nonfinite, inf = _add(raw, sum, sumsq, most, nonfinite, inf, F, EXACT)
    data = address.to(tl.pointer_type(F.RAW))
    for i in range(0, size - whole, TILE):
        at = tl.where(i + tile < head, i + tile, i + tile + whole)
        raw = tl.load(data + at, mask=at < size, other=0)
        sum, sumsq, most, nonfinite, inf = _add(raw, sum, sumsq, most, nonfinite, inf, F, EXACT)
    return sum, sumsq, most, nonfinite, inf


@triton.jit
def _scan_strided(row, begin, size, F: tl.constexpr):  # type: ignore[no-untyped-def]
    """Reads elements [begin, begin + size), counted along the innermost dimension first."""
    data = tl.load(row + _ADDRESS).to(tl.pointer_type(F.RAW))
    element = tl.arange(0, 4)[None, :] * _THREADS + tl.arange(0, _THREADS)[:, None]
    sum, sumsq, most, nonfinite, inf = _nothing(F)
    for i in range(0, size, 4 * _THREADS):
        rest = begin + i + element
        offset = tl.zeros_like(rest)
        for d in tl.static_range(_OUTER_DIM):
            extent = tl.load(row + _SIZES + d)
            offset += rest % extent * tl.load(row + _STRIDES + d)
            rest = rest // extent
        offset += rest * tl.load(row + _STRIDES + _OUTER_DIM)
        raw = tl.load(data + offset, mask=i + element < size, other=0)
        sum, sumsq, most, nonfinite, inf = _add(raw, sum, sumsq, most, nonfinite, inf, F, True)
    return sum, sumsq, most, nonfinite, inf


# Not specialised: another number or alignment would be another kernel, compiled in mid-training.
@triton.jit(
    do_not_specialize=["first_chunk"],
    do_not_specialize_on_alignment=["table_ptr", "owners_ptr", "partial_ptr"],
)
def _health_scan_chunk_kernel(  # type: ignore[no-untyped-def]
    table_ptr, owners_ptr, partial_ptr, first_chunk, F: tl.constexpr, IS_STRIDED: tl.constexpr
):
    """Writes one chunk's nan, inf, absmax, sum and sumsq to its partial row."""
    chunk = first_chunk + tl.program_id(0)
    row = table_ptr + tl.load(owners_ptr + chunk).to(tl.int64) * _COLUMNS
    chunk_numel = tl.load(row + _CHUNK_NUMEL)
    begin = (chunk - tl.load(row + _FIRST_CHUNK)) * chunk_numel
    size = tl.minimum(tl.load(row + _NUMEL) - begin, chunk_numel).to(tl.int32)
    if IS_STRIDED:
        sum, sumsq, most, nonfinite, inf = _scan_strided(row, begin, size, F)
    else:
        address = tl.load(row + _ADDRESS) + begin * (16 // F.PER_VECTOR)
        sum, sumsq, most, nonfinite, inf = _scan_dense(address, size, F, False)
        # What is not finite shows in the largest magnitude. It makes the sums worthless, and the
        # chunk is read once more: most of it out of the cache.
        if tl.max(most) >= F.FIRST_NONFINITE:
            sum, sumsq, most, nonfinite, inf = _scan_dense(address, size, F, True)
    infinities = tl.sum(inf)
    absmax = tl.max(most).to(F.FLOAT, bitcast=True).to(tl.float64) * F.SCALE
    partial = partial_ptr + chunk.to(tl.int64) * 5
    tl.store(partial, (tl.sum(nonfinite) - infinities).to(tl.int64))
    tl.store(partial + 1, infinities.to(tl.int64))
    tl.store(partial + 2, absmax.to(tl.int64, bitcast=True))
    tl.store(partial + 3, (tl.sum(sum) * F.SCALE).to(tl.int64, bitcast=True))
    tl.store(partial + 4, (tl.sum(sumsq) * F.SCALE * F.SCALE).to(tl.int64, bitcast=True))


@triton.jit(do_not_specialize_on_alignment=["table_ptr", "partial_ptr", "packed_ptr"])
def _health_scan_tensor_kernel(table_ptr, partial_ptr, packed_ptr):  # type: ignore[no-untyped-def]
    """Adds the partial rows of one tensor up, always in the same order, and writes its row."""
    tensor = tl.program_id(0)
    row = table_ptr + tensor.to(tl.int64) * _COLUMNS
    numel = tl.load(row + _NUMEL)
    chunk_numel = tl.load(row + _CHUNK_NUMEL)
    chunks = ((numel + chunk_numel - 1) // chunk_numel).to(tl.int32)
    partial = partial_ptr + tl.load(row + _FIRST_CHUNK) * 5
    nan = tl.zeros([_THREADS], tl.int64)
    inf = tl.zeros([_THREADS], tl.int64)
    absmax = tl.zeros([_THREADS], tl.float64)
    sum = tl.zeros([_THREADS], tl.float64)
    sumsq = tl.zeros([_THREADS], tl.float64)
    for i in range(0, chunks, _THREADS):
        chunk = i + tl.arange(0, _THREADS)
        is_chunk = chunk < chunks
        at = partial + chunk * 5
        nan += tl.load(at, mask=is_chunk, other=0)
        inf += tl.load(at + 1, mask=is_chunk, other=0)
        chunk_absmax = tl.load(at + 2, mask=is_chunk, other=0).to(tl.float64, bitcast=True)
        absmax = tl.maximum(absmax, chunk_absmax)
        sum += tl.load(at + 3, mask=is_chunk, other=0).to(tl.float64, bitcast=True)
        sumsq += tl.load(at + 4, mask=is_chunk, other=0).to(tl.float64, bitcast=True)
    packed = packed_ptr + tensor.to(tl.int64) * 6
    tl.store(packed, numel)
    tl.store(packed + 1, tl.sum(nan))
    tl.store(packed + 2, tl.sum(inf))
    tl.store(packed + 3, tl.max(absmax).to(tl.int64, bitcast=True))
    tl.store(packed + 4, tl.sum(sum).to(tl.int64, bitcast=True))
    tl.store(packed + 5, tl.sum(sumsq).to(tl.int64, bitcast=True))


def _launch(
    kinds: list[Kind], table: DeviceTable, partial: torch.Tensor, packed: torch.Tensor
) -> None:
    for kind in kinds:
        _health_scan_chunk_kernel[(kind.chunk_count,)](
            table.rows,
            table.owners,
            partial,
            kind.first_chunk,
            F=FORMATS[kind.dtype],
            IS_STRIDED=kind.is_strided,
            **OPTIONS,
        )
    _health_scan_tensor_kernel[(len(table.rows),)](table.rows, partial, packed, **OPTIONS)


@functools.cache
def _compile(dtype: torch.dtype, is_strided: bool, device: torch.device) -> None:
    """Compiles and loads both kernels by scanning nothing: no training step shall wait for it."""
    table = DeviceTable([None], device)
    result = torch.empty(6, dtype=torch.int64, device=device)
    _launch([Kind(dtype, is_strided, 0, 1)], table, torch.empty_like(result), result)


def bind(tensors: list[torch.Tensor | None], packed: torch.Tensor) -> Callable[[], object]:
    """Returns a call that scans these tensors into `packed`, (T, 6); see `HealthStats.packed`.

    The call owns what it needs but the tensors' memory, which the caller keeps alive. On the
    current stream it launches one kernel for each dtype among the dense tensors, one for each among
    the strided ones, and one more; it may be captured into a graph, for which it must be kept. Two
    calls at the same time on different streams would write to the same memory. A tensor of more
    than four dimensions that cannot be coalesced costs a device copy of its own at each call.
    """
    if not tensors:
        return lambda: None
    device = packed.device
    table = DeviceTable(tensors, device)
    partial = torch.empty(len(table.owners), 5, dtype=torch.int64, device=device)
    packed_bits = packed.view(torch.int64)
    if not _IS_INTERPRETED:
        for kind in table.kinds:
            with torch.cuda.device(device):
                _compile(kind.dtype, kind.is_strided, device)

    def launch(stream: int) -> None:
        table.refresh_copies()
        _launch(table.kinds, table, partial, packed_bits)

    return bind_launch(launch, [*table.memory, partial, packed], device)
