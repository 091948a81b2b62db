"""soft_assign in plain PyTorch: the truth that the compiled implementations must agree with."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from foreshock.ops.soft_assign.frame import Assignment, Frame

_ELEMENTS = 1 << 18  # of rows times codes that are held at a time

Saved = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def why_unavailable(device_type: str) -> str | None:
    """Runs on every device."""
    return None


def blocks(rows: int, codes: int) -> Iterator[slice]:
    """Rows that are worked on at a time; of none, one block of none."""
    step = max(1, _ELEMENTS // codes)
    return (slice(begin, begin + step) for begin in range(0, max(1, rows), step))


def squared_distances(x_ND: Tensor, centers_KD: Tensor) -> Tensor:
    """float64 (N, K): sum_d (x - c)^2, without the expansion that loses what is close to both."""
    exact = "donot_use_mm_for_euclid_dist"
    return torch.cdist(x_ND.double(), centers_KD.double(), compute_mode=exact).square()


def _exponents(d2_NK: Tensor, temperature: float) -> Tensor:
    """-d2 / T less the largest; infinities that are equal are alike, as finite numbers are."""
    least_N1 = d2_NK.amin(1, keepdim=True)
    return torch.where(d2_NK == least_N1, 0, (least_N1 - d2_NK) / temperature)


def probs(x_ND: Tensor, centers_KD: Tensor, temperature: float) -> Tensor:
    """(N, K): softmax over k of -|x - c_k|^2 / T, differentiable."""
    p_NK = _exponents(squared_distances(x_ND, centers_KD), temperature).softmax(1)
    return p_NK.to(centers_KD.dtype)


@torch.no_grad()
def forward(x_ND: Tensor, centers_KD: Tensor, temperature: float, eps: float) -> Saved:
    """The code of each row, through float64; the formulas are those of `soft_assign`.

    Returns:
        best_index int64, distance, length, entropy, log_normaliser = log sum_k e^(-d2_k / T); (N,).
    """
    parts = []
    for rows in blocks(len(x_ND), len(centers_KD)):
        d2_NK = squared_distances(x_ND[rows], centers_KD)
        distance, best = d2_NK.min(1)
        t_NK = _exponents(d2_NK, temperature)
        log_sum = t_NK.logsumexp(1)
        p_NK = t_NK.softmax(1)
        length = -(p_NK.gather(1, best[:, None])[:, 0] + eps).log()
        entropy = -torch.special.xlogy(p_NK, p_NK + eps).sum(1)
        parts.append((best, distance, length, entropy, log_sum - distance / temperature))
    best, *scalars = map(torch.cat, zip(*parts, strict=True))
    distance, length, entropy, log_normaliser = (s.to(centers_KD.dtype) for s in scalars)
    return best, distance, length, entropy, log_normaliser


class Assigner:
    """z = (x - offset) @ basis and its codes, through float64."""

    looks_first = False

    def __init__(self, frame: Frame) -> None:
        self._frame = frame

    def refresh(self) -> None:
        """Nothing was laid out."""

    def distance(self, x_ND: Tensor) -> Tensor:
        """See `BoundAssigner`."""
        return self.assign(x_ND, False).distance

    def writer(self, out: Tensor) -> None:
        """Nothing is read as it lies."""

    @torch.no_grad()
    def assign(self, x_ND: Tensor, is_mapped_wanted: bool) -> Assignment:
        """See `BoundAssigner`."""
        centers, offset, basis, temperature, eps = self._frame
        z_NE = x_ND.double()
        if offset is not None:
            z_NE = z_NE - offset.double()
        if basis is not None:
            with torch.autocast(z_NE.device.type, enabled=False):
                z_NE = z_NE @ basis.double()
        best, distance, length, entropy, _ = forward(z_NE, centers, temperature, eps)
        mapped = z_NE.to(centers.dtype) if is_mapped_wanted else None
        return Assignment(best, distance, length, entropy, mapped)


@torch.no_grad()
def backward(
    grad_distance: Tensor,
    grad_length: Tensor,
    grad_entropy: Tensor,
    x: Tensor,
    centers: Tensor,
    temperature: float,
    eps: float,
    saved: Saved,
    *,
    needs: tuple[bool, bool] = (True, True),
) -> tuple[Tensor, Tensor]:
    """Gradients in x (N, D) and centers (K, D), both; `saved` is what `forward` returned.

    With z = -d2 / T and h_k = log(p_k + eps) + p_k / (p_k + eps):
        dL/dz_k = -(p_b / (p_b + eps)) ([k = b] - p_k),   dH/dz_k = p_k (sum_j p_j h_j - h_k).
    """
    grad_x, kept = torch.empty_like(x), centers.dtype
    x, centers = x.double(), centers.double()
    grad_centers = torch.zeros_like(centers)
    for rows in blocks(len(x), len(centers)):
        x_ND, best_N1 = x[rows], saved[0][rows, None]
        p_NK = probs(x_ND, centers, temperature)  # float64
        h_NK = torch.where(p_NK > 0, (p_NK + eps).log() + p_NK / (p_NK + eps), 0)
        best_p = p_NK.gather(1, best_N1)
        pull = grad_length[rows, None] * best_p / (best_p + eps)
        mean = (p_NK * h_NK).sum(1, keepdim=True)
        w_NK = p_NK * (grad_entropy[rows, None] * (h_NK - mean) - pull) / temperature
        w_NK.scatter_add_(1, best_N1, pull / temperature + grad_distance[rows, None])
        grad_x[rows] = 2 * (w_NK.sum(1, keepdim=True) * x_ND - w_NK @ centers)
        grad_centers += 2 * (w_NK.sum(0)[:, None] * centers - w_NK.T @ x_ND)
    return grad_x, grad_centers.to(kept)
