"""soft_assign: which code each row is nearest to, and how surely, without an N x K tensor."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from foreshock.ops._tensors import FLOATING_DTYPES, local_tensor
from foreshock.ops.soft_assign import register
from foreshock.ops.soft_assign.assigner import SoftAssigner
from foreshock.ops.soft_assign.checks import check_number
from foreshock.ops.soft_assign.frame import Assignment
from foreshock.ops.soft_assign.probs import probs as find_probs

__all__ = ["Assignment", "SoftAssigner", "SoftCode", "soft_assign"]

DTYPES = FLOATING_DTYPES[:4]


@dataclasses.dataclass(frozen=True, eq=False)
class SoftCode:
    """The codes of x (..., D) among K centers; every field is (...) but `probs`.

    float64 if x or the centers are, float32 otherwise.
    """

    best_index: Tensor
    """int64: the nearest center; the first of those that are equally near."""
    distance: Tensor
    """Squared distance to it."""
    length: Tensor
    """L = -log(p_best + eps), in nats."""
    entropy: Tensor
    """H = -sum_k p_k log(p_k + eps), in nats."""
    surprise: Tensor
    """beta_length L + beta_entropy H + beta_distance log(1 + distance)."""
    probs: Tensor | None
    """(..., K): p, if it was asked for."""


def soft_assign(
    x: Tensor,
    centers: Tensor,
    *,
    temperature: float = 1.0,
    eps: float = 1e-12,
    beta_length: float = 1.0,
    beta_entropy: float = 1.0,
    beta_distance: float = 0.0,
    return_probs: bool = False,
) -> SoftCode:
    """Assigns every row of x softly to the centers, and says how many nats that takes.

    d2_k = |x - c_k|^2,  p = softmax_k(-d2 / temperature),  b = argmin_k d2,
    L = -log(p_b + eps),  H = -sum_k p_k log(p_k + eps),
    surprise = beta_length L + beta_entropy H + beta_distance log(1 + d2_b).

    Args:
        x: (..., D), float64, float32, bfloat16 or float16.
        centers: (K, D) on the device of x, of any of these types.
        temperature: of the softmax, in units of squared distance; above 0.
        eps: at least 0; bounds L by -log(eps).
        beta_length: finite weight of L in the surprise.
        beta_entropy: that of H.
        beta_distance: that of log(1 + d2_b).
        return_probs: whether p is returned too, which is an (..., K) tensor, made in float64 some
            rows at a time.
    Returns:
        SoftCode, differentiable once in x and centers but for `best_index`. Squared distances are
        sums of squared differences, to which a common offset does no harm; z = -d2 / temperature
        has an error of some 1e-7 |z| in float32, and p, L and H have it from z. Where the nearest
        distances are equal after rounding, or all infinite, these codes share p: no far x is sure
        of its code by overflow. A row with a NaN is NaN.
    Raises:
        TypeError, ValueError: naming the argument, what it is and what is accepted.
        RuntimeError: for a derivative of a derivative.
    Cost:
        N K D differences, twice that again for the gradient, which recomputes them. Memory is
        O(N + K D) on the CPU, where x is read as it lies; elsewhere x is copied once. With
        `return_probs` also N K numbers for p, and as many for its gradient, which whoever
        differentiates it brings along.
    Source:
        The formulas above; csrc/soft_assign.
    """
    if not torch.compiler.is_compiling():
        x, centers = local_tensor(x, DTYPES, "x"), local_tensor(centers, DTYPES, "centers")
    _check_shapes(x, centers)
    check_number(temperature, "temperature", "a finite number above 0", temperature > 0)
    check_number(eps, "eps", "a finite number from 0 up", eps >= 0)
    for name, beta in (
        ("beta_length", beta_length),
        ("beta_entropy", beta_entropy),
        ("beta_distance", beta_distance),
    ):
        check_number(beta, name, "a finite number", True)
    shape = x.shape[:-1]
    x_ND = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    is_differentiable = torch.is_grad_enabled() and (x.requires_grad or centers.requires_grad)
    if is_differentiable or torch.compiler.is_compiling():
        *scalars, best = torch.ops.foreshock.soft_assign(
            x_ND, centers, float(temperature), float(eps)
        )
    else:
        best, *scalars = register.forward(x_ND, centers, float(temperature), float(eps))
    parts = (best, *scalars[:3])
    if x.dim() != 2:
        parts = tuple([part.view(shape) for part in parts])
    best_index, distance, length, entropy = parts
    weighted = length if beta_length == 1 else beta_length * length
    surprise = weighted + (entropy if beta_entropy == 1 else beta_entropy * entropy)
    if beta_distance != 0:
        surprise = surprise + beta_distance * distance.log1p()
    probs = None
    if return_probs:
        wide_KD = centers.to(register.computed_dtype(x, centers))
        p_NK = find_probs(x_ND, wide_KD, float(temperature))
        probs = p_NK.view(*shape, len(centers))
    return SoftCode(best_index, distance, length, entropy, surprise, probs)


def _check_shapes(x: Tensor, centers: Tensor) -> None:
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}; accepted: (..., D) with D from 1 up")
    if centers.dim() != 2 or centers.shape[0] == 0 or centers.shape[1] != x.shape[-1]:
        raise ValueError(
            f"centers has shape {tuple(centers.shape)}; accepted: (K, {x.shape[-1]}) with K from 1 "
            f"up, for x of shape {tuple(x.shape)}"
        )
    if centers.device != x.device:
        raise ValueError(f"centers is on {centers.device}; accepted: {x.device}, where x is")
