"""Calls of other people's objects that go another way for a while."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any, NamedTuple


class _Wrapped(NamedTuple):
    owner: Any
    name: str
    before: Any
    """What the owner had under this name for itself; None: nothing, but its class had."""
    ours: Any


class WrappedCalls:
    """Methods of single objects that go through functions given here, until `undo`."""

    def __init__(self) -> None:
        self._wrapped: list[_Wrapped] = []
        self._is_undone = False

    def wrap(self, owner: Any, name: str, around: Callable[..., Any]) -> None:
        """From now on `owner.name(...)` is `around(inner, ...)`.

        Args:
            owner: an object; others of its class are left alone.
            name: of its method.
            around: given the method as it was, and what the call was given.
        """
        inner = getattr(owner, name)

        @functools.wraps(inner)
        def call(_: Any, *args: Any, **kwargs: Any) -> Any:
            return inner(*args, **kwargs) if self._is_undone else around(inner, *args, **kwargs)

        # Bound, as those expect who wrap a method themselves (schedulers do).
        ours = types.MethodType(call, owner)
        self._wrapped.append(_Wrapped(owner, name, vars(owner).get(name), ours))
        setattr(owner, name, ours)

    def undo(self) -> None:
        """Puts back what was wrapped; where somebody has wrapped ours since, ours lets all pass."""
        self._is_undone = True
        for owner, name, before, ours in reversed(self._wrapped):
            if vars(owner).get(name) is not ours:
                continue
            if before is None:
                delattr(owner, name)
            else:
                setattr(owner, name, before)
