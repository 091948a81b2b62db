"""Nested containers of tensors: walked through, and copied out of the live state."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

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
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: copy_out(item) for key, item in value.items()}
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(copy_out(item) for item in value)
    return copy.deepcopy(value)


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


def tensors_in(value: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a nested container, with the dotted path to it."""
    return ((at, leaf) for at, leaf in leaves_in(value, path) if isinstance(leaf, torch.Tensor))
