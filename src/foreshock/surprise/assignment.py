"""How probable each code is, over all rows at once: what needs p itself, a slab of rows at a time.

p_nk = softmax_k(-|x_n - c_k|^2 / T), as in `foreshock.ops.soft_assign`. Here the square is expanded
around the mean of the centers, which costs a matrix product: averages over rows do not need the
digits that a single row's distance does.

Shapes: N rows, K codes, D features.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_ELEMENTS = 1 << 20  # of rows times codes that are held at a time


def probabilities(
    x_ND: Tensor, centers_KD: Tensor, temperature: float
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Slabs of rows: which, the rows and the centers less the mean of the centers, and p."""
    dtype = torch.float64 if torch.float64 in (x_ND.dtype, centers_KD.dtype) else torch.float32
    centers = centers_KD.to(dtype)
    offset = centers.mean(0)
    centers = centers - offset
    squares_K = centers.square().sum(1)
    step = max(1, _ELEMENTS // len(centers))
    for begin in range(0, len(x_ND), step):
        rows = slice(begin, begin + step)
        x = x_ND[rows].to(dtype) - offset
        # |x|^2 is the same for every code.
        yield rows, x, centers, ((2 * x @ centers.T - squares_K) / temperature).softmax(1)


class _MeanUsage(torch.autograd.Function):
    """Saves rows and centers only: p is computed again backward."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, centers_KD: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(x_ND, centers_KD)
        ctx.temperature = temperature
        slabs = probabilities(x_ND, centers_KD, temperature)
        return torch.stack([p_NK.sum(0) for *_, p_NK in slabs]).sum(0) / len(x_ND)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_K: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """With z = -d2 / T: w = dL/dz = p (g - sum_j p_j g_j) / N, of which every row sums to 0."""
        x_ND, centers_KD = ctx.saved_tensors
        needs_x, needs_centers, _ = ctx.needs_input_grad
        scale = 2 / ctx.temperature
        grad_x = torch.empty_like(x_ND) if needs_x else None
        grad_centers = torch.zeros_like(centers_KD, dtype=grad_K.dtype) if needs_centers else None
        for rows, x, centers, p_NK in probabilities(x_ND, centers_KD, ctx.temperature):
            w_NK = p_NK * (grad_K - (p_NK @ grad_K)[:, None]) / len(x_ND)
            if grad_x is not None:
                grad_x[rows] = scale * (w_NK @ centers)
            if grad_centers is not None:
                grad_centers += scale * (w_NK.T @ x - w_NK.sum(0)[:, None] * centers)
        if grad_centers is not None:
            grad_centers = grad_centers.to(centers_KD.dtype)
        return grad_x, grad_centers, None


def mean_usage(x: Tensor, centers: Tensor, temperature: float) -> Tensor:
    """(K,) the mean over rows of p: how much each code is used, softly.

    Args:
        x: (..., D) with at least one row.
        centers: (K, D).
        temperature: above 0.
    Returns:
        Differentiable once in x and centers.
    Cost:
        Two products of N K D multiply-adds and as much backward; memory of a slab of rows.
    """
    rows_ND = x.reshape(-1, x.shape[-1])
    usage: Tensor = _MeanUsage.apply(rows_ND, centers, temperature)  # type: ignore[no-untyped-call]
    return usage
