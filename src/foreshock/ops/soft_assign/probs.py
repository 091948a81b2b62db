"""p of soft_assign: who asks for it holds rows times codes once, and nothing else of that size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foreshock.ops.soft_assign import reference


def probs(x_ND: Tensor, centers_KD: Tensor, temperature: float) -> Tensor:
    """(N, K): softmax over k of -|x - c_k|^2 / T, differentiable once; centers as computed in."""
    if torch.compiler.is_compiling():
        return reference.probs(x_ND, centers_KD, temperature)
    p_NK: Tensor = _Probs.apply(x_ND, centers_KD, temperature)  # type: ignore[no-untyped-call]
    return p_NK


class _Probs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, centers: Tensor, temperature: float) -> Tensor:
        p_NK = centers.new_empty(len(x), len(centers))
        for rows in reference.blocks(len(x), len(centers)):
            p_NK[rows] = reference.probs(x[rows], centers, temperature)
        ctx.save_for_backward(x, centers, p_NK)
        ctx.temperature = temperature
        return p_NK

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_NK: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Of d2_k: -p_k (g_k - sum_j p_j g_j) / T, and of x and the centers through that."""
        x, centers, p_NK = ctx.saved_tensors
        wide_KD = centers.double()
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        grad_centers = torch.zeros_like(wide_KD) if ctx.needs_input_grad[1] else None
        for rows in reference.blocks(len(x), len(centers)):
            x_ND, p, grad = x[rows].double(), p_NK[rows].double(), grad_NK[rows].double()
            w_NK = p * ((p * grad).sum(1, keepdim=True) - grad) / ctx.temperature
            if grad_x is not None:
                grad_x[rows] = 2 * (w_NK.sum(1, keepdim=True) * x_ND - w_NK @ wide_KD)
            if grad_centers is not None:
                grad_centers += 2 * (w_NK.sum(0)[:, None] * wide_KD - w_NK.T @ x_ND)
        return grad_x, None if grad_centers is None else grad_centers.to(centers.dtype), None
