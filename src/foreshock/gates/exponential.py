"""Exponentials of many small matrices, and what gradients become on their way through."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

_AT_ONCE = 512
"""Matrices of 8 by 8 whose products a core keeps in its own cache; a GPU takes all."""
_DEGREE = 9
_TAYLOR = [1 / math.factorial(k) for k in range(_DEGREE + 1)]
_LARGEST_NORM = 0.5
"""At which a Taylor series of that degree is off by 1e-9 of the derivative at most."""


def exponential(x_N: Tensor) -> Tensor:
    """expm of each matrix.

    Args:
        x_N: (N, 8, 8), float64.
    Returns:
        Like x_N; where a matrix is not finite, neither is its exponential.
    """
    return by_parts(torch.linalg.matrix_exp, x_N)


def pulled_back(x_N: Tensor, grad_N: Tensor) -> Tensor:
    """The gradient of x, given that of expm(x): expm's derivative at x^T, in the direction grad.

    Scaling, a Taylor series and squaring, of x^T and of what it becomes when it is moved along
    grad: (X, D) (Y, E) = (X Y, X E + D Y). Torch's own derivative is the exponential of
    [[x^T, grad], [0, x^T]], which is exact to more digits than a gradient has and takes longer.

    Args:
        x_N: (N, 8, 8), float64.
        grad_N: likewise.
    Returns:
        Likewise.
    Cost:
        3 (4 + s) products for s squarings; one number is waited for, the largest norm.
    Source:
        Al-Mohy and Higham, Computing the Frechet derivative of the matrix exponential, 2009.
    """
    # Where one is no number, only its own gradient is to be none.
    largest = float(x_N.abs().sum(-1).nan_to_num(0.0, 0.0).amax())
    squarings = max(0, math.ceil(math.log2(largest / _LARGEST_NORM))) if largest else 0
    scale = 2.0**-squarings

    def part(x: Tensor, grad: Tensor) -> Tensor:
        value, moved = _taylor(scale * x.mT, scale * grad)
        for _ in range(squarings):
            moved = torch.baddbmm(value @ moved, moved, value)
            value = value @ value
        return moved

    return by_parts(part, x_N, grad_N)


def _taylor(x: Tensor, dx: Tensor) -> tuple[Tensor, Tensor]:
    """The series to degree 9, in threes: ((x^9 ..  x^6) x^3 + x^5 .. x^3) x^3 + x^2 .. 1."""
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    x2, dx2 = x @ x, torch.baddbmm(x @ dx, dx, x)
    x3, dx3 = x2 @ x, torch.baddbmm(x2 @ dx, dx2, x)
    value, moved = _TAYLOR[9] * x3, _TAYLOR[9] * dx3
    for low in (6, 3, 0):
        if low < 6:
            moved = torch.baddbmm(value @ dx3, moved, x3)
            value = value @ x3
        c0, c1, c2 = _TAYLOR[low : low + 3]
        value = value + c0 * eye + c1 * x + c2 * x2
        moved = moved + c1 * dx + c2 * dx2
    return value, moved


def by_parts(compute: Callable[..., Tensor], *x_N: Tensor) -> Tensor:
    """compute(*x_N), on a CPU for so many rows at a time as stay in a core's cache."""
    if x_N[0].device.type != "cpu" or len(x_N[0]) <= _AT_ONCE:
        return compute(*x_N)
    parts = zip(*(x.split(_AT_ONCE) for x in x_N), strict=True)
    return torch.cat([compute(*part) for part in parts])
