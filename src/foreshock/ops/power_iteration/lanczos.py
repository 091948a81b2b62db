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
_SQUARINGS = 40  # after which eigenvalues apart by 1e-9, which is nothing, are apart by e^1000


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
    spans = [_Span(vectors[0], columns, n, passes) for n in dict.fromkeys(columns)]
    for k in range(passes):
        for span in spans:
            span.put_out(k)
        vectors[1] = 0
        call()
        sigma, frobenius, _, _, growth = packed.unbind(1)
        if k == 0 and packed.device.type == "cpu" and not (growth > 0).any():
            break  # nothing but zeros and NaN
        # W^T W v, over |W|_F^2 so that nothing overflows; 0 where there is nothing to be had.
        sizes_M = ((sigma / frobenius).square() / growth).nan_to_num(0, 0, 0)
        for span in spans:
            span.take_in(k, sizes_M)
    vectors[1] = 0
    weights_MK = _top_eigenvectors(torch.cat([span.T_GKK for span in spans]))
    for span, weights_GK in zip(
        spans, weights_MK.split([len(s.T_GKK) for s in spans]), strict=True
    ):
        span.put_out_ritz_vectors(weights_GK)


class _Span:
    """Of all G matrices of n columns, the K directions found so far and T = V^T A V.

    Together, since a dozen small operations for each matrix and pass take many times as long as the
    passes over a small model. The sums are over whole rows of
    more than one, which no number of threads and no other matrix changes.
    """

    def __init__(self, v_N: Tensor, columns: Sequence[int], n: int, passes: int) -> None:
        of_all = v_N.split(list(columns))
        self._members = [m for m, columns_m in enumerate(columns) if columns_m == n]
        self._vs = [of_all[m] for m in self._members]
        self._start_Gn = torch.stack(self._vs)
        self._basis_GKn = v_N.new_zeros(len(self._vs), passes, n)
        self._basis_GKn[:, 0] = self._start_Gn
        self.T_GKK = v_N.new_zeros(len(self._vs), passes, passes)

    def put_out(self, k: int) -> None:
        """Makes direction k the v of each matrix."""
        torch._foreach_copy_(self._vs, list(self._basis_GKn[:, k].unbind()))

    def take_in(self, k: int, sizes_M: Tensor) -> None:
        """Of A v_k, as a direction and its size: a diagonal element of T, and what is new in it."""
        of_all = sizes_M.unbind()
        sizes_G1 = torch.stack([of_all[m] for m in self._members])[:, None]
        y_Gn = torch.stack(self._vs) * sizes_G1
        known = max(k + 1, 2)  # one more is 0; see `row_norms`
        along_Gk = self._along(y_Gn, known)
        self.T_GKK[:, k, k] = along_Gk[:, k]
        if k + 1 == self.T_GKK.shape[1]:
            return
        rest_Gn = y_Gn - self._combined(along_Gk)
        rest_Gn = rest_Gn - self._combined(self._along(rest_Gn, known))
        beta_G1 = row_norms(rest_Gn)
        largest_G1 = self.T_GKK.diagonal(dim1=1, dim2=2).amax(1, keepdim=True)
        is_new_G1 = beta_G1 > _OVER * largest_G1
        offdiagonal_G = torch.where(is_new_G1, beta_G1, 0)[:, 0]
        self.T_GKK[:, k, k + 1] = self.T_GKK[:, k + 1, k] = offdiagonal_G
        self._basis_GKn[:, k + 1] = torch.where(is_new_G1, rest_Gn / beta_G1, 0)

    def put_out_ritz_vectors(self, weights_GK: Tensor) -> None:
        """Makes the direction of these weights the v of each matrix; where there is none, the
        first."""
        ritz_Gn = self._combined(weights_GK)
        length_G1 = row_norms(ritz_Gn)
        found_Gn = torch.where(length_G1 > 0.5, ritz_Gn / length_G1, self._start_Gn)
        torch._foreach_copy_(self._vs, list(found_Gn.unbind()))

    def _along(self, x_Gn: Tensor, known: int) -> Tensor:
        """(G, known): products with the first directions."""
        return (self._basis_GKn[:, :known] * x_Gn[:, None]).sum(2)

    def _combined(self, weights_Gk: Tensor) -> Tensor:
        """(G, n): the first directions, each times its weight, added up."""
        return (self._basis_GKn[:, : weights_Gk.shape[1]] * weights_Gk[:, :, None]).sum(1)


def row_norms(x_Gn: Tensor) -> Tensor:
    """(G, 1), which no number of threads changes.

    Twice, because threads would share a single sum, and round it in their own way.
    """
    return torch.stack([x_Gn, x_Gn], dim=1).square().sum(2)[:, :1].sqrt()


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
