"""`torch.ops.foreshock.health_scan`: the op as torch.compile and torch.export see it."""

from __future__ import annotations

import torch

from foreshock.ops._backend import choose
from foreshock.ops._tensors import device_of

_library = torch.library.Library("foreshock", "FRAGMENT")
_library.define("health_scan(Tensor[] tensors) -> Tensor")


def scan(tensors: list[torch.Tensor | None]) -> torch.Tensor:
    """The packed (T, 6) result for local tensors; see `HealthStats.packed`."""
    device = device_of(tensors)
    packed = torch.empty(len(tensors), 6, dtype=torch.float64, device=device)
    choose("health_scan", device.type).module.bind(tensors, packed)()
    return packed


@torch.library.impl(_library, "health_scan", "CompositeExplicitAutograd")
def _impl(tensors: list[torch.Tensor]) -> torch.Tensor:
    return scan(list(tensors))


@torch.library.register_fake("foreshock::health_scan", lib=_library)
def _fake(tensors: list[torch.Tensor]) -> torch.Tensor:
    device = tensors[0].device if tensors else torch.device("cpu")
    return torch.empty(len(tensors), 6, dtype=torch.float64, device=device)


def _setup_context(ctx: object, inputs: tuple[object, ...], output: torch.Tensor) -> None:
    ctx.mark_non_differentiable(output)  # type: ignore[attr-defined]
    ctx.count = len(inputs[0])  # type: ignore[arg-type,attr-defined]


def _backward(ctx: object, grad: torch.Tensor) -> list[None]:
    return [None] * ctx.count  # type: ignore[attr-defined]


torch.library.register_autograd(
    "foreshock::health_scan", _backward, setup_context=_setup_context, lib=_library
)
