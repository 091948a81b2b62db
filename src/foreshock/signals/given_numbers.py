"""What the noise signals accept as a number and as a series of numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from foreshock.signals.risk import as_floats
from foreshock.signals.trend import Floats


def as_series(values: ArrayLike | Iterable[float], name: str) -> Floats:
    """(n,) one series in host memory and double precision, whatever it came in.

    Args:
        values: a tensor of any device (detached), an array, or an iterable of numbers or of tensors
            of one number each.
        name: the argument's name, for the message.
    Raises:
        TypeError: not real numbers.
        ValueError: not one-dimensional.
    Cost:
        One copy from the device, even of a sequence of tensors, if all of them are on the same.
    """
    try:
        given = np.asarray(_on_the_host(values))
    except (TypeError, ValueError, RuntimeError) as error:
        raise _not_a_series(values, name, str(error)) from None
    if given.dtype.kind not in "biuf":
        raise _not_a_series(values, name, f"it holds {given.dtype}")
    return as_floats(given, name)


def as_number(value: Any, name: str) -> float:
    """One number, finite or not; of a tensor or an array of one element that element.

    Raises:
        TypeError: not a number.
    """
    if type(value) is float:
        return value
    given = value.detach() if isinstance(value, torch.Tensor) else value
    try:
        if isinstance(given, (str, bytes)):
            raise TypeError
        return float(given)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} is {value!r}; accepted: a number") from None


def as_finite(value: Any, name: str, accepted: str = "a finite number") -> float:
    """One finite number.

    Raises:
        TypeError: not a number.
        ValueError: not finite.
    """
    number = as_number(value, name)
    if not math.isfinite(number):
        raise ValueError(f"{name} is {number}; accepted: {accepted}")
    return number


def as_positive(value: Any, name: str) -> float:
    """One finite number over 0.

    Raises:
        TypeError: not a number.
        ValueError: not finite, or not over 0.
    """
    number = as_finite(value, name, "a finite number over 0")
    if number <= 0:
        raise ValueError(f"{name} is {number}; accepted: a finite number over 0")
    return number


def as_count(value: Any, name: str, at_least: int = 1) -> int:
    """One integer, not under a bound.

    Raises:
        TypeError: not an integer.
        ValueError: under the bound.
    """
    accepted = f"an integer of at least {at_least}"
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; accepted: {accepted}")
    if value < at_least:
        raise ValueError(f"{name} is {value}; accepted: {accepted}")
    return int(value)


def _on_the_host(values: Any) -> Any:
    if not isinstance(values, torch.Tensor) and not hasattr(values, "__array__"):
        values = list(values)
        if values and all(isinstance(value, torch.Tensor) for value in values):
            values = torch.stack([value.detach() for value in values])
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        # NumPy has no bfloat16; what it does have keeps its kind, for the check of it.
        values = values.double() if values.is_floating_point() else values
    return values


def _not_a_series(values: object, name: str, why: str) -> TypeError:
    return TypeError(
        f"{name} is a {type(values).__name__} that is no series of numbers ({why}); accepted: a "
        "sequence, an array or a tensor of real numbers"
    )
