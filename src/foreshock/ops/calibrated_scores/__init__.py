"""calibrated_scores: distances of samples in several layers as one score, and where it stands."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from foreshock.ops.calibrated_scores import register
from foreshock.ops.calibrated_scores.result import CalibratedScores as CalibratedScores

Aggregation: TypeAlias = Literal["mean", "max", "weighted"]
_AGGREGATIONS = get_args(Aggregation)

_is_traced = torch.compiler.is_dynamo_compiling


def calibrated_scores(
    distances: Tensor,
    scale: Tensor,
    reference: Tensor | None = None,
    threshold: float = torch.inf,
    *,
    aggregation: Aggregation = "mean",
    weights: Tensor | None = None,
) -> CalibratedScores:
    """One score per sample from its distances in L layers, ranked among those of known data.

        z_l = (D_l - location_l) / spread_l,   score = mean, largest, or sum_l w_l z_l,
        percentile = #{s in reference: s <= score} / n,   is_above = not score <= threshold

    A distance that is not finite makes z and score NaN, which is above everything. No sample's
    score depends on the others. No gradients.

    >>> scores = calibrated_scores(distances, scale, reference, threshold)
    >>> scores.is_above

    Args:
        distances: (L, N) float32, L from 1 up, contiguous like all others and on their device.
        scale: (2, L) float32: locations, then spreads.
        reference: (n,) float64, sorted, n from 1 up; None: the score alone is wanted.
        threshold: the highest score that is not above.
        aggregation: over layers.
        weights: (L,) float64 with "weighted", None otherwise.
    Raises:
        ValueError: naming the argument, what it is and what is accepted.
    Cost:
        One read of the distances and one write of z, and log2(n) comparisons per sample. On the CPU
        and on CUDA one kernel; nothing waits for a device.
    Source:
        csrc/calibrated_scores.
    """
    layers = len(distances)
    _check(distances, "distances", torch.float32, (layers, distances.shape[-1]), distances)
    _check(scale, "scale", torch.float32, (2, layers), distances)
    if reference is not None:
        _check(reference, "reference", torch.float64, (reference.numel(),), distances)
    if weights is not None:
        _check(weights, "weights", torch.float64, (layers,), distances)
    if aggregation not in _AGGREGATIONS:
        raise ValueError(f"aggregation is {aggregation!r}; accepted: {_AGGREGATIONS}")
    if (weights is not None) != (aggregation == "weighted"):
        raise ValueError(
            f"weights is {'None' if weights is None else 'a tensor'} with aggregation "
            f"{aggregation!r}; accepted: a tensor with 'weighted', None with 'mean' and 'max'"
        )
    given = distances, scale, weights, reference, threshold, aggregation == "max"
    if not _is_traced():
        return register.score(*given)
    z, score, percentile, is_above = torch.ops.foreshock.calibrated_scores(*given)
    if reference is None:
        return CalibratedScores(z, score, None, None)
    return CalibratedScores(z, score, percentile, is_above)


def _check(
    tensor: Tensor, name: str, dtype: torch.dtype, shape: tuple[int, ...], beside: Tensor
) -> None:
    is_like = tensor.dtype is dtype and tensor.shape == shape and tensor.device == beside.device
    if not is_like or 0 in shape[:1] or not tensor.is_contiguous():
        raise ValueError(
            f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}; "
            f"accepted: contiguous {dtype} of shape {shape}, from 1 up, on {beside.device}"
        )
