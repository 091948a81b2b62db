"""`torch.ops.foreshock.soft_assign`: the op as autograd and torch.compile see it."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from foreshock.ops._backend import choose
from foreshock.ops.soft_assign import composed
from foreshock.ops.soft_assign.frame import BoundAssigner, Frame
from foreshock.ops.soft_assign.reference import Saved

_library = torch.library.Library("foreshock", "FRAGMENT")
_library.define(
    "soft_assign(Tensor x, Tensor centers, float temperature, float eps) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "soft_assign_backward(Tensor grad_distance, Tensor grad_length, Tensor grad_entropy, Tensor x, "
    "Tensor centers, float temperature, float eps, Tensor[] saved, bool needs_x, "
    "bool needs_centers) -> (Tensor, Tensor)"
)


def computed_dtype(x: Tensor, centers: Tensor) -> torch.dtype:
    """What is computed in and returned: float64 if either is, float32 otherwise."""
    return torch.float64 if torch.float64 in (x.dtype, centers.dtype) else torch.float32


def _bind(x: Tensor, centers: Tensor) -> tuple[ModuleType, Tensor, Tensor]:
    """The implementation, and x and centers as it takes them: (N, D) and (K, D), contiguous.

    Neither is centred: implementations compute differences, to which an offset does no harm.
    """
    dtype = computed_dtype(x, centers)
    x = x.to(dtype) if dtype == torch.float64 else x
    module = choose("soft_assign", x.device.type).module
    return module, x.contiguous(), centers.to(dtype).contiguous()


def bind_assigner(frame: Frame) -> BoundAssigner:
    """An assigner of the implementation that serves the device of the centers."""
    module = choose("soft_assign", frame.centers.device.type).module
    if not hasattr(module, "Assigner"):
        return composed.Assigner(frame, module)
    bound: BoundAssigner = module.Assigner(frame)
    return bound


@torch.no_grad()
def forward(x: Tensor, centers: Tensor, temperature: float, eps: float) -> Saved:
    """best_index, distance, length, entropy, log_normaliser (N,) of x (N, D), centers (K, D)."""
    if len(x) == 0:
        *scalars, best = _fake(x, centers, temperature, eps)
        distance, length, entropy, log_normaliser = scalars
        return best, distance, length, entropy, log_normaliser
    module, x, centers = _bind(x, centers)
    code: Saved = module.forward(x, centers, temperature, eps)
    return code


@torch.library.impl(_library, "soft_assign", "CompositeExplicitAutograd")
def _impl(x: Tensor, centers: Tensor, temperature: float, eps: float) -> Saved:
    """distance, length, entropy, log_normaliser, best_index: what is differentiable first."""
    best, *scalars = forward(x, centers, temperature, eps)
    distance, length, entropy, log_normaliser = (s.clone() for s in scalars)  # no shared memory
    return distance, length, entropy, log_normaliser, best


@torch.library.register_fake("foreshock::soft_assign", lib=_library)
def _fake(x: Tensor, centers: Tensor, temperature: float, eps: float) -> Saved:
    dtype, rows = computed_dtype(x, centers), x.shape[0]
    distance, length, entropy, log_normaliser = (x.new_empty(rows, dtype=dtype) for _ in range(4))
    return distance, length, entropy, log_normaliser, x.new_empty(rows, dtype=torch.int64)


@torch.library.impl(_library, "soft_assign_backward", "CompositeExplicitAutograd")
def _backward_impl(
    grad_distance: Tensor,
    grad_length: Tensor,
    grad_entropy: Tensor,
    x: Tensor,
    centers: Tensor,
    temperature: float,
    eps: float,
    saved: Sequence[Tensor],
    needs_x: bool,
    needs_centers: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients in x and centers; one that is not needed has no elements."""
    needs = (needs_x, needs_centers)
    places = (x, centers)
    if len(x) == 0:
        found = tuple(map(torch.zeros_like, places))
    else:
        module, x_ND, centers_KD = _bind(x, centers)
        grads = (g.contiguous() for g in (grad_distance, grad_length, grad_entropy))
        found = module.backward(
            *grads, x_ND, centers_KD, temperature, eps, tuple(saved), needs=needs
        )
    grad_x, grad_centers = (
        grad.to(place.dtype) if need else place.new_empty(0)
        for grad, place, need in zip(found, places, needs, strict=True)
    )
    return grad_x, grad_centers


@torch.library.register_fake("foreshock::soft_assign_backward", lib=_library)
def _backward_fake(
    grad_distance: Tensor,
    grad_length: Tensor,
    grad_entropy: Tensor,
    x: Tensor,
    centers: Tensor,
    temperature: float,
    eps: float,
    saved: Sequence[Tensor],
    needs_x: bool,
    needs_centers: bool,
) -> tuple[Tensor, Tensor]:
    return (
        x.new_empty(x.shape if needs_x else 0),
        centers.new_empty(centers.shape if needs_centers else 0),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Saved) -> None:
    x, centers, ctx.temperature, ctx.eps = inputs
    *scalars, best = output
    ctx.mark_non_differentiable(best, scalars[-1])
    ctx.save_for_backward(x, centers, best, *scalars)


def _differentiate(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    x, centers, *saved = ctx.saved_tensors
    needs = ctx.needs_input_grad[:2]
    grad_x, grad_centers = torch.ops.foreshock.soft_assign_backward(
        *grads[:3], x, centers, ctx.temperature, ctx.eps, saved, *needs
    )
    return grad_x if needs[0] else None, grad_centers if needs[1] else None, None, None


def _refuse(ctx: Any, *_: Tensor) -> None:
    raise RuntimeError(
        "soft_assign: a gradient of its gradient was asked for; accepted: first derivatives of "
        "distance, length, entropy and surprise"
    )


torch.library.register_autograd(
    "foreshock::soft_assign", _differentiate, setup_context=_save, lib=_library
)
torch.library.register_autograd("foreshock::soft_assign_backward", _refuse, lib=_library)
