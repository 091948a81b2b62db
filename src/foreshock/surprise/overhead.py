"""What coding costs beside the layers that it listens to, counted (benchmarks: measured)."""

from __future__ import annotations

import dataclasses
import math

from torch import nn

from foreshock.surprise.coding import Coder, CodingLayer
from foreshock.surprise.traces import CodingTrace
from foreshock.surprise.wrapped_model import WrappedModel

EXP_COST = 10
"""Multiply-adds that an exponential is counted as: a polynomial of degree 6 or so and its range."""


@dataclasses.dataclass(frozen=True)
class LayerOverhead:
    """Multiply-adds of one layer's calls in a forward pass."""

    layer: str
    own: int
    """The layer's."""
    pooling: int
    """B C H W additions of pooling over height and width; 0 for positions."""
    projection: int
    """B O D."""
    distances: int
    """2 B K D: a difference and a square of it each."""
    softmax: int
    """B K (EXP_COST + 2), for p, its sum and the entropy."""

    @property
    def coding(self) -> int:
        """All but the layer's own."""
        return self.pooling + self.projection + self.distances + self.softmax

    @property
    def ratio(self) -> float:
        """Coding over the layer's own."""
        return self.coding / self.own


def estimate(model: WrappedModel) -> tuple[LayerOverhead, ...]:
    """The cost of the model's last forward pass by layer, calls of a layer added up.

    Layers that do not code, activations and attention are not counted: over the whole model the
    ratio is smaller. Time differs from arithmetic: small operations wait for memory and dispatch.

    Args:
        model: called before, with coding enabled.
    Raises:
        RuntimeError: no layer has coded anything.
    """
    layers = model.layers
    traces = model.traces
    if not traces:
        raise RuntimeError("no layer has coded anything; call the wrapped model first")
    found: dict[str, LayerOverhead] = {}
    for trace in traces:
        name = trace.meta.layer
        new = _of_call(layers[name], trace)
        old = found.get(name)
        found[name] = new if old is None else _sum(old, new)
    return tuple(found.values())


def _of_call(layer: CodingLayer, trace: CodingTrace) -> LayerOverhead:
    coder: Coder = layer.coding
    rows = trace.soft_code.best_index.numel()
    codes, dim = coder.codebook.codes, coder.codebook.dim
    width = layer.weight.shape[0]
    positions = math.prod(trace.meta.output_shape) // width
    kernel = math.prod(layer.weight.shape[1:])
    is_pooled = isinstance(layer, nn.Conv2d) and coder.pooling != "positions"
    return LayerOverhead(
        layer=trace.meta.layer,
        own=positions * width * kernel,
        pooling=positions * width if is_pooled else 0,
        projection=0 if coder.projection is None else rows * width * dim,
        distances=2 * rows * codes * dim,
        softmax=rows * codes * (EXP_COST + 2),
    )


def _sum(a: LayerOverhead, b: LayerOverhead) -> LayerOverhead:
    numbers = [f.name for f in dataclasses.fields(a) if f.name != "layer"]
    return dataclasses.replace(a, **{n: getattr(a, n) + getattr(b, n) for n in numbers})
