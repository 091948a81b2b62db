"""health_scan in plain PyTorch: the truth that the compiled implementations must agree with."""

from __future__ import annotations

from collections.abc import Callable

import torch


def why_unavailable(device_type: str) -> str | None:
    """Runs on every device."""
    return None


def row(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """numel, nan, inf (int64) and absmax, sum, sumsq (float64) of one tensor, as 0-dim tensors."""
    # Float8 has no arithmetic of its own, and float32 holds each of its values.
    x = (x.float() if x.dtype.itemsize == 1 else x).detach().flatten()
    is_finite = torch.isfinite(x)
    finite = torch.where(is_finite, x, 0).double()
    magnitude = finite.abs()
    return (
        is_finite.new_full((), x.numel(), dtype=torch.int64),
        torch.isnan(x).sum(),
        torch.isinf(x).sum(),
        magnitude.amax() if x.numel() else finite.sum(),
        finite.sum(),
        finite.square().sum(),
    )


def bind(tensors: list[torch.Tensor | None], packed: torch.Tensor) -> Callable[[], None]:
    """Returns a call that scans these tensors into `packed`, (T, 6); see `HealthStats.packed`."""
    counts, sums = packed.view(torch.int64), packed

    def scan() -> None:
        packed.zero_()
        for t, x in enumerate(tensors):
            if x is not None:
                numel, nan, inf, *floats = row(x)
                counts[t, :3] = torch.stack([numel, nan, inf])
                sums[t, 3:] = torch.stack(floats)

    return scan
