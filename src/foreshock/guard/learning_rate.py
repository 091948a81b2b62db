"""A lower learning rate after a rollback, whatever scheduler sets it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

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
        self._updates = recovery_steps

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

    def note_update(self) -> None:
        """An update was made with the factor."""
        self._updates += 1

    def state_dict(self) -> dict[str, float]:
        """The factor in force; a rollback leaves it, only another process takes it over."""
        return {"lowest": self._lowest, "updates": self._updates}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on recovering from there."""
        self._lowest = state_dict["lowest"]
        self._updates = state_dict["updates"]

    @contextlib.contextmanager
    def applied_to(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Holds the factor on all parameter groups while one update runs, and counts it."""
        kept = [(group, group["lr"]) for group in optimizer.param_groups if "lr" in group]
        # Groups may share one tensor, which must be scaled once.
        shared = {id(rate): rate for _, rate in kept if isinstance(rate, torch.Tensor)}
        values = [(rate, rate.clone()) for rate in shared.values()]
        try:
            for rate in shared.values():
                rate.mul_(self.factor)  # in place: a captured graph reads this very tensor
            for group, rate in kept:
                if not isinstance(rate, torch.Tensor) and rate is not None:
                    group["lr"] = rate * self.factor
            yield
            self.note_update()
        finally:
            _put_back(kept, values)


class RateBehindFunctions:
    """The same factor on a learning rate that only two functions reach.

    A schedule may set the rate anew from its own formula whenever it likes: what is read and is not
    what was set here is taken to be the schedule's. One that computes the rate from the last would
    compound the factor.

    Args:
        get, set_: the rate.
        backoff: the factor.
    """

    def __init__(
        self,
        get: Callable[[], Any],
        set_: Callable[[float], object],
        backoff: LearningRateBackoff,
    ) -> None:
        self._get = get
        self._set = set_
        self._backoff = backoff
        self._scheduled = 0.0
        self._was_set: float | None = None
        """What the rate was read to be after it was set here; None: it is the schedule's."""

    @property
    def scheduled(self) -> float:
        """The rate without the factor."""
        now = float(self._get())
        return self._scheduled if now == self._was_set else now

    @property
    def in_force(self) -> float:
        """The rate with the factor."""
        return self.scheduled * self._backoff.factor

    def back_off(self) -> float:
        """Lowers the factor, and returns it."""
        self._backoff.back_off()
        self.apply()
        return self._backoff.factor

    def note_update(self) -> None:
        """An update was made; the factor of the next one is in force from now on."""
        self._backoff.note_update()
        self.apply()

    def apply(self) -> None:
        """Puts the factor on the rate; without one, leaves the rate alone."""
        factor = self._backoff.factor
        if factor == 1.0 and self._was_set is None:
            return
        scheduled = self.scheduled
        self._set(scheduled * factor)
        self._scheduled = scheduled
        self._was_set = None if factor == 1.0 else float(self._get())

    @contextlib.contextmanager
    def at_rest(self) -> Iterator[None]:
        """Takes the factor off the rate, as it belongs to no snapshot."""
        if self._was_set is not None:
            self._set(self.scheduled)
        yield
        self.apply()


def _put_back(
    kept: list[tuple[dict[str, Any], Any]], values: list[tuple[torch.Tensor, torch.Tensor]]
) -> None:
    for group, rate in kept:
        group["lr"] = rate
    for rate, value in values:
        rate.copy_(value)
