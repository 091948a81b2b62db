"""calibrated_scores in C++ (csrc/calibrated_scores/cpu.cpp), once for each instruction set."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from foreshock.ops._backend import active_isa, load_kernels
from foreshock.ops.calibrated_scores.result import CalibratedScores


def why_unavailable(device_type: str) -> str | None:
    """What keeps this implementation from tensors of a device; None if nothing does."""
    if device_type != "cpu":
        return "reads the memory of the host only"
    kernels = load_kernels()
    return kernels if isinstance(kernels, str) else None


@functools.cache
def _kernel(isa: str | None) -> Callable[..., Any]:
    kernel: Callable[..., Any] = getattr(
        load_kernels(), f"calibrated_scores_score_{isa or active_isa()}"
    )
    return kernel


def score(
    distance_LN: Tensor,
    scale_2L: Tensor,
    weights_L: Tensor | None,
    reference: Tensor | None,
    threshold: float,
    *,
    is_largest: bool,
    isa: str | None = None,
) -> CalibratedScores:
    """See `reference.score`."""
    layers, samples = distance_LN.shape
    z_LN, scores = torch.empty(layers, samples), torch.empty(samples)
    share = is_above = None
    to = places = 0, 0
    if reference is not None:
        share = torch.empty(samples, dtype=torch.float64)
        is_above = torch.empty(samples, dtype=torch.bool)
        to, places = (share.data_ptr(), is_above.data_ptr()), (reference.data_ptr(), len(reference))
    _kernel(isa)(
        distance_LN.data_ptr(),
        scale_2L.data_ptr(),
        0 if weights_L is None else weights_L.data_ptr(),
        places[0],
        layers,
        samples,
        places[1],
        is_largest,
        threshold,
        z_LN.data_ptr(),
        scores.data_ptr(),
        *to,
    )
    return CalibratedScores(z_LN, scores, share, is_above)
