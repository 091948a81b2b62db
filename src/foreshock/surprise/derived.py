"""What is made of tensors that may change."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, Generic, TypeVar

Made = TypeVar("Made")


class Derived(Generic[Made]):
    """The same thing, until one of the tensors is another one, or was written to.

    Args:
        make: of the tensors.
    """

    def __init__(self, make: Callable[..., Made]) -> None:
        self._make = make
        self._seen: tuple[Any, ...] = ()
        self._versions: list[tuple[int, int]] = []
        self._made: list[Made] = []

    def of(self, *tensors: Any) -> Made:
        """What `make(*tensors)` gives."""
        try:
            # `module.to` gives a parameter other memory, which is no other version.
            versions = [(tensor._version, tensor.data_ptr()) for tensor in tensors]
        except RuntimeError:  # tensors of inference mode do not say when they are written to
            return self._make(*tensors)
        if versions != self._versions or not all(map(operator.is_, tensors, self._seen)):
            self._made = [self._make(*tensors)]
            self._seen, self._versions = tensors, versions
        return self._made[0]

    def __deepcopy__(self, _: object) -> Derived[Made]:
        return Derived(self._make)
