"""What is said of a batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

from torch import Tensor

Item = TypeVar("Item")


class ByLayer(Mapping[str, Item]):
    """Something of each layer, made when it is looked at.

    Args:
        names: of the layers.
        make: of the layer's place among them.
    """

    def __init__(self, names: Sequence[str], make: Callable[[int], Item]) -> None:
        self._names = names
        self._make = make

    def __getitem__(self, name: str) -> Item:
        if name not in self._names:
            raise KeyError(name)
        return self._make(self._names.index(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __repr__(self) -> str:
        return repr(dict(self))


Parts = tuple[Tensor, ...]
"""D, or D, L and H: of one layer, or a row for each of several."""


@dataclasses.dataclass(frozen=True, eq=False)
class LayerComponents:
    """What the score of one layer is made of: `soft_assign` of its whitened output. All (N,).

    Of a layer with positions each is reduced over these like the score.
    """

    distance: Tensor
    """D: squared distance to the nearest code, in units of the spread within clusters."""
    length: Tensor | None = None
    """L: code length in nats. Falls far from every code: never a score by itself. None from a
    probe that was not asked for it."""
    entropy: Tensor | None = None
    """H: entropy over codes in nats. Falls far from every code: never a score by itself. None from
    a probe that was not asked for it."""


@dataclasses.dataclass(frozen=True, eq=False)
class Surprise:
    """How unlike the data that was fitted each of N samples is."""

    score: Tensor
    """(N,) float32: aggregate of `per_layer`; higher is stranger; NaN if a layer was not finite."""
    percentile: Tensor
    """(N,) float64: share of held-out normal data that scores no higher, 0 to 1."""
    per_layer: Mapping[str, Tensor]
    """By layer, (N,) float32: standard deviations above the mean of held-out normal data."""
    is_ood: Tensor
    """(N,) bool: whether the score is above the calibrated threshold, or NaN."""
    components: Mapping[str, LayerComponents] = dataclasses.field(default_factory=dict)
    """By layer: what the score is made of, where it is known."""

    def __len__(self) -> int:
        return len(self.score)
