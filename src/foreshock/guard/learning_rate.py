"""A lower learning rate after a rollback, whatever scheduler sets it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


class LearningRateBackoff:
    """A factor that falls at a rollback and returns to 1 linearly.

    The factor is on the learning rate only while the optimizer's step runs. The scheduler never
    sees it: neither one that sets the rate anew from its own formula (LambdaLR) nor one that
    computes it from the last (CosineAnnealingLR) can undo it or compound it.

    Args:
        backoff: factor at a rollback, times the one that is still in force.
        recovery_steps: updates until the factor is 1 again.
    """

    def __init__(self, backoff: float, recovery_steps: int) -> None:
        self._backoff = backoff
        self._recovery_steps = recovery_steps
        self._lowest = 1.0
        self._updates = 0

    @property
    def factor(self) -> float:
        """Factor on the next update's learning rate."""
        if self._updates >= self._recovery_steps:
            return 1.0
        return self._lowest + (1.0 - self._lowest) * self._updates / self._recovery_steps

    def back_off(self) -> float:
        """Lowers the factor, and returns it."""
        self._lowest = self.factor * self._backoff
        self._updates = 0
        return self.factor

    @contextlib.contextmanager
    def applied_to(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Holds the factor on all parameter groups; counts an update."""
        factor = self.factor
        if factor == 1.0:
            yield
            return
        groups = optimizer.param_groups
        kept = [_scaled(group, factor) for group in groups]
        try:
            yield
        finally:
            for group, rate in zip(groups, kept, strict=True):
                _set(group, rate)
        self._updates += 1


def _scaled(group: dict[str, object], factor: float) -> object:
    """Scales a group's rate and returns what it was."""
    rate = group["lr"]
    if isinstance(rate, torch.Tensor):
        kept = rate.clone()
        rate.mul_(factor)  # in place: a captured graph reads this very tensor
        return kept
    assert isinstance(rate, float | int)
    group["lr"] = rate * factor
    return rate


def _set(group: dict[str, object], rate: object) -> None:
    now = group["lr"]
    if isinstance(now, torch.Tensor) and isinstance(rate, torch.Tensor):
        now.copy_(rate)
    else:
        group["lr"] = rate
