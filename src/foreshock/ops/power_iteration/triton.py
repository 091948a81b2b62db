"""power_iteration in Triton: for CUDA devices where the extension has no CUDA kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from foreshock.ops._device import bind_launch, why_no_triton
from foreshock.ops._tensors import DTYPE_CODES, FLOATING_DTYPES
from foreshock.ops.power_iteration import device_table
from foreshock.ops.power_iteration.device_table import (
    SEGMENT_BYTES,
    DeviceTable,
    Kind,
    Shape,
)
from foreshock.ops.power_iteration.matrices import Layout

_IS_INTERPRETED = bool(triton.knobs.runtime.interpret)


def why_unavailable(device_type: str) -> str | None:
    """What keeps this implementation from tensors of a device; None if nothing does."""
    return why_no_triton(device_type, _IS_INTERPRETED)


class Format(NamedTuple):
    """How the memory of a dtype becomes numbers."""

    RAW: tl.dtype  # bfloat16 as an integer: the upper half of a float32
    SUM: tl.dtype
    PER_VECTOR: int  # elements in 16 bytes
    IS_UPPER_HALF: bool
    TILE: int  # elements that a program works on at a time, if a row has no more
    STAGES: int  # one more than there are tiles in shared memory


FORMATS = {
    torch.float64: Format(tl.float64, tl.float64, 2, False, 2048, 4),
    torch.float32: Format(tl.float32, tl.float32, 4, False, 4096, 4),
    torch.bfloat16: Format(tl.int16, tl.float32, 8, True, 4096, 5),
    torch.float16: Format(tl.float16, tl.float32, 8, False, 4096, 5),
}

# Fixed: a search for better ones at run time would stall a first step.
OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}
MIN_COLUMNS = 128

_ADDRESS = tl.constexpr(device_table.ADDRESS)
_ROWS = tl.constexpr(device_table.ROWS)
_COLUMNS = tl.constexpr(device_table.COLUMNS)
_ROW_STRIDE = tl.constexpr(device_table.ROW_STRIDE)
_COLUMN_OFFSETS = tl.constexpr(device_table.COLUMN_OFFSETS)
_FIRST = tl.constexpr(device_table.FIRST)
_DTYPE = tl.constexpr(device_table.DTYPE)
_BLOCK_ROWS = tl.constexpr(device_table.BLOCK_ROWS)
_SEGMENT_COLUMNS = tl.constexpr(device_table.SEGMENT_COLUMNS)
_SEGMENTS = tl.constexpr(device_table.SEGMENTS)
_FIRST_TASK = tl.constexpr(device_table.FIRST_TASK)
_TASKS = tl.constexpr(device_table.TASKS)
_FIRST_CHUNK = tl.constexpr(device_table.FIRST_CHUNK)
_CHUNKS = tl.constexpr(device_table.CHUNKS)
_PARTIAL = tl.constexpr(device_table.PARTIAL)
_PARTIAL_COLUMNS = tl.constexpr(device_table.PARTIAL_COLUMNS)
_DOTS = tl.constexpr(device_table.DOTS)
_WORDS = tl.constexpr(device_table.WORDS)
_CHUNK_COLUMNS = tl.constexpr(device_table.CHUNK_COLUMNS)
_FLOAT64 = tl.constexpr(DTYPE_CODES[torch.float64])
_FLOAT32 = tl.constexpr(DTYPE_CODES[torch.float32])
_BFLOAT16 = tl.constexpr(DTYPE_CODES[torch.bfloat16])
_FLOAT16 = tl.constexpr(DTYPE_CODES[torch.float16])

_TOGETHER = tl.constexpr(1024)  # numbers that are added or moved at a time at the end of a pass
_CAREFUL_ROWS = tl.constexpr(16)
_CAREFUL_COLUMNS = tl.constexpr(128)
_LEAST_SHARE = tl.constexpr(1e-16)  # |W v|^2 below this share of |W|^2 is rounding
_MAGNITUDE = tl.constexpr(0x7FFFFFFFFFFFFFFF)
_INFINITY = tl.constexpr(0x7FF0000000000000)


@triton.jit
def _matrix(table_ptr, owners_ptr, number):  # type: ignore[no-untyped-def]
    """The row of the table of the matrix that a task or a chunk belongs to."""
    return table_ptr + tl.load(owners_ptr + number).to(tl.int64) * _WORDS


@triton.jit
def _column_places(row, column, mask):  # type: ignore[no-untyped-def]
    """Where columns lie in a row of the matrix."""
    address = tl.load(row + _COLUMN_OFFSETS)
    # In blocks: the interpreter makes a number of a single truth that it spreads over a block.
    is_gathered = address + tl.zeros_like(column) != 0
    offsets = tl.load(address.to(tl.pointer_type(tl.int64)) + column, mask & is_gathered, other=0)
    return tl.where(is_gathered, offsets, column)


# Not specialised: another number or alignment would be another kernel, compiled in mid-training.
@triton.jit(
    do_not_specialize=["first_task"],
    do_not_specialize_on_alignment=[
        "table_ptr", "owners_ptr", "v_ptr", "sums_ptr", "partial_ptr", "dots_ptr"
    ],
)  # fmt: skip
def _power_iteration_pass_kernel(  # type: ignore[no-untyped-def]
    table_ptr, owners_ptr, v_ptr, sums_ptr, partial_ptr, dots_ptr, first_task,
    F: tl.constexpr, MOST_COLUMNS: tl.constexpr, IS_ALIGNED: tl.constexpr,
    FINDS_U: tl.constexpr, USES_U: tl.constexpr,
):  # fmt: skip
    """Reads one block of rows: u, |u|^2 and |W|^2, and its part of y, while it holds a tile."""
    TILE_ROWS: tl.constexpr = F.TILE // MOST_COLUMNS if MOST_COLUMNS < F.TILE else 1
    task = first_task + tl.program_id(0)
    row = _matrix(table_ptr, owners_ptr, task)
    number = task - tl.load(row + _FIRST_TASK)
    segments = tl.load(row + _SEGMENTS)
    block = number // segments
    segment = number % segments
    all_rows = tl.load(row + _ROWS)
    begin = block * tl.load(row + _BLOCK_ROWS)
    rows = tl.minimum(all_rows - begin, tl.load(row + _BLOCK_ROWS)).to(tl.int32)
    first_column = segment * tl.load(row + _SEGMENT_COLUMNS)
    columns = (tl.load(row + _COLUMNS) - first_column).to(tl.int32)
    columns = tl.minimum(columns, tl.load(row + _SEGMENT_COLUMNS).to(tl.int32))
    row_stride = tl.load(row + _ROW_STRIDE)
    address = tl.load(row + _ADDRESS)
    data = address.to(tl.pointer_type(F.RAW)) + begin * row_stride
    in_segment = tl.arange(0, MOST_COLUMNS)
    column = first_column + in_segment
    if IS_ALIGNED:
        is_column = in_segment < columns // F.PER_VECTOR * F.PER_VECTOR  # the compiler must see it
        data += first_column
        places = in_segment
    else:
        is_column = in_segment < columns
        places = _column_places(row, column, is_column)
    v = tl.load(v_ptr + tl.load(row + _FIRST) + column, is_column, other=0).to(F.SUM)
    dots = dots_ptr + tl.load(row + _DOTS) + begin
    in_tile = tl.arange(0, TILE_ROWS)
    y = tl.zeros([TILE_ROWS, MOST_COLUMNS], F.SUM)
    wsq = tl.zeros([TILE_ROWS, MOST_COLUMNS], F.SUM)
    usq = tl.zeros([TILE_ROWS], tl.float64)
    for i in tl.range(0, rows, TILE_ROWS, num_stages=F.STAGES):
        is_row = i + in_tile < rows
        row_data = data + (i + in_tile).to(tl.int64) * row_stride
        if IS_ALIGNED:
            row_data = tl.multiple_of(row_data, 16)
        mask = is_row[:, None] & is_column[None, :]
        raw = tl.load(row_data[:, None] + places[None, :], mask, other=0)
        if F.IS_UPPER_HALF:
            w = (raw.to(tl.int32) << 16).to(tl.float32, bitcast=True)
        else:
            w = raw.to(F.SUM)
        if FINDS_U:
            u = tl.sum(w * v[None, :], 1)
            wsq += w * w
        else:
            total = tl.zeros([TILE_ROWS], tl.float64)
            for s in range(segments.to(tl.int32)):
                total += tl.load(dots + s * all_rows + i + in_tile, is_row, other=0)
            u = total.to(F.SUM)
        if USES_U:
            usq += u.to(tl.float64) * u.to(tl.float64)
            y += u[:, None] * w
        else:
            tl.store(dots + segment * all_rows + i + in_tile, u.to(tl.float64), is_row)

    # Of a matrix in segments one launch has the squares of the elements, the other that of u.
    sums = sums_ptr + task.to(tl.int64) * 2
    if FINDS_U:
        tl.store(sums + 1, tl.sum(tl.sum(wsq.to(tl.float64), 1)))
    if USES_U:
        tl.store(sums, tl.where(segment == 0, tl.sum(usq), 0.0))
        partial = (partial_ptr + tl.load(row + _PARTIAL)).to(tl.pointer_type(F.SUM))
        partial += block * tl.load(row + _PARTIAL_COLUMNS) + column
        tl.store(partial, tl.sum(y, 0), is_column)


@triton.jit
def _task_totals(row, sums_ptr):  # type: ignore[no-untyped-def]
    """|W v|^2 and |W|^2 of a matrix, and whether float sums could hold them."""
    tasks = tl.load(row + _TASKS).to(tl.int32)
    sums = sums_ptr + tl.load(row + _FIRST_TASK) * 2
    usq = tl.zeros([_TOGETHER], tl.float64)
    wsq = tl.zeros([_TOGETHER], tl.float64)
    for t in range(0, tasks, _TOGETHER):
        task = t + tl.arange(0, _TOGETHER)
        usq += tl.load(sums + task * 2, task < tasks, other=0)
        wsq += tl.load(sums + task * 2 + 1, task < tasks, other=0)
    wsq_total = tl.sum(wsq)
    is_wide = tl.load(row + _DTYPE) == _FLOAT64
    is_plain = (wsq_total >= tl.where(is_wide, 1e-200, 1e-24)) & (
        wsq_total <= tl.where(is_wide, 1e290, 1e30)
    )
    return tl.sum(usq), wsq_total, is_plain


@triton.jit
def _column_totals(partial, blocks, stride, is_column):  # type: ignore[no-untyped-def]
    """y of a chunk of columns, which the blocks have a part of each."""
    y = tl.zeros([_CHUNK_COLUMNS], tl.float64)
    for first in range(0, blocks, 32):
        block = first + tl.arange(0, 32)
        is_part = (block < blocks)[:, None] & is_column[None, :]
        parts = tl.load(partial[None, :] + block.to(tl.int64)[:, None] * stride, is_part, other=0)
        y += tl.sum(parts.to(tl.float64), 0)
    return y


@triton.jit(
    do_not_specialize_on_alignment=[
        "table_ptr", "owners_ptr", "sums_ptr", "chunk_sums_ptr", "partial_ptr", "z_ptr",
        "previous_ptr",
    ]
)  # fmt: skip
def _power_iteration_chunk_kernel(  # type: ignore[no-untyped-def]
    table_ptr, owners_ptr, sums_ptr, chunk_sums_ptr, partial_ptr, z_ptr, previous_ptr
):  # fmt: skip
    """Adds the blocks' parts of y up for some columns, and finds z = y / |u|^2 - previous / 4."""
    chunk = tl.program_id(0)
    row = _matrix(table_ptr, owners_ptr, chunk)
    usq, _, is_plain = _task_totals(row, sums_ptr)
    column = (chunk - tl.load(row + _FIRST_CHUNK)) * _CHUNK_COLUMNS + tl.arange(0, _CHUNK_COLUMNS)
    is_column = column < tl.where(is_plain, tl.load(row + _COLUMNS), 0)
    blocks = (tl.load(row + _TASKS) // tl.load(row + _SEGMENTS)).to(tl.int32)
    stride = tl.load(row + _PARTIAL_COLUMNS)
    partial = partial_ptr + tl.load(row + _PARTIAL)
    if tl.load(row + _DTYPE) == _FLOAT64:
        y = _column_totals(partial + column, blocks, stride, is_column)
    else:
        narrow = partial.to(tl.pointer_type(tl.float32)) + column
        y = _column_totals(narrow, blocks, stride, is_column)
    at = tl.load(row + _FIRST) + column
    z = y / tl.where(is_plain & (usq > 0), usq, 1) - tl.load(previous_ptr + at, is_column, 0) / 4
    z = tl.where(is_column, z, 0)
    tl.store(z_ptr + at, z, is_column)
    tl.store(chunk_sums_ptr + chunk * 2, tl.sum(y * y))
    tl.store(chunk_sums_ptr + chunk * 2 + 1, tl.sum(z * z))


@triton.jit
def _chunk_totals(row, chunk_sums_ptr):  # type: ignore[no-untyped-def]
    """|y|^2 and |z|^2 of a matrix."""
    chunks = tl.load(row + _CHUNKS).to(tl.int32)
    sums = chunk_sums_ptr + tl.load(row + _FIRST_CHUNK) * 2
    ysq = tl.zeros([_TOGETHER], tl.float64)
    zsq = tl.zeros([_TOGETHER], tl.float64)
    for c in range(0, chunks, _TOGETHER):
        chunk = c + tl.arange(0, _TOGETHER)
        ysq += tl.load(sums + chunk * 2, chunk < chunks, other=0)
        zsq += tl.load(sums + chunk * 2 + 1, chunk < chunks, other=0)
    return tl.sum(ysq), tl.sum(zsq)


@triton.jit
def _element(address, at, dtype, mask):  # type: ignore[no-untyped-def]
    """Elements of whichever type, as float64."""
    each = dtype + tl.zeros_like(at)
    wide = tl.load(address.to(tl.pointer_type(tl.float64)) + at, mask & (each == _FLOAT64), 0)
    single = tl.load(address.to(tl.pointer_type(tl.float32)) + at, mask & (each == _FLOAT32), 0)
    upper = tl.load(address.to(tl.pointer_type(tl.int16)) + at, mask & (each == _BFLOAT16), 0)
    half = tl.load(address.to(tl.pointer_type(tl.float16)) + at, mask & (each == _FLOAT16), 0)
    bits = (upper.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return wide + single.to(tl.float64) + bits.to(tl.float64) + half.to(tl.float64)


@triton.jit
def _careful_tile(row, i, j, scale):  # type: ignore[no-untyped-def]
    """Some rows and columns of a matrix, scaled; zero beyond its ends."""
    r = i + tl.arange(0, _CAREFUL_ROWS)
    column = j + tl.arange(0, _CAREFUL_COLUMNS)
    is_column = column < tl.load(row + _COLUMNS)
    places = _column_places(row, column, is_column)
    at = r.to(tl.int64)[:, None] * tl.load(row + _ROW_STRIDE) + places[None, :]
    mask = (r < tl.load(row + _ROWS))[:, None] & is_column[None, :]
    return _element(tl.load(row + _ADDRESS), at, tl.load(row + _DTYPE), mask) * scale


@triton.jit
def _find_most(row):  # type: ignore[no-untyped-def]
    """Bits of the largest magnitude, which are in the order of the magnitudes."""
    most = tl.zeros([_CAREFUL_ROWS, _CAREFUL_COLUMNS], tl.int64)
    for i in range(0, tl.load(row + _ROWS), _CAREFUL_ROWS):
        for j in range(0, tl.load(row + _COLUMNS), _CAREFUL_COLUMNS):
            bits = _careful_tile(row, i, j, 1.0).to(tl.int64, bitcast=True) & _MAGNITUDE
            most = tl.maximum(most, bits)
    return tl.max(tl.max(most, 1))


@triton.jit
def _careful_pass(row, scale, v, z, previous):  # type: ignore[no-untyped-def]
    """The pass once more, in float64 and scaled: leaves z, returns |u|^2, |W|^2, |y|^2, |z|^2."""
    columns = tl.load(row + _COLUMNS)
    in_tile = tl.arange(0, _CAREFUL_COLUMNS)
    wsq = tl.zeros([_CAREFUL_ROWS, _CAREFUL_COLUMNS], tl.float64)
    usq = tl.zeros([_CAREFUL_ROWS], tl.float64)
    for j in range(0, columns, _CAREFUL_COLUMNS):
        tl.store(z + j + in_tile, tl.zeros([_CAREFUL_COLUMNS], tl.float64), j + in_tile < columns)
    for i in range(0, tl.load(row + _ROWS), _CAREFUL_ROWS):
        u = tl.zeros([_CAREFUL_ROWS], tl.float64)
        for j in range(0, columns, _CAREFUL_COLUMNS):
            w = _careful_tile(row, i, j, scale)
            u += tl.sum(w * tl.load(v + j + in_tile, j + in_tile < columns, other=0)[None, :], 1)
            wsq += w * w
        usq += u * u
        tl.debug_barrier()
        for j in range(0, columns, _CAREFUL_COLUMNS):
            is_column = j + in_tile < columns
            y = tl.load(z + j + in_tile, is_column, other=0)
            y += tl.sum(u[:, None] * _careful_tile(row, i, j, scale), 0)
            tl.store(z + j + in_tile, y, is_column)
    tl.debug_barrier()
    usq_total = tl.sum(usq)
    ysq = tl.zeros([_CAREFUL_COLUMNS], tl.float64)
    zsq = tl.zeros([_CAREFUL_COLUMNS], tl.float64)
    for j in range(0, columns, _CAREFUL_COLUMNS):
        is_column = j + in_tile < columns
        y = tl.load(z + j + in_tile, is_column, other=0)
        next = y / tl.where(usq_total > 0, usq_total, 1)
        next -= tl.load(previous + j + in_tile, is_column, other=0) / 4
        next = tl.where(is_column, next, 0)
        ysq += y * y
        zsq += next * next
        tl.store(z + j + in_tile, next, is_column)
    tl.debug_barrier()
    return usq_total, tl.sum(tl.sum(wsq, 1)), tl.sum(ysq), tl.sum(zsq)


@triton.jit
def _move_vectors(columns, sees, zsq, v, z, previous):  # type: ignore[no-untyped-def]
    """previous = v / max(|z|, 1/2), v = z / |z|; where v met nothing, v is taken anew."""
    size = tl.where(sees, tl.sqrt(zsq), 1)
    each = 1 / tl.sqrt(columns.to(tl.float64))
    for j in range(0, columns, _TOGETHER):
        at = j + tl.arange(0, _TOGETHER)
        old = tl.load(v + at, at < columns, other=0)
        next = tl.load(z + at, at < columns, other=0)
        tl.store(previous + at, tl.where(sees, old / tl.maximum(size, 0.5), 0), at < columns)
        tl.store(v + at, tl.where(sees, next / size, each), at < columns)


@triton.jit
def _store_row(row, packed, sees, usq, wsq, ysq, scale):  # type: ignore[no-untyped-def]
    """The result, from sums over scale * W, which is finite and not zero."""
    u = tl.sqrt(usq)
    frobenius = tl.sqrt(wsq) / scale
    along = tl.where(sees, tl.sqrt(ysq) / tl.where(sees, u, 1), u)
    growth = tl.where(sees, along / tl.where(sees, u, 1), 0)
    sigma = along / scale
    rank_bound = tl.minimum(tl.load(row + _ROWS), tl.load(row + _COLUMNS)).to(tl.float64)
    ratio = tl.where(sigma > 0, frobenius / tl.where(sigma > 0, sigma, 1), 0)
    tl.store(packed, sigma)
    tl.store(packed + 1, frobenius)
    tl.store(packed + 2, sigma / (frobenius / (10 * tl.sqrt(rank_bound)) + 1e-8))
    tl.store(packed + 3, ratio * ratio)
    tl.store(packed + 4, growth)


@triton.jit(
    do_not_specialize_on_alignment=[
        "table_ptr", "sums_ptr", "chunk_sums_ptr", "v_ptr", "z_ptr", "previous_ptr", "packed_ptr"
    ]
)  # fmt: skip
def _power_iteration_matrix_kernel(  # type: ignore[no-untyped-def]
    table_ptr, sums_ptr, chunk_sums_ptr, v_ptr, z_ptr, previous_ptr, packed_ptr
):  # fmt: skip
    """Moves the vectors of one matrix and writes its row.

    Where float sums would overflow or vanish the matrix is read again here: by one program, for
    what never happens in a run that is well.
    """
    m = tl.program_id(0).to(tl.int64)
    row = table_ptr + m * _WORDS
    first = tl.load(row + _FIRST)
    v, z, previous, packed = v_ptr + first, z_ptr + first, previous_ptr + first, packed_ptr + m * 5
    columns = tl.load(row + _COLUMNS)
    usq, wsq, is_plain = _task_totals(row, sums_ptr)
    if is_plain:
        ysq, zsq = _chunk_totals(row, chunk_sums_ptr)
        sees = usq > _LEAST_SHARE * wsq
        _move_vectors(columns, sees, zsq, v, z, previous)
        _store_row(row, packed, sees, usq, wsq, ysq, 1.0)
    else:
        most = wsq.to(tl.int64, bitcast=True) & _MAGNITUDE
        if most <= _INFINITY:  # a sum of squares is a NaN only where an element is
            most = _find_most(row)
        if (most == 0) | (most >= _INFINITY):
            result = tl.where(most == 0, 0.0, float("nan"))
            for k in tl.static_range(5):
                tl.store(packed + k, result)
        else:
            exponent = most >> 52
            inverse = tl.where(exponent < 2046, 2046 - exponent, 1)
            scale = (inverse << 52).to(tl.float64, bitcast=True)
            usq, wsq, ysq, zsq = _careful_pass(row, scale, v, z, previous)
            sees = usq > _LEAST_SHARE * wsq
            _move_vectors(columns, sees, zsq, v, z, previous)
            _store_row(row, packed, sees, usq, wsq, ysq, scale)


class Memory(NamedTuple):
    """What a pass works on, beside the table."""

    v: Tensor
    previous: Tensor
    packed: Tensor
    task_sums: Tensor
    chunk_sums: Tensor
    partial: Tensor
    dots: Tensor
    z: Tensor


Key = tuple[int, int, bool, bool]


def key_of(shape: Shape) -> Key:
    """Element type, room for columns, whether vectors are aligned, and whether rows are cut."""
    most_columns = max(MIN_COLUMNS, triton.next_power_of_2(shape.columns))
    return DTYPE_CODES[shape.dtype], most_columns, shape.is_aligned, shape.is_cut


def _launch_pass(kind: Kind, table: DeviceTable, memory: Memory) -> None:
    code, most_columns, is_aligned, is_cut = kind.key
    for finds_u, uses_u in ((True, False), (False, True)) if is_cut else ((True, True),):
        _power_iteration_pass_kernel[(kind.task_count,)](
            table.rows,
            table.owners,
            memory.v,
            memory.task_sums,
            memory.partial,
            memory.dots,
            kind.first_task,
            F=FORMATS[FLOATING_DTYPES[code]],
            MOST_COLUMNS=most_columns,
            IS_ALIGNED=is_aligned,
            FINDS_U=finds_u,
            USES_U=uses_u,
            **OPTIONS,
        )


def _launch(kinds: Sequence[Kind], table: DeviceTable, memory: Memory) -> None:
    for kind in kinds:
        _launch_pass(kind, table, memory)
    _power_iteration_chunk_kernel[(table.chunks,)](
        table.rows,
        table.chunk_owners,
        memory.task_sums,
        memory.chunk_sums,
        memory.partial,
        memory.z,
        memory.previous,
        **OPTIONS,
    )
    _power_iteration_matrix_kernel[(len(table.rows),)](
        table.rows,
        memory.task_sums,
        memory.chunk_sums,
        memory.v,
        memory.z,
        memory.previous,
        memory.packed,
        **OPTIONS,
    )


def _allocate(table: DeviceTable, vectors: Tensor, packed: Tensor) -> Memory:
    sizes = [2 * table.tasks, 2 * table.chunks, table.partial_words, table.dots_words]
    sizes.append(vectors.shape[1])
    v, previous = vectors
    return Memory(v, previous, packed, *packed.new_empty(sum(sizes)).split(sizes))


@functools.cache
def _compile(key: Key, device: torch.device) -> None:
    """Compiles and loads what a kind needs by a pass over nothing: no training step shall wait."""
    dtype = FLOATING_DTYPES[key[0]]
    # Of a matrix without rows no program reads an element.
    table = _table([torch.empty(0, key[1], dtype=dtype, device=device)], device)
    table.owners = torch.zeros(1, dtype=torch.int32, device=device)
    vectors = torch.zeros(2, key[1], dtype=torch.float64, device=device)
    memory = _allocate(table, vectors, vectors.new_empty(1, 5))
    sums, room = vectors.new_empty(2), vectors.new_empty(key[1])
    spare = memory._replace(task_sums=sums, partial=room, dots=room)
    _launch([Kind(key, 0, 1)], table, spare)


def _table(
    weights: Sequence[Tensor], device: torch.device, layouts: Sequence[Layout] | None = None
) -> DeviceTable:
    return DeviceTable(weights, device, SEGMENT_BYTES, key_of, layouts)


def bind(
    weights: Sequence[Tensor],
    vectors: Tensor,
    packed: Tensor,
    layouts: Sequence[Layout] | None = None,
) -> Callable[[], object]:
    """Returns a call that passes over these weights once; see `cpu.bind`.

    On the current stream it launches one kernel for each kind of matrix (dtype, columns up to the
    next power of two, whether rows are made of aligned vectors of 16 bytes), and two more; it may
    be captured into a graph, for which it must be kept. Two calls at the same time on different
    streams would write to the same memory. Rows of more than 8192 elements (4096 of float64) are
    read twice.

    It owns what it needs but the weights' memory: up to 6 % of that, and 2 % where matrices are
    large.
    """
    if not weights:
        return lambda: None
    device = packed.device
    table = _table(weights, device, layouts)
    memory = _allocate(table, vectors, packed)
    if not _IS_INTERPRETED:
        for kind in table.kinds:
            with torch.cuda.device(device):
                _compile(kind.key, device)

    def launch(stream: int) -> None:
        _launch(table.kinds, table, memory)

    return bind_launch(launch, [table.words, memory.partial, vectors, packed], device)
