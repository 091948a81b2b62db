"""What an assigner is bound to, and what it answers: shared by its implementations."""

from __future__ import annotations

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
    """An implementation with the frame it was bound to. Rows are (N, D), their features dense."""

    def quick_distance(self, x: Tensor) -> Tensor | None:
        """(...): the same of x (..., D), if it can be had without a closer look at x."""

    def distance(self, x_ND: Tensor) -> Tensor:
        """(N,): the squared distance to the nearest center."""

    def assign(self, x_ND: Tensor, is_mapped_wanted: bool) -> Assignment:
        """All of it."""
