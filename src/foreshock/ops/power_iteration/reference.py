"""power_iteration in plain PyTorch: the truth that the compiled implementations must agree with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from foreshock.ops.power_iteration.matrices import Layout, as_matrix, layout_of

_ROWS = 1024  # that are widened to float64 at a time
LEAST_SHARE = 1e-16  # |W v|^2 below this share of |W|^2 is rounding


def why_unavailable(device_type: str) -> str | None:
    """Runs on every device."""
    return None


def advance(W: Tensor, v: Tensor, previous: Tensor) -> Tensor:
    """One pass over W (m, n), and the step of v and previous (n,) that it allows, in place.

    The formulas are those of `power_iteration`; W is scaled by a power of two, which is exact, so
    that no square overflows or vanishes. Without a finite element other than zero, the vectors stay
    as they are; where W v is zero, v is taken anew.

    Returns:
        (5,) float64, a row of `SpectralStats.packed`.
    """
    blocks = W.split(_ROWS) if W.numel() else ()
    largest = torch.stack([v.new_zeros(()), *(b.abs().amax().double() for b in blocks)]).amax()
    is_usable = torch.isfinite(largest) & (largest > 0)
    exponent = torch.frexp(torch.where(is_usable, largest, 1))[1].clamp(-1022, 1022)
    scale = torch.ldexp(torch.ones_like(largest), -exponent)
    usq, wsq, y = v.new_zeros(()), v.new_zeros(()), torch.zeros_like(v)
    for block in blocks:
        w = block.double() * scale
        u = w @ v
        y += w.T @ u
        usq += u @ u
        wsq += w.square().sum()
    sees = is_usable & (usq > LEAST_SHARE * wsq)
    sigma = torch.where(sees, y.norm() / usq.sqrt(), usq.sqrt())
    growth = torch.where(sees, sigma / usq.sqrt(), 0)
    z = torch.where(sees, y / usq - previous / 4, torch.ones_like(v))
    kept = torch.where(sees, v / z.norm().clamp(min=0.5), 0)
    previous.copy_(torch.where(is_usable, kept, previous))
    v.copy_(torch.where(is_usable, z / z.norm(), v))
    sigma, frobenius = sigma / scale, wsq.sqrt() / scale
    sigma_min_proxy = frobenius / (10 * min(max(1, *W.shape), *W.shape) ** 0.5)
    stable_rank = torch.where(sigma > 0, (frobenius / sigma).square(), 0)
    row = torch.stack([sigma, frobenius, sigma / (sigma_min_proxy + 1e-8), stable_rank, growth])
    return torch.where(is_usable, row, torch.where(torch.isfinite(largest), 0, torch.nan))


def bind(
    weights: Sequence[Tensor],
    vectors: Tensor,
    packed: Tensor,
    layouts: Sequence[Layout] | None = None,
) -> Callable[[], None]:
    """Returns a call that passes over these weights once; see `cpu.bind`."""
    layouts = layouts or [layout_of(weight) for weight in weights]

    def call() -> None:
        spans = vectors.split([layout.columns for layout in layouts], dim=1)
        for weight, layout, pair, row in zip(weights, layouts, spans, packed, strict=True):
            row.copy_(advance(as_matrix(weight, layout), *pair))

    return call
