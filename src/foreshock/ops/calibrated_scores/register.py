"""`torch.ops.foreshock.calibrated_scores`: the op as torch.compile and torch.export see it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foreshock.ops._backend import choose
from foreshock.ops.calibrated_scores.result import CalibratedScores

_library = torch.library.Library("foreshock", "FRAGMENT")
_library.define(
    "calibrated_scores(Tensor distances, Tensor scale, Tensor? weights, Tensor? reference, "
    "float threshold, bool is_largest) -> (Tensor, Tensor, Tensor, Tensor)"
)

_Four = tuple[Tensor, Tensor, Tensor, Tensor]


def score(
    distances: Tensor,
    scale: Tensor,
    weights: Tensor | None,
    reference: Tensor | None,
    threshold: float,
    is_largest: bool,
) -> CalibratedScores:
    """What the implementation for the device makes of it."""
    module = choose("calibrated_scores", distances.device.type).module
    scores: CalibratedScores = module.score(
        distances, scale, weights, reference, threshold, is_largest=is_largest
    )
    return scores


@torch.library.impl(_library, "calibrated_scores", "CompositeExplicitAutograd")
def _impl(*given: Any) -> _Four:
    """z, score, percentile and is_above; without a reference the last two have no elements."""
    z, scores, share, is_above = score(*given)
    if share is None or is_above is None:
        return z, scores, z.new_empty(0, dtype=torch.float64), z.new_empty(0, dtype=torch.bool)
    return z, scores, share, is_above


@torch.library.register_fake("foreshock::calibrated_scores", lib=_library)
def _fake(
    distances: Tensor,
    scale: Tensor,
    weights: Tensor | None,
    reference: Tensor | None,
    threshold: float,
    is_largest: bool,
) -> _Four:
    samples = distances.shape[1]
    ranked = 0 if reference is None else samples
    return (
        torch.empty_like(distances),
        distances.new_empty(samples),
        distances.new_empty(ranked, dtype=torch.float64),
        distances.new_empty(ranked, dtype=torch.bool),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: _Four) -> None:
    ctx.mark_non_differentiable(*output)
    ctx.inputs = len(inputs)


def _no_gradient(ctx: Any, *_: Tensor) -> tuple[None, ...]:
    return (None,) * ctx.inputs  # type: ignore[no-any-return]


torch.library.register_autograd(
    "foreshock::calibrated_scores", _no_gradient, setup_context=_save, lib=_library
)
