"""What a codebook is trained by."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from foreshock.surprise.assignment import rows_to_win
from foreshock.surprise.traces import Call


class CodedRows(NamedTuple):
    """One call of a layer in its graph, with the centers (K, D) that it was coded by."""

    call: Call
    centers: Tensor


def coding_loss(
    calls: Iterable[CodedRows],
    assign_weight: float = 1.0,
    commit_weight: float = 0.25,
    balance_weight: float = 0.1,
) -> Tensor:
    """The mean over calls of assign_weight mean S + commit_weight mean d2 + balance_weight B.

    B = sum_k min_n (|r_n - c_k|^2 - d2_n), d2_n = min_j |r_n - c_j|^2: 0 for a code that is some
    row's nearest; any other is drawn to the row that it is closest to winning, until it has. S
    alone is least where all rows have one code and the others are far away; d2 keeps the used
    centers at the features. (The entropy of mean p would not do: it is flat where the second code
    is many temperatures behind, and content with codes between all rows.)

    Args:
        calls: coded rows, at least one row in each.
        assign_weight, commit_weight, balance_weight: finite, from 0 up.
    Returns:
        A scalar, differentiable once.
    Raises:
        ValueError: a weight out of bounds, or no calls.
    Cost:
        N K D multiply-adds for B; backward is of K D.
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
    call, centers = rows
    of_length, of_entropy, of_distance = call.betas
    surprise = of_length * call.length.mean() + of_entropy * call.entropy.mean()
    if of_distance != 0:
        surprise = surprise + of_distance * call.distance.log1p().mean()
    loss = assign * surprise + commit * call.distance.mean()
    return loss if balance == 0 else loss + balance * _balance(call, centers)


def _balance(call: Call, centers: Tensor) -> Tensor:
    rows_ND, distance_N = call.reduced.detach().flatten(0, -2), call.distance.detach().flatten()
    to_win_K = rows_to_win(rows_ND, centers.detach(), distance_N)
    d2_K = (centers - rows_ND[to_win_K]).to(distance_N.dtype).square().sum(1)
    # Of a used code the difference is 0 but for rounding, and its gradient would come and go.
    is_unused_K = torch.ones_like(d2_K).index_fill_(0, call.best_index.flatten(), 0)
    return (is_unused_K * (d2_K - distance_N[to_win_K])).sum()
