"""calibrated_scores in plain PyTorch: its truth, and its fallback on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from foreshock.ops.calibrated_scores.result import CalibratedScores


def why_unavailable(device_type: str) -> str | None:
    """Nothing keeps it from any device."""
    return None


def score(
    distance_LN: Tensor,
    scale_2L: Tensor,
    weights_L: Tensor | None,
    reference: Tensor | None,
    threshold: float,
    *,
    is_largest: bool,
) -> CalibratedScores:
    """See `calibrated_scores`; checked, and all on one device."""
    location_L1, spread_L1 = scale_2L[:, :, None]
    z_LN = (distance_LN - location_L1).div_(spread_L1)
    z_LN.add_(distance_LN - distance_LN)  # 0, or NaN where D is not finite
    if is_largest:
        scores = z_LN.amax(0)
    elif weights_L is None:
        # In double precision, where the order of summation, which the batch may change, is not
        # seen.
        scores = z_LN.mean(0, dtype=torch.float64).to(z_LN.dtype)
    else:
        scores = (z_LN * weights_L[:, None]).sum(0).to(z_LN.dtype)
    if reference is None:
        return CalibratedScores(z_LN, scores, None, None)
    # searchsorted puts a NaN behind all numbers.
    rank = torch.searchsorted(reference, scores.double(), right=True)
    is_above = (scores.double() <= threshold).logical_not_()
    return CalibratedScores(z_LN, scores, rank.double() / len(reference), is_above)
