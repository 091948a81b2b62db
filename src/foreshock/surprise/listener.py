"""Hears the layers of a model while forwards run, and keeps what their codes make of it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from foreshock.surprise.aggregation import max_surprise, mean_surprise, weighted_surprise
from foreshock.surprise.layer_codes import LayerCodes
from foreshock.surprise.model_input import MaskSource
from foreshock.surprise.outputs import Reduction, check_reduction, rows_of
from foreshock.surprise.scores import LayerComponents

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


class Listener:
    """The components of every layer of every sample that ran while it listened.

    Args:
        codes: of every layer, and of every call of it in a forward, in their order.
        reading: how outputs are read.
        mask: (N, T) bool, which positions count, of each forward.
    """

    def __init__(self, codes: list[LayerCodes], reading: Reading, mask: Tensor | None) -> None:
        self._codes = codes
        self._calls: dict[str, list[LayerCodes]] = {}
        for one in codes:
            self._calls.setdefault(one.layer, []).append(one)
        self._reading = reading
        self._mask = mask
        self._forwards: list[dict[str, list[LayerComponents]]] = [{}]
        self._fault: Exception | None = None

    def begin_forward(self) -> None:
        """What is heard from here on are other samples."""
        if self._forwards[-1]:
            self._forwards.append({})

    def hear(self, layer: str, module: nn.Module, output: object) -> None:
        """Takes in one output of a layer; a fault is kept for who asks, and not raised here."""
        if self._fault is not None:
            return
        heard = self._forwards[-1].setdefault(layer, [])
        try:
            heard.append(self._components(layer, len(heard), module, output))
        except Exception as error:  # watching does not break what is watched
            self._fault = error

    def components(self) -> dict[str, LayerComponents]:
        """Of all samples in the order in which they ran, by layer.

        Raises:
            TypeError, ValueError: what was heard cannot be judged; naming the layer.
            RuntimeError: nothing was heard.
        """
        if self._fault is not None:
            raise self._fault
        forwards = [self._by_name(forward) for forward in self._forwards if forward]
        if not forwards:
            raise RuntimeError(
                "no layer was called while listening; accepted: a forward of the model that was "
                "fitted, or of its parts, uncompiled"
            )
        return joined(forwards)

    def _components(
        self, layer: str, call: int, module: nn.Module, output: object
    ) -> LayerComponents:
        calls = self._calls[layer]
        if call >= len(calls):
            raise ValueError(
                f"layer {layer!r} was called more than {len(calls)} times in a forward; accepted: "
                f"{len(calls)}, as fitted; each call of the model itself begins a forward"
            )
        rows, mask = rows_of(layer, module, output, self._reading.batch_dim, self._mask)
        return calls[call].components(rows, mask, self._reading.reduce_positions)

    def _by_name(self, forward: Mapping[str, list[LayerComponents]]) -> dict[str, LayerComponents]:
        found: dict[str, LayerComponents] = {}
        for layer, calls in self._calls.items():
            heard = forward.get(layer, [])
            if len(heard) < len(calls):
                raise ValueError(
                    f"layer {layer!r} was called {len(heard)} times in a forward; accepted: "
                    f"{len(calls)}, as fitted"
                )
            found.update({one.name: parts for one, parts in zip(calls, heard, strict=True)})
        return found


@contextlib.contextmanager
def listening(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    hear: Callable[[str, nn.Module, object], None],
    begin_forward: Callable[[], None],
) -> Iterator[None]:
    """Calls `hear(name, module, output)` after each forward of a module, and changes nothing."""

    def hook_of(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda module, _, output: hear(name, module, output)

    with contextlib.ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(module.register_forward_hook(hook_of(name)).remove)
        stack.callback(model.register_forward_pre_hook(lambda *_: begin_forward()).remove)
        yield


def joined(forwards: list[dict[str, LayerComponents]]) -> dict[str, LayerComponents]:
    """The components of all samples of some forwards, at least one."""
    if len(forwards) == 1:
        return forwards[0]
    fields = [field.name for field in dataclasses.fields(LayerComponents)]
    return {
        name: LayerComponents(
            *(
                torch.cat([getattr(forward[name], field) for forward in forwards])
                for field in fields
            )
        )
        for name in forwards[0]
    }
