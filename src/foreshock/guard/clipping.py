"""Clipping by a norm that is known already."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def clip_gradients(
    parameters: Sequence[torch.Tensor], norm: float, max_norm: float
) -> torch.Tensor:
    """Scales the gradients as `torch.nn.utils.clip_grad_norm_` does.

    g <- g * min(1, max_norm / (norm + 1e-6)).

    Args:
        parameters: whose gradients are scaled, in place; those without one are passed over.
        norm: L2 norm of all gradients together.
        max_norm: the norm that they are to have at most.
    Returns:
        The norm, (), on the first gradient's device; float64 if that gradient is, else float32.
    Cost:
        One read and one write of the gradients, if they are too large.
    """
    first = next((p.grad for p in parameters if p.grad is not None), torch.empty(0))
    dtype = torch.float64 if first.dtype is torch.float64 else torch.float32
    factor = max_norm / (norm + 1e-6)
    if not factor >= 1.0:  # NaN too
        with torch.no_grad():
            _scale([p.grad for p in parameters if p.grad is not None], factor, dtype)
    return torch.tensor(norm, dtype=dtype, device=first.device)


def _scale(gradients: Sequence[torch.Tensor], factor: float, dtype: torch.dtype) -> None:
    for device in {g.device for g in gradients}:
        # A tensor, since multiplying a list by a number takes four times as long.
        scale = torch.tensor(factor, dtype=dtype, device=device)
        here = [g for g in gradients if g.device == device]
        dense = [g for g in here if not g.is_sparse]
        if dense:
            torch._foreach_mul_(dense, scale)
        for gradient in here:
            if gradient.is_sparse:
                gradient.mul_(scale)
