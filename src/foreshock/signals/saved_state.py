"""Checks of what a stream is asked to go on from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from foreshock.signals.given_numbers import as_finite, as_series


def check_settings(state_dict: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    """Raises ValueError unless the state is of a stream with these very settings."""
    given = state_dict["settings"]
    if given != mine:
        raise ValueError(f"state_dict['settings'] is {given!r}; accepted: {dict(mine)!r}")


def saved_floats(
    state_dict: Mapping[str, Any], key: str, at_most: int, exactly: int | None = None
) -> list[float]:
    """A saved window: finite numbers, no more than fit.

    Raises:
        KeyError: there is none.
        TypeError, ValueError: it is none, or one of another size.
    """
    name = f"state_dict[{key!r}]"
    series = as_series(state_dict[key], name)
    accepted = f"up to {at_most}" if exactly is None else str(exactly)
    if len(series) > at_most or (exactly is not None and len(series) != exactly):
        raise ValueError(f"{name} holds {len(series)} values; accepted: {accepted}")
    if not np.isfinite(series).all():
        raise ValueError(f"{name} holds values that are not finite; accepted: finite ones")
    floats: list[float] = series.tolist()
    return floats


def saved_number(state_dict: Mapping[str, Any], key: str) -> float | None:
    """A saved finite number, or None.

    Raises:
        KeyError: it is missing.
        TypeError, ValueError: it is neither.
    """
    value = state_dict[key]
    return None if value is None else as_finite(value, f"state_dict[{key!r}]")
