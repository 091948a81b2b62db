"""From the history of a condition number to a level of risk."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from foreshock.signals.configuration import RiskThresholds, Scale
from foreshock.signals.trend import Floats, Lines, fit_lines


class RiskLevel(enum.IntEnum):
    """How the spectrum of the weights moves; a higher level compares greater."""

    STABLE = 0
    LEARNING = 1
    WARNING = 2
    DANGER = 3
    INSTABILITY = 4


def slope(
    history: ArrayLike,
    steps: ArrayLike | None = None,
    *,
    window: int = 50,
    scale: Scale = "relative",
) -> float | None:
    """Least-squares slope per step over the last observations.

    slope = sum (x - mean x)(y - mean y) / sum (x - mean x)^2, y = ln history ("relative") or
    history ("absolute"), x = steps

    Args:
        history: (n,) condition numbers, oldest first; those not finite or not over 0 are left out.
        steps: (n,) training steps of the observations, rising; default 0, 1, 2, ...
        window: how many of the last observations count, at least 3.
        scale: whether the slope is relative (1/step) or absolute (kappa/step).
    Returns:
        None with fewer than 3 observations.
    Raises:
        TypeError, ValueError: naming the argument, what was given and what is accepted.
    Cost:
        O(window).
    Source:
        Ordinary least squares.
    """
    lines = _fit(history, steps, window, scale)
    return float(lines.slope[0, 0]) if lines.is_known[0] else None


def volatility(
    history: ArrayLike,
    steps: ArrayLike | None = None,
    *,
    window: int = 50,
    scale: Scale = "relative",
) -> float | None:
    """Standard deviation over the last observations; a steady trend alone is not volatile.

    relative: sqrt(mean (ln history - line)^2), where line is the fit of `slope`
    absolute: sqrt(mean (history - mean history)^2)

    Args:
        history, steps, window: as for `slope`.
        scale: whether the spread is relative (no unit, around the line) or absolute (of kappa,
            around the mean).
    Returns:
        None with fewer than 3 observations. Both deviations divide by n (ddof 0).
    Raises:
        TypeError, ValueError: naming the argument, what was given and what is accepted.
    Cost:
        O(window).
    Source:
        Ordinary least squares.
    """
    lines = _fit(history, steps, window, scale)
    return float(lines.spread[0]) if lines.is_known[0] else None


def risk_level(
    slope: float | None, volatility: float | None, thresholds: RiskThresholds | None = None
) -> RiskLevel | None:
    """The level that a slope and a volatility stand for.

    INSTABILITY if volatility > thresholds.instability, else by |slope|: DANGER if > danger,
    WARNING if > warning, LEARNING if > learning, else STABLE

    Args:
        slope: per step; None if not known.
        volatility: in the same scale; None if not known.
        thresholds: default `RiskThresholds()`.
    Returns:
        None if either is None. A NaN exceeds every threshold: what cannot be measured is not calm.
    Cost:
        Some microseconds.
    """
    if slope is None or volatility is None:
        return None
    levels = risk_levels(np.float64(slope), np.float64(volatility), thresholds or RiskThresholds())
    return RiskLevel(int(levels))


def risk_levels(
    slope: Floats | np.float64, volatility: Floats | np.float64, thresholds: RiskThresholds
) -> NDArray[np.int8]:
    """`risk_level` of arrays, as numbers."""
    bounds = (thresholds.learning, thresholds.warning, thresholds.danger)
    # Counts the bounds that |slope| exceeds; a NaN is sorted behind them all.
    by_slope = np.searchsorted(bounds, np.abs(slope), side="left")
    is_calm = volatility <= thresholds.instability
    return np.where(is_calm, by_slope, RiskLevel.INSTABILITY).astype(np.int8)


def _fit(history: ArrayLike, steps: ArrayLike | None, window: int, scale: Scale) -> Lines:
    if scale not in get_args(Scale):
        raise ValueError(f"scale is {scale!r}; accepted: {', '.join(map(repr, get_args(Scale)))}")
    if not isinstance(window, int) or window < 3:
        raise ValueError(f"window is {window!r}; accepted: an integer of at least 3")
    y = as_floats(history, "history")
    x = np.arange(len(y), dtype=np.float64) if steps is None else as_floats(steps, "steps")
    if len(x) != len(y):
        raise ValueError(f"steps holds {len(x)} values; accepted: {len(y)}, as many as history")
    if not (np.diff(x) > 0).all():
        raise ValueError("steps do not rise; accepted: each greater than the one before")
    is_observed = np.isfinite(y) & (y > 0)
    x, y = x[is_observed][-window:], y[is_observed][-window:]
    if scale == "relative":
        y = np.log(y)
    from_last = x - x[-1] if len(x) else x
    return fit_lines(
        from_last[None],
        y[None, None],
        np.ones((1, len(x))),
        np.array([len(x)]),
        is_around_line=scale == "relative",
    )


def as_floats(values: ArrayLike | Sequence[float], name: str) -> Floats:
    """One series of numbers in double precision.

    Args:
        values: a sequence, an array or a tensor in host memory.
        name: the argument's name, for the message.
    Raises:
        TypeError: not numbers, or not on the host.
        ValueError: not one-dimensional.
    """
    given: Any = values
    try:
        floats = np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{name} is a {type(given).__name__} that NumPy cannot read ({error}); accepted: a "
            "sequence of numbers, an array, or a tensor in host memory"
        ) from None
    if floats.ndim != 1:
        raise ValueError(f"{name} has shape {floats.shape}; accepted: one dimension")
    return floats
