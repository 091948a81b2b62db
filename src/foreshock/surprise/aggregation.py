"""One score per sample from those of several layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor


def mean_surprise(per_layer: Mapping[str, Tensor]) -> Tensor:
    """The mean over layers of the surprise of each sample.

    score_n = 1/L sum_l s_l,n, where s_l,n of a layer with positions is the mean over these.

    Args:
        per_layer: (N,) or (N, ...) floating-point tensors by the layer's name, N and the device the
            same for all.
    Returns:
        (N,). NaN where any layer says NaN. No sample's score depends on the others.
    Raises:
        TypeError, ValueError: naming the layers, what they are and what is accepted.
    Cost:
        One read of every tensor; nothing waits for a device.
    """
    rows_LN = _aligned(per_layer, _mean_of_positions)
    # In double precision, where the order of summation, which the batch may change, is not seen.
    return rows_LN.mean(0, dtype=torch.float64).to(rows_LN.dtype)


def max_surprise(per_layer: Mapping[str, Tensor]) -> Tensor:
    """The largest surprise of each sample over layers, and over the positions of these.

    Args, Returns, Raises, Cost:
        As for `mean_surprise`.
    """
    return _aligned(per_layer, _max_of_positions).amax(0)


def weighted_surprise(per_layer: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """The weighted mean over layers of the surprise of each sample.

    score_n = sum_l w_l s_l,n / sum_l w_l, where s_l,n of a layer with positions is the mean of
    these.

    Args:
        per_layer: as for `mean_surprise`.
        weights: finite, from 0 up, not all 0; one for every layer and no others.
    Returns, Raises, Cost:
        As for `mean_surprise`. A NaN counts also where its weight is 0.
    """
    rows_LN = _aligned(per_layer, _mean_of_positions)
    check_weights(weights, list(per_layer))
    each_L1 = shares([weights[name] for name in per_layer])[:, None].to(rows_LN.device)
    return (rows_LN * each_L1).sum(0).to(rows_LN.dtype)


def shares(weights: Sequence[float]) -> Tensor:
    """(L,) float64: weights in proportion to these, of sum 1."""
    total = math.fsum(weights)
    return torch.tensor([weight / total for weight in weights], dtype=torch.float64)


def check_weights(weights: Mapping[str, float], names: list[str]) -> None:
    """Refuses weights that are not one for each of these layers.

    Raises:
        ValueError: naming what was given and what is accepted.
    """
    missing, unknown = set(names) - set(weights), set(weights) - set(names)
    if missing or unknown:
        raise ValueError(
            f"weights lacks {sorted(missing)} and has {sorted(unknown)} beside the layers; "
            f"accepted: exactly {names}"
        )
    is_weight = all(math.isfinite(w) and w >= 0 for w in weights.values())
    if not is_weight or not any(weights.values()):
        raise ValueError(
            f"weights is {dict(weights)}; accepted: finite numbers from 0 up, not all 0"
        )


def _aligned(per_layer: Mapping[str, Tensor], over_positions: Callable[[Tensor], Tensor]) -> Tensor:
    """(L, N), or an error that names those which cannot be brought together."""
    if not per_layer:
        raise ValueError("per_layer is empty; accepted: one tensor per layer, of at least one")
    for name, tensor in per_layer.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            given = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"per_layer[{name!r}] is {given}; accepted: floating-point tensors")
    places = {name: (*t.shape[:1], t.device) for name, t in per_layer.items()}
    if len(set(places.values())) > 1 or any(t.dim() == 0 for t in per_layer.values()):
        each = ", ".join(f"{n!r} {tuple(t.shape)} on {t.device}" for n, t in per_layer.items())
        raise ValueError(
            f"per_layer holds {each}; accepted: (N,) or (N, ...) with the same N samples on the "
            "same device for every layer"
        )
    return torch.stack([over_positions(t) if t.dim() > 1 else t for t in per_layer.values()])


def _mean_of_positions(tensor: Tensor) -> Tensor:
    return tensor.flatten(1).mean(1, dtype=torch.float64).to(tensor.dtype)


def _max_of_positions(tensor: Tensor) -> Tensor:
    return tensor.flatten(1).amax(1)
