"""Puts gates behind the layers of a model, and takes them out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from foreshock.gates.gate import ALPHA_AT_START, ConstantGate, SO8RotationGate, check_dim
from foreshock.gates.layers import select, width_of
from foreshock.gates.rotation import SharedRotations

NAME = "rotation_gate"
"""As which a layer holds its gate."""
_TURNED = (Tensor, fx.Proxy)
"""What a gate can be given; a proxy stands for a tensor while a model is traced."""


def attach(
    model: nn.Module,
    layers: str | int | Sequence[str | int] = "intermediate",
    *,
    dim: int | None = None,
    alpha: float = ALPHA_AT_START,
    theta_std: float = 0.0,
) -> dict[str, SO8RotationGate]:
    """Puts an `SO8RotationGate` behind layers of a model, whose output it turns.

    A gate is a submodule of its layer, `rotation_gate`: it moves, is saved and is trained with the
    model. To be called before the optimizer is made, and before the model is compiled or
    distributed. Adapters that freeze the model (PEFT) come first, or name "rotation_gate" in
    `modules_to_save`.

    Args:
        model: changed in place.
        layers: "intermediate": all decoder layers but the first and the last; "all"; indices of
            decoder layers, negative ones from the end; dotted names of any modules. The decoder
            layers are the nn.ModuleList of as many modules as the model's config has
            num_hidden_layers, or the longest one; where there is none, the longest nn.Sequential.
        dim: the last dimension of the layers' outputs, a multiple of 8; None: as the config
            (hidden_size) or the layers say.
        alpha: where the gates' mixing starts.
        theta_std: of the normal distribution that theta is drawn from; with 0 the model's outputs
            do not change at first, by no bit.
    Returns:
        The gates, by the name of the layer that each is behind.
    Raises:
        TypeError, ValueError: naming the argument, what was looked for and what was found; nothing
            was changed.
    Cost:
        In a step one matrix exponential for all gates together; for each gate a product with
        (D/8, 8, 8).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; accepted: torch.nn.Module")
    present = [name for name, module in model.named_modules() if _is_gate(module)]
    if present:
        raise ValueError(
            f"model has gates already ({present[0]!r} and {len(present) - 1} more); accepted: a "
            "model without, or after detach(model)"
        )
    selected = select(model, layers)
    dims = {name: width_of(model, name) if dim is None else dim for name in selected}
    for name, width in dims.items():
        check_dim(width, f"dim of layer {name!r}")
    shared = SharedRotations()
    gates = {}
    for name, layer in selected.items():
        gate = SO8RotationGate(dims[name], alpha, theta_std=theta_std, **_place(model, layer))
        gate.join(shared)
        gate.train(layer.training)
        put(layer, gate)
        gates[name] = gate
    _keep_nested_tensors_out(model)
    return gates


def detach(model: nn.Module) -> nn.Module:
    """Takes the gates out of a model, constant ones too; what they did to its outputs is gone.

    Args:
        model: changed in place.
    Returns:
        The model.
    Raises:
        ValueError: it has no gates that `attach` has put there.
    """
    gated = layers_with_gates(model)
    if not gated:
        raise ValueError("model has no gates; accepted: one after attach(model)")
    for layer in gated.values():
        take_out(layer)
    _let_nested_tensors_in(model)
    return model


def gates_of(model: nn.Module) -> dict[str, SO8RotationGate]:
    """All gates of a model, by the name of their layer; one that stands for itself, by its own."""
    gates = {}
    for name, module in model.named_modules():
        if isinstance(module, SO8RotationGate):
            gates[name.removesuffix(NAME).removesuffix(".") or name] = module
    return gates


def renew(model: nn.Module) -> None:
    """Has the gates compute their rotations anew in the next forward.

    To be called where a theta was written past torch's sight (`.data`) between two forwards that
    had no gradients, and neither a backward pass, nor a change of mode, nor a cast came between.
    """
    for gate in gates_of(model).values():
        gate.shared.renew()


def layers_with_gates(model: nn.Module) -> dict[str, nn.Module]:
    """The layers behind which `attach` has put something, by name."""
    return {name: module for name, module in model.named_modules() if NAME in module._modules}


def put(layer: nn.Module, gate: SO8RotationGate | ConstantGate) -> None:
    """Puts a gate behind a layer, in the place of one that is there."""
    is_there = NAME in layer._modules
    layer.add_module(NAME, gate)
    # An nn.Sequential runs what it holds by itself, the gate as the last.
    if not is_there and type(layer).forward is not nn.Sequential.forward:
        layer.register_forward_hook(_through_gate)


def take_out(layer: nn.Module) -> None:
    """The layer as it was."""
    del layer._modules[NAME]
    hooks = layer._forward_hooks
    for key in [key for key, hook in hooks.items() if hook is _through_gate]:
        del hooks[key]


def _through_gate(layer: nn.Module, _: Any, output: Any) -> Any:
    gate = layer.get_submodule(NAME)
    if isinstance(output, _TURNED):
        return gate(output)
    if isinstance(output, tuple | list) and output and isinstance(output[0], _TURNED):
        turned = [gate(output[0]), *output[1:]]
        return type(output)(*turned) if hasattr(output, "_fields") else type(output)(turned)
    raise TypeError(
        f"a {type(layer).__name__} with a gate has put out a {type(output).__name__}; accepted: a "
        "tensor, or a tuple that begins with one"
    )


def _is_gate(module: nn.Module) -> bool:
    return isinstance(module, SO8RotationGate | ConstantGate)


def _place(model: nn.Module, layer: nn.Module) -> dict[str, Any]:
    """Where a layer's gate belongs, and in what precision."""
    parameters = [*layer.parameters(), *model.parameters()]
    is_double = bool(parameters) and parameters[0].dtype is torch.float64
    return {
        "device": parameters[0].device if parameters else None,
        "dtype": torch.float64 if is_double else torch.float32,
    }


def _keep_nested_tensors_out(model: nn.Module) -> None:
    """In eval mode an nn.TransformerEncoder gives its layers nested tensors for padded inputs, and
    a layer with a hook cannot take them."""
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder) and layers_with_gates(encoder):
            vars(encoder)["nested_without_gates"] = encoder.use_nested_tensor
            setattr(encoder, "use_nested_tensor", False)  # noqa: B010


def _let_nested_tensors_in(model: nn.Module) -> None:
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder) and "nested_without_gates" in vars(encoder):
            setattr(encoder, "use_nested_tensor", vars(encoder).pop("nested_without_gates"))  # noqa: B010
