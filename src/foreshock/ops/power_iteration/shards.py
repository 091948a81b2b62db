"""Matrices of which every rank holds some rows: what ranks find is added up, nothing is gathered.

For W = [W_1; ...; W_R] a pass needs of rank r only y_r = W_r^T W_r v, |W_r v|^2 and |W_r|^2, whose
sums over r are those of W. Of a matrix that is split by columns, the transposed is split by rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from foreshock.collectives import all_reduce
from foreshock.ops.power_iteration.lanczos import row_norms
from foreshock.ops.power_iteration.matrices import Layout, layout_of
from foreshock.ops.power_iteration.reference import LEAST_SHARE


class Spread(NamedTuple):
    """How a weight lies on the ranks of a group."""

    whole: Layout
    """How all of it would be read, which is how each part of it is."""
    share: float
    """One over how many ranks hold the same part."""

    def of_part(self, local: Tensor) -> Layout:
        """How a rank reads what it holds."""
        return Layout(tuple(local.shape), self.whole.order)


def spread_of(weight: Tensor, num_ranks: int) -> Spread | str:
    """What the placements of a DTensor say; any other tensor is the same on all ranks.

    Args:
        weight: of two or more dimensions.
        num_ranks: of the group.
    Returns:
        Why the parts cannot be added up, where they cannot.
    """
    placements = getattr(weight, "placements", None)
    if placements is None:
        return Spread(layout_of(weight), 1 / num_ranks)
    mesh: Any = weight.device_mesh  # type: ignore[attr-defined]
    if mesh.size() != num_ranks:
        return f"is on {mesh.size()} ranks, and the group has {num_ranks}"
    if any(placement.is_partial() for placement in placements):
        return "is Partial, yet to be added up"
    split = {placement.dim % weight.dim() for placement in placements if placement.is_shard()}
    if len(split) > 1:
        return f"is split along the dimensions {sorted(split)}"
    copies = math.prod(
        mesh.size(i) for i, placement in enumerate(placements) if not placement.is_shard()
    )
    return Spread(_read_by(weight, *split), 1 / copies)


def _read_by(weight: Tensor, rows: int | None = None) -> Layout:
    """How a weight is read that is split along `rows`."""
    if rows is None:
        return layout_of(weight)
    shape, strides = tuple(weight.shape), weight.stride()
    others = [d for d in range(weight.dim()) if d != rows]
    return Layout(shape, (rows, *sorted(others, key=lambda d: (shape[d] == 1, -strides[d]))))


def bind(
    module: Any,
    weights: Sequence[Tensor],
    spreads: Sequence[Spread],
    vectors: Tensor,
    packed: Tensor,
    group: Any,
) -> Callable[[], None]:
    """Returns a call like that of `cpu.bind`, in which the ranks of a group take part together.

    Args:
        module: the implementation that reads the parts.
        weights: M parts, on this rank; of some it may hold no row.
        spreads: of the wholes.
        vectors, packed: of the wholes, as for `cpu.bind`; the same on all ranks.
        group: a `torch.distributed.ProcessGroup`.
    Cost:
        One all_reduce of 8 (N + 2 M) bytes, N the columns of all matrices together.
    """
    layouts = [spread.of_part(w) for spread, w in zip(spreads, weights, strict=True)]
    own = torch.empty_like(vectors)
    found = torch.empty_like(packed)
    call = module.bind(weights, own, found, layouts)
    whole = _Whole(spreads, vectors, packed)

    def advance() -> None:
        own[0] = vectors[0]
        own[1] = 0
        call()
        all_reduce(whole.put_out(own[0], found), group=group)
        whole.take_in()

    return advance


class _Whole:
    """Adds up the parts of M matrices and moves their vectors a step, as `reference.advance`."""

    def __init__(self, spreads: Sequence[Spread], vectors: Tensor, packed: Tensor) -> None:
        device = packed.device
        columns = [spread.whole.columns for spread in spreads]
        self._columns = columns
        owner = torch.repeat_interleave(torch.arange(len(columns)), torch.tensor(columns))
        self._owner_N = owner.to(device)
        self._share_M = torch.tensor([s.share for s in spreads], dtype=torch.float64).to(device)
        ranks = [min(s.whole.rows, s.whole.columns) for s in spreads]
        self._root_M = torch.tensor(ranks, dtype=torch.float64).clamp(min=1).sqrt().to(device)
        self._vectors, self._packed = vectors, packed
        self._sums = packed.new_empty(vectors.shape[1] + 2 * len(columns))

    def put_out(self, direction_N: Tensor, found: Tensor) -> Tensor:
        """What is to be summed over the ranks: y, |u|^2 and |W|^2, end to end.

        With `previous` 0 a pass leaves y / |y|, and |y| / |u| as sigma_max, |y| / |u|^2 as growth.
        """
        sigma, frobenius, _, _, growth = found.unbind(1)
        is_seen = growth > 0
        usq = torch.where(is_seen, sigma / growth, sigma).square()
        length = torch.where(is_seen, sigma * (sigma / growth), 0)
        y_N, usq_M, wsq_M = self._split()
        torch.mul(direction_N, (length * self._share_M)[self._owner_N], out=y_N)
        torch.mul(usq, self._share_M, out=usq_M)
        torch.mul(frobenius.square(), self._share_M, out=wsq_M)
        return self._sums

    def _split(self) -> tuple[Tensor, ...]:
        matrices = len(self._columns)
        parts: tuple[Tensor, ...] = self._sums.split([self._vectors.shape[1], matrices, matrices])
        return parts

    def take_in(self) -> None:
        """The step that the sums allow, and the row that they make."""
        y_N, usq_M, wsq_M = self._split()
        v_N, previous_N = self._vectors
        owner_N = self._owner_N
        is_usable = wsq_M.isfinite() & (wsq_M > 0)
        sees = is_usable & (usq_M > LEAST_SHARE * wsq_M)
        u = usq_M.sqrt()
        sigma = torch.where(sees, self._norms(y_N) / u, u)
        growth = torch.where(sees, sigma / u, 0)
        z_N = torch.where(sees[owner_N], y_N / usq_M[owner_N] - previous_N / 4, 1)
        z_M = self._norms(z_N)
        kept_N = torch.where(sees[owner_N], v_N / z_M.clamp(min=0.5)[owner_N], 0)
        previous_N.copy_(torch.where(is_usable[owner_N], kept_N, previous_N))
        v_N.copy_(torch.where(is_usable[owner_N], z_N / z_M[owner_N], v_N))
        frobenius = wsq_M.sqrt()
        kappa = sigma / (frobenius / (10 * self._root_M) + 1e-8)
        stable_rank = torch.where(sigma > 0, (frobenius / sigma).square(), 0)
        rows = torch.stack([sigma, frobenius, kappa, stable_rank, growth], dim=1)
        otherwise = torch.where(wsq_M.isfinite(), 0, torch.nan)
        self._packed.copy_(torch.where(is_usable[:, None], rows, otherwise[:, None]))

    def _norms(self, x_N: Tensor) -> Tensor:
        """(M,): of each matrix's part, the same bits on ranks of different numbers of threads."""
        parts = [row_norms(part[None])[0, 0] for part in x_N.split(self._columns)]
        return torch.stack([x_N.new_zeros(()), *parts])[1:]
