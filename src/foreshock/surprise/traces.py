"""What coding layers say of one forward pass."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from torch import Tensor

from foreshock.ops import SoftCode


@dataclasses.dataclass(frozen=True)
class TraceMeta:
    """Which call of which layer a trace is of."""

    layer: str
    """Dotted name in the model that was wrapped."""
    call: int
    """0 for the layer's first call in a forward pass, 1 for the second, ..."""
    temperature: float
    """Of the softmax over codes, in squared distance."""
    output_shape: tuple[int, ...]
    """Of what the layer put out, before pooling."""

    @property
    def key(self) -> str:
        """The layer's name, with #2, #3, ... behind it for its second call and so on."""
        return f"{self.layer}#{self.call + 1}" if self.call else self.layer


@dataclasses.dataclass(frozen=True, eq=False)
class CodingTrace:
    """What one call of a coding layer was coded as.

    (...) is the shape of what is coded: (N,) after pooling over height and width, (N, H, W) for a
    convolution's positions, and all but the last dimension of a linear layer's output.
    """

    reduced: Tensor
    """(..., D): the features that were compared with the centers."""
    soft_code: SoftCode
    """Every field (...), float32 or, of float64 layers, float64; probs is None."""
    meta: TraceMeta


class Call(NamedTuple):
    """A trace as tensors alone, as they are noted while the model runs."""

    layer: str
    temperature: Tensor
    betas: tuple[float, float, float]
    output_shape: tuple[int, ...]
    reduced: Tensor
    best_index: Tensor
    distance: Tensor
    length: Tensor
    entropy: Tensor

    def detached(self) -> Call:
        """The same without the graph."""
        return Call(*self[:4], *(part.detach() for part in self[4:]))

    def soft_code(self) -> SoftCode:
        """The same with S, which is computed for those who ask."""
        of_length, of_entropy, of_distance = self.betas
        surprise = of_length * self.length + of_entropy * self.entropy
        if of_distance != 0:
            surprise = surprise + of_distance * self.distance.log1p()
        return SoftCode(*self[5:], surprise=surprise, probs=None)


class Recording:
    """What the layers of one wrapped model share: whether they code, and what was noted."""

    def __init__(self) -> None:
        self.is_enabled = True
        self.bypasses = 0
        self.is_open = False
        self.calls: list[Call] = []

    @property
    def is_coding(self) -> bool:
        """Whether layers code what they put out."""
        return self.is_enabled and self.bypasses == 0

    def traces(self) -> list[CodingTrace]:
        """Of all calls noted, in their order."""
        seen: dict[str, int] = {}
        traces = []
        for call in self.calls:
            count = seen.get(call.layer, 0)
            seen[call.layer] = count + 1
            meta = TraceMeta(call.layer, count, call.temperature.item(), call.output_shape)
            traces.append(CodingTrace(call.reduced, call.soft_code(), meta))
        return traces

    def __getstate__(self) -> dict[str, Any]:
        """A copy starts without notes: tensors in a graph cannot be copied."""
        return {**self.__dict__, "calls": [], "is_open": False}
