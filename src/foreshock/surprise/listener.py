"""Hears the layers of a model while forwards run, and keeps what their codes make of it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from foreshock.surprise.aggregation import (
    check_weights,
    max_of_layers,
    max_surprise,
    mean_of_layers,
    mean_surprise,
    weighted_mean_of_layers,
    weighted_surprise,
)
from foreshock.surprise.layer_codes import LayerCodes
from foreshock.surprise.model_input import MaskSource
from foreshock.surprise.outputs import (
    Reduction,
    are_rows,
    check_reduction,
    over_positions,
    rows_of,
)
from foreshock.surprise.scores import Parts

Aggregation: TypeAlias = Literal["mean", "max", "weighted"]


@dataclasses.dataclass(frozen=True)
class Reading:
    """How outputs are read, and what is made of the layers' surprise."""

    aggregation: Aggregation = "mean"
    """Over layers: "mean", "max", or "weighted" by `weights`."""
    weights: Mapping[str, float] | None = None
    """By layer."""
    batch_dim: int = 0
    """Where samples are in the inputs, and in outputs of more than two dimensions."""
    reduce_positions: Reduction = "mean"
    """Over the positions of a layer that has some."""
    mask: MaskSource = None
    """Where in a loader's batch it says which positions count."""

    def __post_init__(self) -> None:
        check_reduction(self.reduce_positions)
        if self.aggregation not in ("mean", "max", "weighted"):
            raise ValueError(
                f"aggregation is {self.aggregation!r}; accepted: 'mean', 'max', 'weighted'"
            )
        if (self.weights is not None) != (self.aggregation == "weighted"):
            raise ValueError(
                f"weights is {self.weights!r} with aggregation {self.aggregation!r}; accepted: a "
                "number per layer with 'weighted', and None otherwise"
            )

    def to_json_object(self) -> dict[str, Any]:
        """What the same reading can be made of, but for a mask that is a function."""
        mask = None if callable(self.mask) else self.mask
        return dataclasses.asdict(dataclasses.replace(self, mask=mask))

    def aggregate(self, per_layer: Mapping[str, Tensor]) -> Tensor:
        """(N,): the score of samples."""
        if self.weights is not None:
            return weighted_surprise(per_layer, self.weights)
        return max_surprise(per_layer) if self.aggregation == "max" else mean_surprise(per_layer)

    def aggregate_rows(self, rows_LN: Tensor, names: list[str]) -> Tensor:
        """(N,): the same of layers that are aligned, in the order of their names."""
        if self.weights is not None:
            check_weights(self.weights, names)
            return weighted_mean_of_layers(rows_LN, [self.weights[name] for name in names])
        return max_of_layers(rows_LN) if self.aggregation == "max" else mean_of_layers(rows_LN)


class Heard(NamedTuple):
    """What the codes make of one call of a layer, at every position."""

    parts: Parts
    """Each (N,) or (N, P)."""
    mask: Tensor | None
    """(N, P) bool: which positions count; None if all do."""


