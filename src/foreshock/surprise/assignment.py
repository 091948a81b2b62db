"""Distances of all rows to all codes, a slab of rows at a time.

The square is expanded around the mean of the centers, which costs a matrix product: what is done
with all rows at once does not need the digits that `foreshock.ops.soft_assign` gives each of them.

Shapes: N rows, K codes, D features.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_ELEMENTS = 1 << 20  # of rows times codes that are held at a time


def probabilities(
    x_ND: Tensor, centers_KD: Tensor, temperature: float
) -> Iterator[tuple[slice, Tensor]]:
    """Slabs of rows: which, and their p_nk = softmax_k(-|x_n - c_k|^2 / T)."""
    for rows, x, centers in _centred_slabs(x_ND, centers_KD):
        # |x|^2 is the same for every code.
        scaled = centers * (2 / temperature)
        yield rows, torch.addmm((centers * scaled).sum(1) / -2, x, scaled.T).softmax(1)


@torch.no_grad()
def rows_to_win(x_ND: Tensor, centers_KD: Tensor, distance_N: Tensor) -> Tensor:
    """(K,) int64: the row n of least |x_n - c_k|^2 - distance_n, for each code.

    Args:
        x_ND: at least one row.
        distance_N: squared, to the nearest center of each row.
    """
    best_K = distance_N.new_full((len(centers_KD),), torch.inf)
    index_K = torch.zeros_like(best_K, dtype=torch.int64)
    with torch.autocast(x_ND.device.type, enabled=False):
        for rows, x, centers in _centred_slabs(x_ND, centers_KD):
            # |c|^2 is the same for every row.
            lead_N1 = (x.square().sum(1) - distance_N[rows])[:, None]
            least = torch.addmm(lead_N1, x, centers.T, alpha=-2).min(0)
            index_K = torch.where(least.values < best_K, least.indices + rows.start, index_K)
            best_K = torch.minimum(best_K, least.values)
    return index_K


def _centred_slabs(x_ND: Tensor, centers_KD: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Slabs of rows: which, these, and the centers, both less the mean of the centers."""
    dtype = torch.float64 if torch.float64 in (x_ND.dtype, centers_KD.dtype) else torch.float32
    wide_KD = centers_KD.to(dtype)
    offset = wide_KD.mean(0)
    step = max(1, _ELEMENTS // len(wide_KD))
    for begin in range(0, len(x_ND), step):
        rows = slice(begin, begin + step)
        yield rows, x_ND[rows].to(dtype) - offset, wide_KD - offset
