"""rolling_zscore in plain PyTorch: the truth that the compiled implementations must agree with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from foreshock.ops.rolling_zscore.state import PUSHED, Settings, State


def why_unavailable(device_type: str) -> str | None:
    """Runs on every device."""
    return None


def mean_and_m2(deviations: Tensor, is_in: Tensor) -> tuple[Tensor, Tensor]:
    """Of the rows of (W, S) that are in: mean and sum of squared deviations from it."""
    count = is_in.sum(0).clamp(min=1)
    mean = torch.where(is_in, deviations, 0).div(count).sum(0)
    return mean, torch.where(is_in, deviations - mean, 0).square().sum(0)


def bind(state: State, settings: Settings) -> Callable[[Tensor, Tensor], None]:
    """Returns a call that takes a value of each series and writes its z; the whole ring is read.

    Args:
        state: what is read, and changed in place.
        settings: as `RollingZScore` has them.
    Returns:
        push(values, z): (S,) floating-point values on the state's device; (S,) of the ring's dtype.
    """
    ring, moments, counts = state
    rows = torch.arange(state.window, device=ring.device)[:, None]

    def push(values: Tensor, z: Tensor) -> None:
        x = values.to(ring.dtype).double()
        is_finite = torch.isfinite(x)
        pushed, count = counts[PUSHED], state.filled
        shift, mean, m2 = ring[0].double(), moments[0], moments[1]
        deviation = (x - shift) - mean
        std = (m2 / (count - settings.ddof)).sqrt()
        score = (deviation / std).clamp(-settings.z_cap, settings.z_cap).nan_to_num(0)
        is_scored = count >= settings.min_count
        z.copy_(torch.where(is_finite, torch.where(is_scored, score, 0), torch.nan))

        limit = settings.clip * std
        is_outlier = is_scored & (std > 0) & (deviation.abs() > limit)
        edge = shift + (mean + limit.copysign(deviation))
        entering = torch.where(is_outlier, edge, x).to(ring.dtype)
        ring.copy_(torch.where((rows == pushed % state.window) & is_finite, entering, ring))
        counts.add_(torch.stack([is_finite, ~is_finite]))

        deviations = ring.double() - ring[0].double()
        mean, m2 = mean_and_m2(deviations, rows < state.filled)
        block = mean_and_m2(deviations, rows < pushed % state.window)
        moments.copy_(torch.stack([mean, m2, m2, *block]))

    return push
