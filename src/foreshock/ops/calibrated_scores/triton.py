"""calibrated_scores in Triton: one kernel, for CUDA devices."""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from foreshock.ops._device import why_no_triton
from foreshock.ops.calibrated_scores.result import CalibratedScores

_IS_INTERPRETED = bool(triton.knobs.runtime.interpret)


def why_unavailable(device_type: str) -> str | None:
    """What keeps this implementation from tensors of a device; None if nothing does."""
    return why_no_triton(device_type, _IS_INTERPRETED)


# Fixed: a search for better ones at run time would stall a first batch.
SAMPLES = 128  # that one program serves
OPTIONS = {"num_warps": SAMPLES // 32, "enable_fp_fusion": False}
_SAMPLES = tl.constexpr(SAMPLES)


# Not specialised: another number or alignment would be another kernel, compiled in mid-training.
@triton.jit(
    do_not_specialize=["layers", "samples", "known", "halvings", "threshold"],
    do_not_specialize_on_alignment=[
        "distances_ptr",
        "scale_ptr",
        "weights_ptr",
        "reference_ptr",
        "z_ptr",
        "scores_ptr",
        "share_ptr",
        "is_above_ptr",
    ],
)
def _calibrated_scores_kernel(  # type: ignore[no-untyped-def]
    distances_ptr,
    scale_ptr,
    weights_ptr,
    reference_ptr,
    z_ptr,
    scores_ptr,
    share_ptr,
    is_above_ptr,
    layers,
    samples,
    known,
    halvings,
    threshold,
    is_largest: tl.constexpr,
    has_weights: tl.constexpr,
    has_reference: tl.constexpr,
):
    """Scores some samples; see csrc/calibrated_scores/cpu.cpp."""
    n = tl.program_id(0).to(tl.int64) * _SAMPLES + tl.arange(0, _SAMPLES)
    is_sample = n < samples
    sum = tl.zeros([_SAMPLES], tl.float64)
    largest = tl.full([_SAMPLES], -float("inf"), tl.float32)
    for layer in range(layers):
        distance = tl.load(distances_ptr + layer * samples + n, mask=is_sample, other=0)
        location = tl.load(scale_ptr + layer)
        spread = tl.load(scale_ptr + layers + layer)
        z = tl.div_rn(distance - location, spread)
        z = tl.where(distance - distance == 0, z, float("nan"))
        tl.store(z_ptr + layer * samples + n, z, mask=is_sample)
        if has_weights:
            sum += tl.load(weights_ptr + layer) * z.to(tl.float64)
        else:
            sum += z.to(tl.float64)
        largest = tl.where((z > largest) | (z != z), z, largest)
    if is_largest:
        score = largest
    elif has_weights:
        score = sum.to(tl.float32)
    else:
        score = (sum / layers.to(tl.float64)).to(tl.float32)
    tl.store(scores_ptr + n, score, mask=is_sample)
    if has_reference:
        tl.store(is_above_ptr + n, (score <= threshold) == 0, mask=is_sample)
        x = score.to(tl.float64)
        low = tl.zeros([_SAMPLES], tl.int64)
        high = low + known
        for _ in range(halvings):
            middle = (low + high) // 2
            is_open = low < high
            there = tl.load(reference_ptr + middle, mask=is_open, other=0)
            is_above = there > x
            high = tl.where(is_open & is_above, middle, high)
            low = tl.where(is_open & (is_above == 0), middle + 1, low)
        tl.store(share_ptr + n, low.to(tl.float64) / known.to(tl.float64), mask=is_sample)


def score(
    distance_LN: Tensor,
    scale_2L: Tensor,
    weights_L: Tensor | None,
    reference: Tensor | None,
    threshold: float,
    *,
    is_largest: bool,
) -> CalibratedScores:
    """See `reference.score`."""
    layers, samples = distance_LN.shape
    z_LN, scores = torch.empty_like(distance_LN), distance_LN.new_empty(samples)
    share = is_above = None
    if reference is not None:
        share = distance_LN.new_empty(samples, dtype=torch.float64)
        is_above = distance_LN.new_empty(samples, dtype=torch.bool)
    known = 0 if reference is None else len(reference)
    with torch.cuda.device(distance_LN.device if distance_LN.is_cuda else -1):
        _calibrated_scores_kernel[(triton.cdiv(samples, SAMPLES) or 1,)](
            distance_LN,
            scale_2L,
            weights_L,
            reference,
            z_LN,
            scores,
            share,
            is_above,
            layers,
            samples,
            known,
            known.bit_length(),
            _highest_float32(threshold),
            is_largest=is_largest,
            has_weights=weights_L is not None,
            has_reference=reference is not None,
            **OPTIONS,
        )
    return CalibratedScores(z_LN, scores, share, is_above)


def _highest_float32(bound: float) -> float:
    """The highest number of float32 up to a bound: scores are float32, as are kernels' numbers."""
    with np.errstate(over="ignore"):
        nearest = np.float32(bound)
    is_above = float(nearest) > bound
    return float(np.nextafter(nearest, np.float32(-np.inf)) if is_above else nearest)
