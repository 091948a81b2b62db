"""Nested containers of tensors: walked through, and copied out of the live state."""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch


def copy_out(value: Any) -> Any:
    """Deep copy of nested containers, tensors detached and in host memory.

    Args:
        value: mappings, lists and tuples, nested; anything else in them is deep-copied.
    Returns:
        Plain containers that share no memory with `value`.
    Cost:
        One copy of every tensor; waits for the device that a tensor is on.
    """
    return copy_with(value, lambda t: t.detach().to("cpu", copy=True))


def copy_with(value: Any, of_tensor: Callable[[torch.Tensor], Any]) -> Any:
    """Deep copy of nested containers, with something else in the place of each tensor.

    Args:
        value: as for `copy_out`.
        of_tensor: gives what takes a tensor's place; asked in the order of `tensors_in`.
    """
    if isinstance(value, torch.Tensor):
        return of_tensor(value)
    if isinstance(value, Mapping):
        copied = {key: copy_with(item, of_tensor) for key, item in value.items()}
        if isinstance(value, Counter):
            return Counter(copied)
        return OrderedDict(copied) if isinstance(value, OrderedDict) else copied
    if isinstance(value, tuple) and hasattr(value, "_make"):
        return value._make(copy_with(item, of_tensor) for item in value)
    if isinstance(value, list | tuple):
        if _are_numbers(value):
            return type(value)(value)
        return type(value)(copy_with(item, of_tensor) for item in value)
    return value if type(value) in _NUMBERS else copy.deepcopy(value)


def leaves_in(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Everything in nested mappings, lists and tuples that is none of these, with a dotted path."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves_in(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from leaves_in(item, f"{path}.{i}" if path else str(i))
    else:
        yield path, value


def arrays_in(
    value: Any, path: str = ""
) -> Iterator[tuple[str, torch.Tensor | np.ndarray[Any, Any]]]:
    """Every tensor and NumPy array of a nested container, with the dotted path to it.

    Cost: a microsecond or two each; long lists of numbers are passed over.
    """
    if isinstance(value, torch.Tensor | np.ndarray):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if type(item) not in _NUMBERS:
                yield from arrays_in(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple) and not _are_numbers(value):
        for i, item in enumerate(value):
            yield from arrays_in(item, f"{path}.{i}" if path else str(i))


def tensors_in(value: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a nested container, with the dotted path to it."""
    return ((at, leaf) for at, leaf in arrays_in(value, path) if isinstance(leaf, torch.Tensor))


_NUMBERS = frozenset({bool, int, float, str, bytes, type(None)})


def _are_numbers(values: list[Any] | tuple[Any, ...]) -> bool:
    """Whether all that is in a list is of a kind that can neither change nor hold a tensor."""
    return _NUMBERS.issuperset(map(type, values))
