"""What is made of tensors that may change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from torch import Tensor

Made = TypeVar("Made")


class Derived(Generic[Made]):
    """The same thing, until one of the tensors is another one, or was written to.

    Args:
        make: of the tensors.
    """

    def __init__(self, make: Callable[..., Made]) -> None:
        self._make = make
        self._of: list[tuple[Tensor, int]] = []
        self._made: list[Made] = []

    def of(self, *tensors: Tensor) -> Made:
        """What `make(*tensors)` gives."""
        is_same = len(tensors) == len(self._of) and all(
            tensor is seen and tensor._version == version
            for tensor, (seen, version) in zip(tensors, self._of, strict=True)
        )
        if is_same:
            return self._made[0]
        self._made = [self._make(*tensors)]
        # Tensors of inference mode do not say when they are written to.
        is_known = not any(t.is_inference() for t in tensors)
        self._of = [(t, t._version) for t in tensors] if is_known else []
        return self._made[0]

    def __deepcopy__(self, _: object) -> Derived[Made]:
        return Derived(self._make)
