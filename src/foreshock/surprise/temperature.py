"""How soft the choice of a code is, over the steps of a training run."""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol

from foreshock.surprise.coding import check_temperature


class HasTemperature(Protocol):
    """A model whose coding layers take a temperature: a `WrappedModel`."""

    def set_temperature(self, temperature: float) -> None:
        """Sets it, for all of them."""


@dataclasses.dataclass(frozen=True)
class FixedTemperature:
    """The same at every step.

    >>> FixedTemperature(0.5).apply(wrapped, step)
    """

    value: float = 1.0

    def __post_init__(self) -> None:
        check_temperature(self.value)

    def at(self, step: int) -> float:
        """The temperature of a step, counted from 0."""
        _check_step(step)
        return self.value

    def apply(self, model: HasTemperature, step: int) -> float:
        """Sets the model's temperature to that of the step, and returns it."""
        model.set_temperature(self.at(step))
        return self.at(step)


@dataclasses.dataclass(frozen=True)
class CosineTemperature:
    """`start` for `warmup_steps`, then down a half cosine to `end` at `total_steps`, then `end`.

    T(s) = end + (start - end) (1 + cos(pi (s - warmup) / (total - warmup))) / 2

    >>> schedule = CosineTemperature(2.0, 0.5, total_steps=1000, warmup_steps=100)
    >>> schedule.apply(wrapped, step)

    Args:
        start: finite, above 0, in units of squared distance.
        end: likewise.
        total_steps: more than warmup_steps.
        warmup_steps: from 0 up.
    Raises:
        ValueError: naming the argument, what it is and what is accepted.
    """

    start: float
    end: float
    total_steps: int
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} is {value}; accepted: a finite number above 0")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps is {self.warmup_steps}; accepted: from 0 up")
        if self.total_steps <= self.warmup_steps:
            raise ValueError(
                f"total_steps is {self.total_steps}; accepted: more than warmup_steps, "
                f"{self.warmup_steps}"
            )

    def at(self, step: int) -> float:
        """The temperature of a step, counted from 0."""
        _check_step(step)
        passed = (step - self.warmup_steps) / (self.total_steps - self.warmup_steps)
        cosine = math.cos(math.pi * min(max(passed, 0.0), 1.0))
        return self.end + (self.start - self.end) * (1 + cosine) / 2

    def apply(self, model: HasTemperature, step: int) -> float:
        """Sets the model's temperature to that of the step, and returns it."""
        model.set_temperature(self.at(step))
        return self.at(step)


def _check_step(step: int) -> None:
    if step < 0:
        raise ValueError(f"step is {step}; accepted: from 0 up")