class Listener:
    """The components of every layer of every sample that ran while it listened.

    Args:
        codes: of every layer, and of every call of it in a forward, in their order.
        reading: how outputs are read.
        mask: (N, T) bool, which positions count, of each forward.
        has_codes: whether L and H are wanted beside D.
    """

    def __init__(
        self,
        codes: list[LayerCodes],
        reading: Reading,
        mask: Tensor | None,
        has_codes: bool = False,
    ) -> None:
        self._codes = codes
        self._calls: dict[str, list[LayerCodes]] = {}
        for one in codes:
            self._calls.setdefault(one.layer, []).append(one)
        self._reading = reading
        self._mask = mask
        self._has_codes = has_codes
        self._takes_positions = mask is None and reading.batch_dim == 0
        self._forwards: list[dict[str, list[Heard]]] = [{}]
        self._fault: Exception | None = None

    def begin_forward(self) -> None:
        """What is heard from here on are other samples."""
        if self._forwards[-1]:
            self._forwards.append({})

    def hear(self, layer: str, module: nn.Module, output: object) -> None:
        """Takes in one output of a layer; a fault is kept for who asks, and not raised here."""
        if self._fault is not None:
            return
        try:
            heard = self._forwards[-1].setdefault(layer, [])
            heard.append(self._heard(layer, len(heard), module, output))
        except Exception as error:  # watching does not break what is watched
            self._fault = error

    @property
    def has_heard(self) -> bool:
        """Whether any layer was called."""
        return self._fault is not None or any(self._forwards)

    def parts(self) -> dict[str, Parts]:
        """By layer, each (N,): of all samples in the order in which they ran.

        Raises:
            TypeError, ValueError: what was heard cannot be judged; naming the layer.
            RuntimeError: nothing was heard.
        """
        if self._fault is not None:
            raise self._fault
        heard = [self._by_name(forward) for forward in self._forwards if forward]
        if not heard:
            raise RuntimeError(
                "no layer was called while listening; accepted: a forward of the model that was "
                "fitted, or of its parts, uncompiled"
            )
        reduction = self._reading.reduce_positions
        return joined([by_sample(forward, reduction) for forward in heard])

    def _heard(self, layer: str, call: int, module: nn.Module, output: object) -> Heard:
        calls = self._calls[layer]
        if call >= len(calls):
            raise ValueError(
                f"layer {layer!r} was called more than {len(calls)} times in a forward; accepted: "
                f"{len(calls)}, as fitted; each call of the model itself begins a forward"
            )
        if are_rows(output, module, self._takes_positions):
            return Heard(calls[call].measure(output, self._has_codes), None)
        rows, mask = rows_of(layer, module, output, self._reading.batch_dim, self._mask)
        return Heard(calls[call].measure(rows, self._has_codes), mask)

    def _by_name(self, forward: Mapping[str, list[Heard]]) -> dict[str, Heard]:
        found: dict[str, Heard] = {}
        for layer, calls in self._calls.items():
            heard = forward.get(layer, [])
            if len(heard) < len(calls):
                raise ValueError(
                    f"layer {layer!r} was called {len(heard)} times in a forward; accepted: "
                    f"{len(calls)}, as fitted"
                )
            found.update({one.name: each for one, each in zip(calls, heard, strict=True)})
        return found


def by_sample(heard: Mapping[str, Heard], reduction: Reduction) -> dict[str, Parts]:
    """What was heard in one forward, over positions; layers that are alike are taken together."""
    found = {name: one.parts for name, one in heard.items()}
    alike: dict[object, list[str]] = {}
    for name, (first, *_) in found.items():
        if first.dim() > 1:
            kind = first.shape, first.device, id(heard[name].mask)
            alike.setdefault(kind, []).append(name)
    for names in alike.values():
        parts, mask = heard[names[0]]
        stacked = torch.stack([part for name in names for part in found[name]])
        reduced = over_positions(stacked, mask, reduction).unbind()
        for i, name in enumerate(names):
            found[name] = reduced[i * len(parts) : (i + 1) * len(parts)]
    return found


class Listening:
    """A context in which `hear(name, module, output)` is called after each forward of a module.

    Args:
        model: `begin_forward()` is called before each forward of it.
        modules: that are heard, by name.
        hear: changes nothing.
        begin_forward: likewise.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        hear: Callable[[str, nn.Module, object], None],
        begin_forward: Callable[[], None],
    ) -> None:
        self._key = next(_KEYS)
        self._hooks: list[tuple[dict[int, Any], Callable[..., None]]] = [
            (model._forward_pre_hooks, lambda *_: begin_forward())
        ]
        for name, module in modules.items():
            self._hooks.append((module._forward_hooks, _hook(name, hear)))

    def __enter__(self) -> None:
        for place, hook in self._hooks:
            place[self._key] = hook

    def __exit__(self, *_: object) -> None:
        for place, _hook in self._hooks:
            place.pop(self._key, None)


# What `register_forward_hook` costs for each layer is a good part of what a short look costs at
# all. Its keys count from 0 up.
_KEYS = itertools.count(-1, -1)


def _hook(name: str, hear: Callable[[str, nn.Module, object], None]) -> Callable[..., None]:
    return lambda module, _, output: hear(name, module, output)


def joined(forwards: list[dict[str, Parts]]) -> dict[str, Parts]:
    """The parts of all samples of some forwards, at least one."""
    if len(forwards) == 1:
        return forwards[0]
    return {
        name: tuple(map(torch.cat, zip(*(forward[name] for forward in forwards), strict=True)))
        for name in forwards[0]
    }
