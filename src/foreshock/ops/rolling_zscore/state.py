"""What rolling_zscore remembers of its series, and what it was set to."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32)

# Rows of `State.moments`. Both means are deviations from the ring's first row.
MEAN, M2, DOUBT, BLOCK_MEAN, BLOCK_M2 = range(5)
# Rows of `State.counts`.
PUSHED, NONFINITE = range(2)


class Settings(NamedTuple):
    """What every push of an object has in common."""

    min_count: int
    ddof: int
    clip: float  # infinite: none
    z_cap: float

    @classmethod
    def of(cls, min_count: int, ddof: int, clip: float | None, z_cap: float) -> Settings:
        """With None for no clipping."""
        return cls(min_count, ddof, math.inf if clip is None else clip, z_cap)


class State(NamedTuple):
    """S series and the W values before now that each of them has; every tensor is contiguous.

    ring: (W, S) float64 or float32; value k that entered a series lies in row k % W.
    moments: (5, S) float64. Of the window mean, sum of squared deviations, and the sum of those
        that rounding may have left a trace of in it; of the values since the ring was last full,
        mean and sum of squared deviations.
    counts: (2, S) int64: values that entered, ever; values that were not finite.
    """

    ring: Tensor
    moments: Tensor
    counts: Tensor

    @classmethod
    def empty(cls, num_series: int, window: int, dtype: torch.dtype, device: torch.device) -> State:
        """Before the first push."""
        return cls(
            torch.zeros(window, num_series, dtype=dtype, device=device),
            torch.zeros(5, num_series, dtype=torch.float64, device=device),
            torch.zeros(2, num_series, dtype=torch.int64, device=device),
        )

    @property
    def window(self) -> int:
        return self.ring.shape[0]

    @property
    def num_series(self) -> int:
        return self.ring.shape[1]

    @property
    def filled(self) -> Tensor:
        """(S,) int64: values in the window."""
        return self.counts[PUSHED].clamp(max=self.window)
