"""Many passes at once: Golub-Kahan-Lanczos with full reorthogonalisation, out of the same pass.

Source: Golub and Kahan 1965, in the form of Lanczos on W^T W; Paige 1972 on why to reorthogonalise.
Everything is small vectors here, in float64 and without synchronising the device with the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

PASSES = 14
"""Passes of a cold start, and the most of one Lanczos run: 1 % on Gaussian matrices (docs)."""

_FEWEST = 6
"""Passes of the shortest Lanczos run: below, steps with momentum do more than a run's start."""

_OVER = 1e-6  # what remains of W^T W v is noise when it is this much smaller than the largest
_SQUARINGS = 60  # after which eigenvalues apart by one rounding are apart by e^100


def advance(
    call: Callable[[], object],
    vectors: Tensor,
    packed: Tensor,
    columns: Sequence[int],
    passes: int,
) -> None:
    """Calls a bound pass (see `cpu.bind`) so often, starting from the vectors as they are.

    The result of the last pass is left in `packed`; its step, in `vectors`. A few passes are steps
    like any others; more are Lanczos runs of at most `PASSES`, each starting where the last ended.
    """
    while passes > 0:
        together = min(passes, PASSES) if passes >= _FEWEST else 1
        if together > 1:
            _to_ritz_vectors(call, vectors, packed, columns, together - 1)
        call()
        passes -= together


def _to_ritz_vectors(
    call: Callable[[], object],
    vectors: Tensor,
    packed: Tensor,
    columns: Sequence[int],
    passes: int,
) -> None:
    """Replaces each v by the best in the span of v, A v, ..., A^(passes-1) v, with A = W^T W."""
    basis_KN = vectors.new_zeros(passes, vectors.shape[1])
    basis_KN[0] = start_N = vectors[0].clone()
    spans = basis_KN.split(list(columns), dim=1)
    T_MKK = vectors.new_zeros(len(columns), passes, passes)
    for k in range(passes):
        vectors[0], vectors[1] = basis_KN[k], 0
        call()
        sigma, frobenius, _, _, growth = packed.unbind(1)
        if k == 0 and packed.device.type == "cpu" and not (growth > 0).any():
            break  # nothing but zeros and NaN
        # W^T W v, over |W|_F^2 so that nothing overflows; 0 where there is nothing to be had.
        sizes_M = ((sigma / frobenius).square() / growth).nan_to_num(0, 0, 0)
        ys = vectors[0].split(list(columns))
        for span_Kn, T_KK, y, size in zip(spans, T_MKK, ys, sizes_M, strict=True):
            _extend(span_Kn, T_KK, y * size, k)
    weights_MK = _top_eigenvectors(T_MKK)
    vectors[1] = 0
    ritz = [w @ span for w, span in zip(weights_MK, spans, strict=True)]
    starts, targets = (x.split(list(columns)) for x in (start_N, vectors[0]))
    for x, start, target in zip(ritz, starts, targets, strict=True):
        target.copy_(torch.where(x.norm() > 0.5, x / x.norm(), start))


def _extend(span_Kn: Tensor, T_KK: Tensor, y: Tensor, k: int) -> None:
    """Takes in y = A v_k: a diagonal element of T, and what is new in y as the next vector."""
    basis = span_Kn[: k + 1]
    along = basis @ y
    T_KK[k, k] = along[k]
    if k + 1 == len(T_KK):
        return
    rest = y - along @ basis
    rest = rest - (basis @ rest) @ basis
    beta = rest.norm()
    is_new = beta > _OVER * T_KK.diagonal().amax()
    T_KK[k, k + 1] = T_KK[k + 1, k] = torch.where(is_new, beta, 0)
    span_Kn[k + 1] = torch.where(is_new, rest / beta, 0)


def _top_eigenvectors(T_MKK: Tensor) -> Tensor:
    """(M, K): of each symmetric positive semi-definite matrix; zero for a matrix of zeros.

    By squaring: `torch.linalg.eigh` waits for the device, and raises where it meets a NaN.
    """
    S_MKK = T_MKK
    for _ in range(_SQUARINGS):
        S_MKK = S_MKK / S_MKK.norm(dim=(1, 2), keepdim=True).clamp(min=1e-300)
        S_MKK = S_MKK @ S_MKK
    largest_M = S_MKK.diagonal(dim1=1, dim2=2).argmax(1)
    columns_MK = S_MKK.gather(2, largest_M[:, None, None].expand(-1, S_MKK.shape[1], 1))[:, :, 0]
    norms_M1: Tensor = columns_MK.norm(dim=1, keepdim=True)
    return columns_MK / norms_M1.clamp(min=1e-300)
