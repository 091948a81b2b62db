"""`torch.ops.foreshock.power_iteration`: one pass, as torch.compile and torch.export see it."""

from __future__ import annotations

import torch
from torch import Tensor

from foreshock.ops._backend import choose
from foreshock.ops._tensors import device_of
from foreshock.ops.power_iteration.matrices import select_matrices

_library = torch.library.Library("foreshock", "FRAGMENT")
_library.define("power_iteration(Tensor[] weights, Tensor vectors) -> (Tensor, Tensor)")


@torch.library.impl(_library, "power_iteration", "CompositeExplicitAutograd")
def _impl(weights: list[Tensor], vectors: Tensor) -> tuple[Tensor, Tensor]:
    """One pass over weights of two or more dimensions; see `SpectralStats` and `PowerState`."""
    matrices, index = select_matrices(weights)
    if len(index) != len(matrices):
        raise ValueError("weights: accepted here are tensors of two or more dimensions only")
    moved = vectors.clone(memory_format=torch.contiguous_format)
    device = device_of(matrices)
    packed = torch.empty(len(matrices), 5, dtype=torch.float64, device=device)
    if matrices:
        choose("power_iteration", device.type).module.bind(matrices, moved, packed)()
    return packed, moved


@torch.library.register_fake("foreshock::power_iteration", lib=_library)
def _fake(weights: list[Tensor], vectors: Tensor) -> tuple[Tensor, Tensor]:
    packed = torch.empty(len(weights), 5, dtype=torch.float64, device=vectors.device)
    return packed, torch.empty_like(vectors, memory_format=torch.contiguous_format)


def _setup_context(ctx: object, inputs: tuple[object, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(*output)  # type: ignore[attr-defined]
    ctx.count = len(inputs[0])  # type: ignore[arg-type,attr-defined]


def _backward(ctx: object, *grads: Tensor) -> tuple[list[None], None]:
    return [None] * ctx.count, None  # type: ignore[attr-defined]


torch.library.register_autograd(
    "foreshock::power_iteration", _backward, setup_context=_setup_context, lib=_library
)
