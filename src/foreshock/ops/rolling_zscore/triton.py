"""rolling_zscore in Triton: one kernel a push, for CUDA devices."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from foreshock.ops._device import bind_launch, why_no_triton
from foreshock.ops.rolling_zscore import state as rows
from foreshock.ops.rolling_zscore.state import Settings, State

_IS_INTERPRETED = bool(triton.knobs.runtime.interpret)


def why_unavailable(device_type: str) -> str | None:
    """What keeps this implementation from tensors of a device; None if nothing does."""
    return why_no_triton(device_type, _IS_INTERPRETED)


# Fixed: a search for better ones at run time would stall a first step.
SERIES = 128  # that one program serves
OPTIONS = {"num_warps": SERIES // 32, "enable_fp_fusion": True}
# Values of other types are converted by an operation of their own before.
VALUE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

_SERIES = tl.constexpr(SERIES)
_MEAN = tl.constexpr(rows.MEAN)
_M2 = tl.constexpr(rows.M2)
_DOUBT = tl.constexpr(rows.DOUBT)
_BLOCK_MEAN = tl.constexpr(rows.BLOCK_MEAN)
_BLOCK_M2 = tl.constexpr(rows.BLOCK_M2)
_PUSHED = tl.constexpr(rows.PUSHED)
_NONFINITE = tl.constexpr(rows.NONFINITE)
_MOST_DOUBT = tl.constexpr(1 << 23)  # as in csrc/rolling_zscore/cpu.cpp


@triton.jit
def _kept(x, ring_ptr):  # type: ignore[no-untyped-def]
    """What the ring keeps of numbers, in float64."""
    return x.to(ring_ptr.dtype.element_ty).to(tl.float64)


@triton.jit
def _deviation(ring_ptr, entering, i, slot, shift, series, s, is_in):  # type: ignore[no-untyped-def]
    """Row i of the ring less the shift; what just entered may not have reached memory yet."""
    x = tl.load(ring_ptr + i * series + s, mask=is_in, other=0).to(tl.float64)
    return tl.where(slot == i, entering, x) - shift


# Not specialised: another number or alignment would be another kernel, compiled in mid-training.
@triton.jit(
    do_not_specialize=["stride", "series", "window", "min_count", "ddof"],
    do_not_specialize_on_alignment=[
        "values_ptr",
        "z_ptr",
        "ring_ptr",
        "moments_ptr",
        "counts_ptr",
        "limits_ptr",
    ],
)
def _rolling_zscore_push_kernel(  # type: ignore[no-untyped-def]
    values_ptr,
    z_ptr,
    ring_ptr,
    moments_ptr,
    counts_ptr,
    limits_ptr,
    stride,
    series,
    window,
    min_count,
    ddof,
):
    """Scores a value of each series and lets it enter; see csrc/rolling_zscore/cpu.cpp."""
    s = tl.program_id(0).to(tl.int64) * _SERIES + tl.arange(0, _SERIES)
    is_series = s < series
    x = _kept(tl.load(values_ptr + s * stride, mask=is_series, other=0), ring_ptr)
    is_entering = is_series & (x - x == 0)
    moments = moments_ptr + s
    counts = counts_ptr + s
    clip = tl.load(limits_ptr)
    z_cap = tl.load(limits_ptr + 1)

    pushed = tl.load(counts + _PUSHED * series, mask=is_series, other=0)
    shift = tl.load(ring_ptr + s, mask=is_series, other=0).to(tl.float64)
    mean = tl.load(moments + _MEAN * series, mask=is_series, other=0)
    m2 = tl.load(moments + _M2 * series, mask=is_series, other=0)
    count = tl.minimum(pushed, window)
    is_scored = count >= min_count
    deviation = (x - shift) - mean
    std = tl.sqrt(m2 / tl.where(is_scored, count - ddof, 1).to(tl.float64))
    score = deviation / std
    score = tl.where(score < z_cap, score, tl.where(score == score, z_cap, 0.0))
    score = tl.where(is_scored, tl.where(score > -z_cap, score, -z_cap), 0.0)
    score = tl.where(is_entering, score, float("nan"))
    tl.store(z_ptr + s, score.to(z_ptr.dtype.element_ty), mask=is_series)

    limit = clip * std
    is_outlier = is_scored & (std > 0) & (tl.abs(deviation) > limit)
    edge = shift + (mean + tl.where(deviation > 0, limit, -limit))
    entering = tl.where(is_outlier, _kept(edge, ring_ptr), x)

    slot = pushed % window
    row = ring_ptr + slot * series + s
    leaving = tl.load(row, mask=is_series, other=0).to(tl.float64)
    is_first = slot == 0
    mean = tl.where(is_first, mean + (shift - entering), mean)
    shift = tl.where(is_first, entering, shift)
    block_mean = tl.load(moments + _BLOCK_MEAN * series, mask=is_series, other=0)
    block_m2 = tl.load(moments + _BLOCK_M2 * series, mask=is_series, other=0)
    before = (entering - shift) - block_mean
    block_mean = tl.where(is_first, 0.0, block_mean + before / (slot + 1).to(tl.float64))
    after = (entering - shift) - block_mean
    block_m2 = tl.where(is_first, 0.0, block_m2 + before * after)

    is_removing = (pushed >= window) & (slot != window - 1)
    doubt = tl.load(moments + _DOUBT * series, mask=is_series, other=0)
    change = entering - leaving
    left = (leaving - shift) - mean
    moved = mean + change / window.to(tl.float64)
    mean = tl.where(is_removing, moved, block_mean)
    m2 = tl.where(is_removing, m2 + change * (((entering - shift) - moved) + left), block_m2)
    doubt = tl.where(is_removing, doubt + m2, m2)

    is_doubtful = is_entering & is_removing & ((doubt <= m2 * _MOST_DOUBT) == 0)
    if tl.max(is_doubtful.to(tl.int32), 0) > 0:
        sum = tl.zeros([_SERIES], tl.float64)
        for i in range(window):
            sum += _deviation(ring_ptr, entering, i, slot, shift, series, s, is_doubtful)
        exact_mean = sum / window.to(tl.float64)
        sumsq = tl.zeros([_SERIES], tl.float64)
        for i in range(window):
            d = _deviation(ring_ptr, entering, i, slot, shift, series, s, is_doubtful) - exact_mean
            sumsq += d * d
        mean = tl.where(is_doubtful, exact_mean, mean)
        m2 = tl.where(is_doubtful, sumsq, m2)
        doubt = tl.where(is_doubtful, sumsq, doubt)

    tl.store(row, entering.to(ring_ptr.dtype.element_ty), mask=is_entering)
    tl.store(moments + _MEAN * series, mean, mask=is_entering)
    tl.store(moments + _M2 * series, m2, mask=is_entering)
    tl.store(moments + _DOUBT * series, doubt, mask=is_entering)
    tl.store(moments + _BLOCK_MEAN * series, block_mean, mask=is_entering)
    tl.store(moments + _BLOCK_M2 * series, block_m2, mask=is_entering)
    tl.store(counts + _PUSHED * series, pushed + 1, mask=is_entering)
    nonfinite = counts + _NONFINITE * series
    is_bad = is_series & (is_entering == 0)
    tl.store(nonfinite, tl.load(nonfinite, mask=is_bad, other=0) + 1, mask=is_bad)


def _launch(state: State, settings: Settings, limits: Tensor, values: Tensor, z: Tensor) -> None:
    _rolling_zscore_push_kernel[(triton.cdiv(state.num_series, SERIES) or 1,)](
        values,
        z,
        *state,
        limits,
        values.stride(0),
        state.num_series,
        state.window,
        settings.min_count,
        settings.ddof,
        **OPTIONS,
    )


@functools.cache
def _compile(dtype: torch.dtype, device: torch.device) -> None:
    """Compiles and loads the kernel by pushing nothing: no training step shall wait for it."""
    state = State.empty(0, 1, dtype, device)
    limits = torch.empty(2, dtype=torch.float64, device=device)
    for value_dtype in VALUE_DTYPES:
        values = torch.empty(0, dtype=value_dtype, device=device)
        _launch(state, Settings(1, 0, 1.0, 1.0), limits, values, state.ring[0])


def bind(state: State, settings: Settings) -> Callable[[Tensor, Tensor], None]:
    """Returns a call that takes a value of each series and writes its z; see `reference.bind`.

    It launches one kernel on the current stream (two for values of float8), and may be captured
    into a graph, for which it must be kept.
    """
    device = state.ring.device
    limits = torch.empty(2, dtype=torch.float64, device=device)
    for limit, number in zip(limits, (settings.clip, settings.z_cap), strict=True):
        limit.fill_(number)  # a copy from the host would be waited for
    if not _IS_INTERPRETED:
        with torch.cuda.device(device):
            _compile(state.ring.dtype, device)
    arguments: list[Tensor] = []
    launch = bind_launch(
        lambda _: _launch(state, settings, limits, *arguments), [*state, limits], device
    )

    def push(values: Tensor, z: Tensor) -> None:
        read = values.resolve_neg()
        read = read if read.dtype in VALUE_DTYPES else read.float()
        arguments[:] = read, z
        launch()

    return push
