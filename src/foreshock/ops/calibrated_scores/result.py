"""What the implementations return."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class CalibratedScores(NamedTuple):
    """Of L layers and N samples."""

    z: Tensor
    """(L, N) float32: (D - location) / spread of each layer; NaN where D is not finite."""
    score: Tensor
    """(N,) float32: z brought together over layers; NaN where a layer's is."""
    percentile: Tensor | None
    """(N,) float64: share of the reference that is not above the score; 1 for NaN."""
    is_above: Tensor | None
    """(N,) bool: whether the score is not at most the threshold; true for NaN."""
