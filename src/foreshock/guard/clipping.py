"""Clipping of gradients, for which the health scan is the norm pass."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from foreshock.distributed_part import is_distributed, local_part
from foreshock.guard.inspection import Finding, inspect_gradients

EPSILON = 1e-6
"""torch's, against a norm of 0."""


def clip_grad_norm_(
    parameters: torch.Tensor | Iterable[torch.Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> torch.Tensor:
    """`torch.nn.utils.clip_grad_norm_`, with the health scan as its norm pass.

    g <- g * min(1, max_norm / (norm + 1e-6)), norm of all gradients together.

    Args:
        parameters: one, or an iterable of them; those without a gradient are passed over.
        max_norm: the norm that they are to have at most, from 0 up.
        norm_type: 2 or inf; any other is left to torch.
        error_if_nonfinite: whether a norm that is NaN or infinite is an error.
        foreach: accepted as torch does; there is one way only.
    Returns:
        The norm before clipping, (), float64 if the first gradient is, else float32; NaN or
        infinite if a gradient is. A DTensor, the same on every rank, if the first gradient is one.
    Raises:
        TypeError, ValueError: max_norm is no number, or below 0.
        RuntimeError: the norm is not finite, and error_if_nonfinite.
    Cost:
        One read of the gradients and, if they are too large, one scaling pass; on an accelerator
        one synchronisation, for which it saves the pass where there is nothing to clip. The sum is
        exact to 2e-7 whatever the sizes; torch's float32 sum is off by 1e-2 on 1e8 elements. With
        DTensors, which may be mixed with other tensors, an all_reduce of three numbers for each
        dimension of a mesh that they are split over.
    Source:
        Pascanu, Mikolov and Bengio 2013, arXiv 1211.5063.
    """
    max_norm = as_max_norm(max_norm)
    owners = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    if norm_type not in (2.0, math.inf):
        return torch.nn.utils.clip_grad_norm_(
            owners, max_norm, norm_type, error_if_nonfinite, foreach
        )
    norm = norm_of(_inspect(owners, norm_type), norm_type)
    refuse_nonfinite(norm, norm_type, error_if_nonfinite)
    scale_gradients(owners, clip_factor(norm, max_norm))
    return norm_like_torchs(owners, norm)


def _inspect(owners: Sequence[torch.Tensor], norm_type: float) -> Finding:
    if any(map(is_distributed, owners)):
        from foreshock.guard.split_gradients import inspect_over_meshes  # needs torch.distributed

        return inspect_over_meshes(owners, norm_type)
    return inspect_gradients({str(i): p for i, p in enumerate(owners)}).inspect()


def as_max_norm(value: Any) -> float:
    """A number from 0 up."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(
            f"max_norm is a {type(value).__name__}; accepted: a number from 0 up"
        ) from None
    if not number >= 0:
        raise ValueError(f"max_norm is {value!r}; accepted: a number from 0 up")
    return number


def norm_of(finding: Finding, norm_type: float) -> float:
    """The norm of all elements: NaN if one is, else infinite if one is."""
    if norm_type == 2.0:
        return finding.norm
    if finding.nan:
        return math.nan
    return math.inf if finding.inf else finding.absmax


class NonfiniteNorm(RuntimeError):
    """What `error_if_nonfinite` asks for."""


def refuse_nonfinite(norm: float, norm_type: float, error_if_nonfinite: bool) -> None:
    """Raises the error that torch raises, if it is wanted."""
    if error_if_nonfinite and not math.isfinite(norm):
        raise NonfiniteNorm(
            f"The total norm of order {norm_type} for gradients from `parameters` is non-finite, "
            "so it cannot be clipped; pass error_if_nonfinite=False to scale by it all the same"
        )


def clip_factor(norm: float, max_norm: float) -> float:
    """What gradients of this norm are multiplied by; 1 if they are short enough."""
    factor = max_norm / (norm + EPSILON)
    return 1.0 if factor >= 1.0 else factor  # a NaN stays one


def norm_like_torchs(parameters: Sequence[torch.Tensor], norm: float) -> torch.Tensor:
    """() on the first gradient's device; float64 if that gradient is, else float32.

    A DTensor, the same on every rank, if that gradient is one.
    """
    first: Any = _first_gradient(parameters)
    dtype = torch.float64 if first.dtype is torch.float64 else torch.float32
    made = torch.tensor(norm, dtype=dtype, device=first.device)
    if not is_distributed(first):
        return made
    from torch.distributed.tensor import DTensor, Replicate

    mesh = first.device_mesh
    return DTensor.from_local(made, mesh, [Replicate()] * mesh.ndim, run_check=False)


def first_dtype(parameters: Sequence[torch.Tensor]) -> torch.dtype:
    """Of the first gradient; float32 if there is none."""
    return _first_gradient(parameters).dtype


def _first_gradient(parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    return next((p.grad for p in parameters if p.grad is not None), torch.empty(0))


def scale_gradients(parameters: Sequence[torch.Tensor], factor: float | torch.Tensor) -> None:
    """Multiplies the gradients that there are, in place; by the number 1, does nothing.

    Args:
        parameters: whose gradients.
        factor: a number, or a tensor of one, which is not read on the host.
    Cost:
        One read and one write of the gradients.
    """
    if not isinstance(factor, torch.Tensor) and factor == 1.0:
        return
    gradients = [local_part(p.grad) for p in parameters if p.grad is not None]
    with torch.no_grad():
        for device in {g.device for g in gradients}:
            here = [g for g in gradients if g.device == device]
            dtype = torch.float64 if here[0].dtype is torch.float64 else torch.float32
            # A tensor, since multiplying a list by a number takes four times as long.
            scale = torch.as_tensor(factor).to(device, dtype, non_blocking=True)
            dense = [g for g in here if not g.is_sparse]
            if dense:
                torch._foreach_mul_(dense, scale)
            for gradient in here:
                if gradient.is_sparse:
                    gradient.mul_(scale)


def is_fused(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer's step divides by its `grad_scale` itself."""
    supports = getattr(optimizer, "_step_supports_amp_scaling", False)
    return bool(supports) and all(group.get("fused") for group in optimizer.param_groups)


def divisor_of(factor: float) -> torch.Tensor | None:
    """() what a fused optimizer is to divide by for this factor; None for 1."""
    if factor == 1.0:
        return None
    return torch.tensor(1.0 / factor if factor else math.inf)


@contextlib.contextmanager
def scaled_in_step(
    optimizer: torch.optim.Optimizer,
    divisor: torch.Tensor | None,
    found_inf: torch.Tensor | None = None,
) -> Iterator[None]:
    """Has a fused optimizer scale its gradients as it reads them, or leave everything as it is.

    A GradScaler that is stepping has put a scale and a verdict of its own there: both count.

    Args:
        optimizer: for which `is_fused` is true.
        divisor: () float32; None: as they are.
        found_inf: () float32, on the device of the parameters: 1 withholds the update, bit for bit.
    Cost:
        No pass of its own over the gradients; the optimizer writes them back scaled.
    """
    attributes = vars(optimizer)
    names = ("grad_scale", "found_inf")
    kept = {name: attributes[name] for name in names if name in attributes}
    scale, found = (kept.get(name) for name in names)
    if divisor is not None:
        attributes["grad_scale"] = divisor if scale is None else scale * divisor.to(scale.device)
    if found_inf is not None:
        attributes["found_inf"] = (
            found_inf if found is None else torch.maximum(found, found_inf.to(found.device))
        )
    try:
        yield
    finally:
        for name in names:
            attributes.pop(name, None)
        attributes.update(kept)
