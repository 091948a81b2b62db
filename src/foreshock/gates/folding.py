"""Takes the exponentials out of a model whose gates have learnt enough."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from foreshock.gates.attachment import NAME, layers_with_gates, put, take_out
from foreshock.gates.gate import ConstantGate, SO8RotationGate
from foreshock.gates.rotation import BLOCK


@dataclasses.dataclass(frozen=True)
class Folded:
    """What has become of gates, by the name of the layer that each was behind."""

    into: Mapping[str, tuple[str, ...]]
    """Those that are gone, and the linear layers whose weights hold them now."""
    constant: Mapping[str, str]
    """Those that are products with a constant matrix now, and why they had to stay."""


def fold(model: nn.Module, otherwise: Literal["constant", "error"] = "constant") -> Folded:
    """Multiplies gates into the weights of linear layers where that is exact.

    A gate is one linear map, x M with M = I + sigmoid(alpha) (R - I). It is exact

    - in the nn.Linear in front of it, whose output goes nowhere else: W <- M^T W, b <- M^T b;
    - in the nn.Linears behind it, if it is read by nothing but them: W <- W M^T,

    as the graph of the model says that torch.fx traces. It is exact nowhere in a residual stream:
    in front of a gate there is a sum, of which the linear layer makes one part, and behind it a
    normalisation, and sums again. Such a gate stays as a constant matrix, without theta, alpha and
    exponential. So do all gates of a model that torch.fx cannot trace, and those next to a linear
    layer that is used twice, or shares its weight, or is not exactly an nn.Linear.

    Args:
        model: changed in place.
        otherwise: "constant", or "error", where a gate that can be folded nowhere is an error and
            nothing is changed.
    Returns:
        What has become of each gate.
    Raises:
        ValueError: the model has no gates; otherwise is something else; with "error", naming the
            gates that cannot be folded, and why.
    Cost:
        One trace; products in float64.
    """
    if otherwise not in ("constant", "error"):
        raise ValueError(f"otherwise is {otherwise!r}; accepted: 'constant', 'error'")
    layers = layers_with_gates(model)
    gates = {n: layer.get_submodule(NAME) for n, layer in layers.items()}
    open_gates = {n: gate for n, gate in gates.items() if isinstance(gate, SO8RotationGate)}
    if not open_gates:
        raise ValueError("model has no gates to fold; accepted: one after attach(model)")
    places = _places(model, list(open_gates))
    constant = {name: place for name, place in places.items() if isinstance(place, str)}
    if constant and otherwise == "error":
        listed = "; ".join(f"{name!r}: {why}" for name, why in constant.items())
        raise ValueError(f"gates cannot be folded exactly: {listed}; accepted: 'constant'")
    into = {}
    for name, gate in open_gates.items():
        place = places[name]
        matrix = gate.matrix().detach()
        if isinstance(place, str):
            put(layers[name], ConstantGate(matrix))
        else:
            place.take_in(model, matrix)
            take_out(layers[name])
            into[name] = place.linears
    return Folded(into, constant)


@dataclasses.dataclass(frozen=True)
class _Place:
    """Linear layers that can take a gate in."""

    linears: tuple[str, ...]
    is_in_front: bool

    @torch.no_grad()
    def take_in(self, model: nn.Module, matrix: Tensor) -> None:
        for name in self.linears:
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            if self.is_in_front:
                linear.weight.copy_(_turned(linear.weight.T, matrix).T)
                if linear.bias is not None:
                    linear.bias.copy_(_turned(linear.bias, matrix))
            else:
                linear.weight.copy_(_turned(linear.weight, matrix.mT))


def _turned(rows: Tensor, matrix: Tensor) -> Tensor:
    """rows (..., D) times the blocks (D/8, 8, 8), in float64."""
    blocks = rows.double().unflatten(-1, (-1, BLOCK))
    return torch.einsum("...ki,kij->...kj", blocks, matrix.double()).flatten(-2)


def _places(model: nn.Module, names: list[str]) -> dict[str, _Place | str]:
    """Where each gate can go, or why it cannot."""
    try:
        tracer = _Tracer()
        graph = tracer.trace(model)
    except Exception as error:  # whatever a model does that cannot be traced
        reason = str(error).partition("\n")[0][:120]
        return dict.fromkeys(names, f"the model cannot be traced ({reason})")
    calls: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls.setdefault(node.target, []).append(node)
    return {name: _place_of(model, name, calls) for name in names}


def _place_of(model: nn.Module, name: str, calls: Mapping[str, list[fx.Node]]) -> _Place | str:
    nodes = calls.get(f"{name}.{NAME}", [])
    if len(nodes) != 1:
        return f"the trace comes by it {len(nodes)} times, and not once"
    (node,) = nodes
    (source,) = node.all_input_nodes
    if list(source.users) == [node] and _is_free(model, source, calls):
        return _Place((str(source.target),), is_in_front=True)
    readers = list(node.users)
    if readers and all(_is_free(model, reader, calls) for reader in readers):
        return _Place(tuple(str(reader.target) for reader in readers), is_in_front=False)
    return f"it stands between {_what(model, source)} and {_listed(model, readers)}"


def _is_free(model: nn.Module, node: fx.Node, calls: Mapping[str, list[fx.Node]]) -> bool:
    """Whether this is a linear layer whose weight is used here and nowhere else."""
    if node.op != "call_module" or len(calls[str(node.target)]) != 1:
        return False
    linear = model.get_submodule(str(node.target))
    if type(linear) is not nn.Linear or "weight" not in linear._parameters:
        return False
    own_hooks = len(linear._forward_hooks) - (NAME in linear._modules)
    return not own_hooks and not linear._forward_pre_hooks and _uses(model, linear.weight) == 1


def _uses(model: nn.Module, weight: Tensor) -> int:
    modules = dict(model.named_modules(remove_duplicate=False)).values()
    return sum(parameter is weight for m in modules for parameter in m._parameters.values())


def _what(model: nn.Module, node: fx.Node) -> str:
    if node.op == "call_module":
        return type(model.get_submodule(str(node.target))).__name__
    return "the output" if node.op == "output" else f"{node.op} {node.name}"


def _listed(model: nn.Module, readers: list[fx.Node]) -> str:
    return ", ".join(_what(model, reader) for reader in readers) or "nothing"


class _Tracer(fx.Tracer):
    """Sees gates, and linear layers with gates behind them, as single nodes."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, SO8RotationGate | ConstantGate):
            return True
        is_container = isinstance(m, nn.Sequential)
        return not is_container and super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        output = super().call_module(m, forward, args, kwargs)
        name = self.path_of_module(m)
        if NAME in m._modules and self.is_leaf_module(m, name):  # whose hooks are not run
            return self.create_proxy("call_module", f"{name}.{NAME}", (output,), {})
        return output
