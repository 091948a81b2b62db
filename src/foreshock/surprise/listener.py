"""Hears the layers of a model while forwards run, and keeps what their codes make of it."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from foreshock.ops.calibrated_scores import Aggregation
from foreshock.surprise.aggregation import (
    check_weights,
    max_surprise,
    mean_surprise,
    shares,
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

    def layer_weights(self, names: list[str], device: torch.device) -> Tensor | None:
        """(L,) float64, of sum 1, in the order of the names; None if all count alike."""
        if self.weights is None:
            return None
        check_weights(self.weights, names)
        return shares([self.weights[name] for name in names]).to(device)


class Heard(NamedTuple):
    """What the codes make of one call of a layer, at every position."""

    parts: Parts
    """Each (N,) or (N, P)."""
    mask: Tensor | None
    """(N, P) bool: which positions count; None if all do."""


class Calls:
    """The codes of a model, by the calls of layers that they are of.

    Args:
        codes: of every layer, and of every call of it in a forward, in their order.
    """

    def __init__(self, codes: Sequence[LayerCodes]) -> None:
        self.codes = tuple(codes)
        self.names = [one.name for one in codes]
        self.by_layer: dict[str, list[tuple[int, LayerCodes]]] = {}
        """With their place among all."""
        for place, one in enumerate(codes):
            self.by_layer.setdefault(one.layer, []).append((place, one))


class _Table:
    """A row of distances for each call of a layer that gives as many samples as the first.

    So they need not be brought together afterwards, and what writes them is looked up only once.

    Args:
        codes: of all calls.
        shape: of the distances of one, (N,) or (N, P).
    """

    def __init__(self, codes: Sequence[LayerCodes], shape: torch.Size) -> None:
        self.rows = torch.empty(len(codes), *shape)
        places = zip(codes, self.rows.unbind(), strict=True)
        self._writers = [one.writer(row) for one, row in places]
        self._missing = len(codes)

    def write(self, place: int, output: Tensor) -> bool:
        """Whether the distances of an output are in their row now."""
        write = self._writers[place]
        if write is None or not write(output):
            return False
        self._missing -= 1
        return True

    @property
    def is_full(self) -> bool:
        """Whether all rows were written."""
        return self._missing == 0


class _Forward:
    """What is heard in one forward."""

    def __init__(self) -> None:
        self.heard: dict[str, list[Heard | None]] = {}
        """By layer, of each call of it; None: in the table."""
        self.table: _Table | None = None


class Listener:
    """The components of every layer of every sample that ran while it listened.

    Args:
        calls: with the codes of the model.
        reading: how outputs are read.
        mask: (N, T) bool, which positions count, of each forward.
        has_codes: whether L and H are wanted beside D.
    """

    def __init__(
        self, calls: Calls, reading: Reading, mask: Tensor | None, has_codes: bool = False
    ) -> None:
        self._calls = calls
        self._reading = reading
        self._mask = mask
        self._has_codes = has_codes
        self._takes_positions = mask is None and reading.batch_dim == 0
        self._forwards = [_Forward()]
        self._fault: Exception | None = None

    def begin_forward(self) -> None:
        """What is heard from here on are other samples."""
        if self._forwards[-1].heard:
            self._forwards.append(_Forward())

    def hear(self, layer: str, module: nn.Module, _inputs: object, output: object) -> None:
        """Takes in one output of a layer; a fault is kept for who asks, and not raised here."""
        if self._fault is not None:
            return
        try:
            self._take_in(layer, module, output)
        except Exception as error:  # watching does not break what is watched
            self._fault = error

    @property
    def has_heard(self) -> bool:
        """Whether any layer was called."""
        return self._fault is not None or any(forward.heard for forward in self._forwards)

    def parts(self) -> Parts:
        """D, or D, L and H, each (L, N): of all samples in the order in which they ran.

        Raises:
            TypeError, ValueError: what was heard cannot be judged; naming the layer.
            RuntimeError: nothing was heard.
        """
        if self._fault is not None:
            raise self._fault
        forwards = [self._by_sample(forward) for forward in self._forwards if forward.heard]
        if not forwards:
            raise RuntimeError(
                "no layer was called while listening; accepted: a forward of the model that was "
                "fitted, or of its parts, uncompiled"
            )
        return joined(forwards)

    def _take_in(self, layer: str, module: nn.Module, output: object) -> None:
        forward = self._forwards[-1]
        heard = forward.heard.setdefault(layer, [])
        calls = self._calls.by_layer[layer]
        if len(heard) >= len(calls):
            raise ValueError(
                f"layer {layer!r} was called more than {len(calls)} times in a forward; accepted: "
                f"{len(calls)}, as fitted; each call of the model itself begins a forward"
            )
        place, codes = calls[len(heard)]
        if are_rows(output, module, self._takes_positions):
            if not self._has_codes and output.is_cpu:
                if forward.table is None:
                    forward.table = _Table(self._calls.codes, output.shape[:-1])
                if forward.table.write(place, output):
                    heard.append(None)
                    return
            rows, mask = output, None
        else:
            rows, mask = rows_of(layer, module, output, self._reading.batch_dim, self._mask)
        heard.append(Heard(codes.measure(rows, self._has_codes), mask))

    def _by_sample(self, forward: _Forward) -> Parts:
        reduction = self._reading.reduce_positions
        if forward.table is not None and forward.table.is_full:
            rows = forward.table.rows
            return (rows if rows.dim() == 2 else over_positions(rows, None, reduction),)
        parts = by_sample(self._in_order(forward), reduction)
        device = parts[0][0].device
        return tuple(
            torch.stack([part.to(device) for part in of_calls])
            for of_calls in zip(*parts, strict=True)
        )

    def _in_order(self, forward: _Forward) -> list[Heard]:
        found: dict[int, Heard] = {}
        for layer, calls in self._calls.by_layer.items():
            heard = forward.heard.get(layer, [])
            if len(heard) < len(calls):
                raise ValueError(
                    f"layer {layer!r} was called {len(heard)} times in a forward; accepted: "
                    f"{len(calls)}, as fitted"
                )
            for (place, _), each in zip(calls, heard, strict=True):
                if each is None:
                    assert forward.table is not None
                    each = Heard((forward.table.rows[place],), None)
                found[place] = each
        return [found[place] for place in range(len(found))]


def by_sample(heard: list[Heard], reduction: Reduction) -> list[Parts]:
    """What was heard in one forward, over positions; layers that are alike are taken together."""
    found = [one.parts for one in heard]
    alike: dict[object, list[int]] = {}
    for place, (first, *_) in enumerate(found):
        if first.dim() > 1:
            kind = first.shape, first.device, id(heard[place].mask)
            alike.setdefault(kind, []).append(place)
    for places in alike.values():
        parts, mask = heard[places[0]]
        stacked = torch.stack([part for place in places for part in found[place]])
        reduced = over_positions(stacked, mask, reduction).unbind()
        for i, place in enumerate(places):
            found[place] = reduced[i * len(parts) : (i + 1) * len(parts)]
    return found


class Listening:
    """A context in which `hear(name, module, inputs, output)` is called after each forward.

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
        hear: Callable[[str, nn.Module, object, object], None],
        begin_forward: Callable[[], None],
    ) -> None:
        self._key = next(_KEYS)
        self._hooks: list[tuple[dict[int, Any], Callable[..., None]]] = [
            (model._forward_pre_hooks, lambda *_: begin_forward())
        ]
        for name, module in modules.items():
            self._hooks.append((module._forward_hooks, functools.partial(hear, name)))

    def __enter__(self) -> None:
        for place, hook in self._hooks:
            place[self._key] = hook

    def __exit__(self, *_: object) -> None:
        for place, _hook in self._hooks:
            place.pop(self._key, None)


# What `register_forward_hook` costs for each layer is a good part of what a short look costs at
# all. Its keys count from 0 up.
_KEYS = itertools.count(-1, -1)


def joined(forwards: list[Parts]) -> Parts:
    """The parts, each (L, N), of all samples of some forwards, at least one."""
    if len(forwards) == 1:
        return forwards[0]
    return tuple(torch.cat(each, dim=1) for each in zip(*forwards, strict=True))
