"""What a codebook is trained by."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import torch
from torch import Tensor

from foreshock.surprise.assignment import mean_usage


@dataclasses.dataclass(frozen=True)
class CodedRows:
    """One call's rows with their codes, in the graph."""

    reduced: Tensor
    """(..., D)."""
    centers: Tensor
    """(K, D)."""
    temperature: float
    distance: Tensor
    """(...)."""
    surprise: Tensor
    """(...)."""


def coding_loss(
    calls: Iterable[CodedRows],
    assign_weight: float = 1.0,
    commit_weight: float = 0.25,
    balance_weight: float = 0.1,
) -> Tensor:
    """The mean over calls of assign_weight mean S + commit_weight mean d2 + balance_weight B.

    B = log K - H(u), u_k = mean_n p_nk: how far, in nats, soft usage of the codes is from equal.
    S alone is least where all rows have one code and the others are far away; d2 keeps the centers
    at the features, B keeps codes in use.

    Args:
        calls: coded rows, at least one row in each.
        assign_weight, commit_weight, balance_weight: finite, from 0 up.
    Returns:
        A scalar, differentiable once.
    Raises:
        ValueError: a weight out of bounds, or no calls.
    Cost:
        Two products of N K D multiply-adds for B and as many backward, which computes p again.
    """
    weights = {
        "assign_weight": assign_weight,
        "commit_weight": commit_weight,
        "balance_weight": balance_weight,
    }
    for name, weight in weights.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"{name} is {weight}; accepted: a finite number from 0 up")
    terms = [_loss_of(rows, *weights.values()) for rows in calls]
    if not terms:
        raise ValueError("calls is empty; accepted: at least one call of a coding layer")
    return torch.stack(terms).mean()


def _loss_of(rows: CodedRows, assign: float, commit: float, balance: float) -> Tensor:
    loss: Tensor = assign * rows.surprise.mean() + commit * rows.distance.mean()
    if balance == 0:
        return loss
    usage_K = mean_usage(rows.reduced, rows.centers, rows.temperature)
    entropy: Tensor = -torch.special.xlogy(usage_K, usage_K.clamp(min=1e-12)).sum()
    return loss + balance * (math.log(len(usage_K)) - entropy)
