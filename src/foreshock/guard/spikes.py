"""Losses and gradient norms that stand out from those before them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from foreshock.guard.configuration import Guard
from foreshock.guard.events import Reason
from foreshock.ops import RollingZScore

_CLIP = 4.0
"""Standard deviations from the mean at which an outlier enters the window: a row of them does not
raise the bar for the next."""


class SpikeDetector:
    """Follows the loss and the total gradient norm of each step, and names those that spike.

    z = (value - mean) / std over the last `spike_window` values; a spike is z > spike_z of a loss,
    z > spike_grad_z of a gradient norm. Before there are enough values, it is one over
    `spike_warmup_ratio` times the largest so far. Values that are not finite are no spikes, and
    leave no trace: they are found by other means.

    Args:
        guard: windows and thresholds.
    Cost:
        Under a microsecond a step.
    """

    def __init__(self, guard: Guard) -> None:
        self._series = {
            Reason.LOSS_SPIKE: _Series(guard, guard.spike_z),
            Reason.GRADIENT_SPIKE: _Series(guard, guard.spike_grad_z),
        }

    def update(self, loss: float, norm: float) -> tuple[Reason, ...]:
        """Takes in a step's numbers.

        Args:
            loss: of the step.
            norm: L2 norm of all gradients before clipping; 0 where there were none.
        Returns:
            LOSS_SPIKE, GRADIENT_SPIKE, both or none.
        """
        values = zip(self._series.items(), (loss, norm), strict=True)
        return tuple([reason for (reason, series), value in values if series.is_spike(value)])

    @property
    def loss_z(self) -> float | None:
        """Of the last loss; None while there is too little to compare it with."""
        return self._series[Reason.LOSS_SPIKE].z

    @property
    def grad_norm_z(self) -> float | None:
        """Of the last gradient norm, likewise."""
        return self._series[Reason.GRADIENT_SPIKE].z

    def state_dict(self) -> dict[str, Any]:
        """Everything that later verdicts depend on."""
        return {reason.value: series.state_dict() for reason, series in self._series.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Makes later verdicts, bit for bit, those that the saved detector would have given."""
        for reason, series in self._series.items():
            series.load_state_dict(state_dict[reason.value])


class DeviceSpikes:
    """`SpikeDetector` for a host that does not wait: the same rule, of tensors, on their device.

    Args:
        guard: windows and thresholds.
        device: of the parameters.
    Cost:
        Some twenty small kernels a step, no synchronisation.
    """

    def __init__(self, guard: Guard, device: torch.device) -> None:
        window, least = guard.spike_window, guard.spike_min_count
        self._scores = RollingZScore(2, window, min_count=least, clip=_CLIP, device=device)
        self._largest = torch.zeros(2, dtype=torch.float64, device=device)
        self._min_count = least
        thresholds = [guard.spike_z, guard.spike_grad_z]
        self._thresholds = torch.tensor(thresholds, dtype=torch.float64, device=device)
        self._ratio = guard.spike_warmup_ratio
        self.loss_z: float | None = None
        self.grad_norm_z: float | None = None

    def update(self, loss: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        """Takes in a step's numbers.

        Args:
            loss: () of the step.
            norm: () L2 norm of all gradients before clipping.
        Returns:
            (2, 2) float64: z of both, NaN where there is none; then 1 for each that is a spike.
        """
        device = self._largest.device
        pair = (
            x.detach().reshape(()).to(device, torch.float64, non_blocking=True)
            for x in (loss, norm)
        )
        values = torch.stack([*pair])
        is_finite = torch.isfinite(values)
        magnitudes = torch.where(is_finite, values.abs(), 0)
        is_warmup = self._scores.count < self._min_count
        is_over = is_warmup & (self._largest > 0) & (magnitudes > self._ratio * self._largest)
        grown = torch.maximum(self._largest, magnitudes)
        self._largest.copy_(torch.where(is_warmup & ~is_over, grown, self._largest))
        z = self._scores.push(torch.where(is_over, torch.nan, values))
        is_spike = is_over | (~is_warmup & (z > self._thresholds))
        return torch.stack([torch.where(is_warmup | ~is_finite, torch.nan, z), is_spike.double()])

    def note(self, found: np.ndarray[Any, Any]) -> tuple[Reason, ...]:
        """Takes in what `update` has returned, when it has come to the host."""
        known = [None if math.isnan(z) else float(z) for z in found[0]]
        self.loss_z, self.grad_norm_z = known
        kinds = zip((Reason.LOSS_SPIKE, Reason.GRADIENT_SPIKE), found[1], strict=True)
        return tuple([reason for reason, is_spike in kinds if is_spike])

    def state_dict(self) -> dict[str, Any]:
        """Everything that later verdicts depend on."""
        return {"largest": self._largest.clone(), "scores": self._scores.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Makes later verdicts, bit for bit, those that the saved detector would have given."""
        self._largest.copy_(state_dict["largest"])
        self._scores.load_state_dict(state_dict["scores"])


class _Series:
    def __init__(self, guard: Guard, threshold: float) -> None:
        self._scores = RollingZScore(
            1, guard.spike_window, min_count=guard.spike_min_count, clip=_CLIP
        )
        self._push = self._scores.push_float
        self._missing = self._min_count = guard.spike_min_count
        self._threshold = threshold
        self._ratio = guard.spike_warmup_ratio
        self._largest = 0.0
        self.z: float | None = None

    def is_spike(self, value: float) -> bool:
        self.z = None
        if not math.isfinite(value):
            return False
        if self._missing:
            return self._is_spike_in_warmup(value)
        self.z = self._push(value)
        return self.z > self._threshold

    def _is_spike_in_warmup(self, value: float) -> bool:
        magnitude = abs(value)
        if self._missing < self._min_count and magnitude > self._ratio * self._largest > 0:
            return True
        self._largest = max(self._largest, magnitude)
        self._missing -= 1
        self._push(value)
        return False

    def state_dict(self) -> dict[str, Any]:
        return {
            "missing": self._missing,
            "largest": self._largest,
            "scores": self._scores.state_dict(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._missing = state_dict["missing"]
        self._largest = state_dict["largest"]
        self._scores.load_state_dict(state_dict["scores"])
