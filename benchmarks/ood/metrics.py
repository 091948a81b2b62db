"""How well scores tell out-of-distribution inputs from normal ones.

One convention everywhere: a higher score is more out-of-distribution (OOD), and OOD inputs are the
positive class. Only `fpr_at_95_tpr` is asked which class its true positives are, because the
literature means both by that name.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Quality:
    """What a score is worth on one OOD set, each in [0, 1]."""

    auroc: float
    aupr: float
    fpr95: float
    """OOD inputs taken for normal where 95 % of the normal ones are kept, as OpenOOD counts."""


def quality(normal: Tensor, ood: Tensor) -> Quality:
    """All that is reported of the scores of normal and of OOD inputs."""
    return Quality(
        auroc(normal, ood), aupr(normal, ood), fpr_at_95_tpr(normal, ood, positive="normal")
    )


def auroc(normal: Tensor, ood: Tensor) -> float:
    """P(score of an OOD input > score of a normal one) + P(they are equal) / 2.

    Args:
        normal, ood: (N,) and (M,) scores of normal and of OOD inputs.
    Raises:
        ValueError: if one of them is empty or holds a NaN, which has no rank.
    """
    normal, ood = _checked(normal, "normal").sort().values, _checked(ood, "ood")
    below = torch.searchsorted(normal, ood, right=False)
    not_above = torch.searchsorted(normal, ood, right=True)
    return float((below + not_above).double().mean()) / (2 * len(normal))


def aupr(normal: Tensor, ood: Tensor) -> float:
    """Average precision: the sum over thresholds of precision times the recall gained there.

    OOD is positive; inputs of equal score pass a threshold together.

    Args and Raises: as of `auroc`.
    """
    normal, ood = _checked(normal, "normal"), _checked(ood, "ood")
    thresholds = torch.cat([normal, ood]).unique()  # ascending
    false_positives = len(normal) - torch.searchsorted(normal.sort().values, thresholds)
    true_positives = len(ood) - torch.searchsorted(ood.sort().values, thresholds)
    precision = true_positives / (true_positives + false_positives)
    gained = true_positives - torch.cat([true_positives[1:], true_positives.new_zeros(1)])
    return float((precision.double() * gained).sum()) / len(ood)


def fpr_at_95_tpr(normal: Tensor, ood: Tensor, *, positive: Literal["normal", "ood"]) -> float:
    """The share of the other class that is taken for `positive` where 95 % of `positive` is.

    Args:
        normal, ood: as of `auroc`.
        positive: "normal" keeps the lowest scores that make 95 % of the normal inputs, and counts
            the OOD inputs among them; "ood" flags the highest that make 95 % of the OOD inputs, and
            counts the normal ones.
    Raises:
        ValueError: as `auroc`, and if `positive` is neither.
    """
    normal, ood = _checked(normal, "normal"), _checked(ood, "ood")
    if positive not in ("normal", "ood"):
        raise ValueError(f"positive is {positive!r}; accepted: 'normal', 'ood'")
    kept, other = (normal, ood) if positive == "normal" else (-ood, -normal)
    num_kept = (95 * len(kept) + 99) // 100  # rounded up, without the error of 0.95
    threshold = kept.sort().values[num_kept - 1]
    return float((other <= threshold).double().mean())


def _checked(scores: Tensor, name: str) -> Tensor:
    scores = scores.detach().double().cpu()
    if scores.dim() != 1 or len(scores) == 0:
        raise ValueError(f"{name} has shape {tuple(scores.shape)}; accepted: (N,) with N from 1 up")
    if scores.isnan().any():
        raise ValueError(f"{name} holds {int(scores.isnan().sum())} NaN; accepted: none")
    return scores
