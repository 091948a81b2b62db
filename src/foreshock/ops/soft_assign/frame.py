"""What an assigner is bound to, and what it answers: shared by its implementations."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from torch import Tensor


class Frame(NamedTuple):
    """Tensors of the type that is computed in, float64 or float32, on one device."""

    centers: Tensor
    """(K, E), contiguous."""
    offset: Tensor | None
    """(D,), contiguous."""
    basis: Tensor | None
    """(D, E), of any strides."""
    temperature: float
    eps: float

    @property
    def inputs(self) -> int:
        """D; E without a basis."""
        return self.centers.shape[1] if self.basis is None else len(self.basis)


class Assignment(NamedTuple):
    """The codes of x (..., D); every field is (...) but `mapped`."""

    best_index: Tensor
    """int64: the nearest center; the first of those that are equally near."""
    distance: Tensor
    """Squared distance to it."""
    length: Tensor
    """L = -log(p_best + eps), in nats."""
    entropy: Tensor
    """H = -sum_k p_k log(p_k + eps), in nats."""
    mapped: Tensor | None
    """(..., E): (x - offset) @ basis, if it was asked for."""


class BoundAssigner(Protocol):
    """An implementation with the frame it was bound to."""

    @property
    def looks_first(self) -> bool:
        """Whether x may be anything: the answer is None where it cannot be read as it lies.
        Otherwise x has to be (N, D) with dense rows, of a type that the op takes."""

    def refresh(self) -> None:
        """Takes over what the frame's tensors hold now."""

    def distance(self, x: Tensor) -> Tensor | None:
        """(...): the squared distance of x (..., D) to the nearest center."""

    def assign(self, x: Tensor, is_mapped_wanted: bool) -> Assignment | None:
        """All of it."""

    def writer(self, out: Tensor) -> Callable[[object], bool] | None:
        """What writes the distance of anything to `out`, where `looks_first`; else None."""
