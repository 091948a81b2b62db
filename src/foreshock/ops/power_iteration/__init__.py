"""power_iteration: the largest singular value of every weight, in one read of its memory."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foreshock.ops._backend import choose
from foreshock.ops._table import make_table
from foreshock.ops._tensors import as_list, device_of, is_plain, local_tensors
from foreshock.ops.power_iteration import lanczos, shards
from foreshock.ops.power_iteration import register as register
from foreshock.ops.power_iteration.matrices import (
    DTYPES,
    as_matrix,
    layout_of,
    select_matrices,
)
from foreshock.ops.power_iteration.shards import Spread, spread_of
from foreshock.ops.power_iteration.state import PowerState

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "PowerIterator",
    "PowerState",
    "SpectralStats",
    "kappa",
    "power_iteration",
    "why_not_summed",
]


@dataclasses.dataclass(frozen=True, eq=False)
class SpectralStats:
    """What is known of M matrices; every tensor is (M,), on the device of the weights.

    All are NaN for a matrix that holds a NaN or infinity, and 0 for one of zeros.
    """

    sigma_max: Tensor
    """float64: the estimate of the largest singular value, never above it but for rounding."""
    frobenius: Tensor
    """float64: |W|_F."""
    kappa_tilde: Tensor
    """float64: sigma_max / (|W|_F / (10 sqrt(min(m, n))) + 1e-8)."""
    stable_rank: Tensor
    """float64: (|W|_F / sigma_max)^2."""
    growth: Tensor
    """float64: |W^T W v| / |W v|^2, at least 1; 0 where v met nothing but zeros."""
    index: Tensor
    """int64: which weights the matrices are."""
    skipped: tuple[int, ...]
    """Which weights are no matrices: of fewer than two dimensions, or None."""
    packed: Tensor = dataclasses.field(repr=False)
    """(M, 5) buffer of which the first five fields are columns."""

    @classmethod
    def from_packed(
        cls, packed: Tensor, index: Tensor, skipped: tuple[int, ...] = ()
    ) -> SpectralStats:
        """Reads the columns of a packed result; nothing is copied."""
        sigma_max, frobenius, kappa_tilde, stable_rank, growth = packed.unbind(1)
        return cls(sigma_max, frobenius, kappa_tilde, stable_rank, growth, index, skipped, packed)

    def clone(self) -> SpectralStats:
        """A copy that a bound iterator's next call does not overwrite."""
        return SpectralStats.from_packed(self.packed.clone(), self.index, self.skipped)

    @property
    def is_nonfinite(self) -> Tensor:
        """bool (M,): whether the matrix holds a NaN or infinity."""
        return self.sigma_max.isnan()

    @property
    def residual(self) -> Tensor:
        """float64 (M,): |W^T W v - |W v|^2 v| / |W v|^2 of the v that was multiplied by.

        0 at a singular vector, some 0.1 where v has settled among close singular values, about 1
        for a random v. That v is settled does not say that it is with the largest value.
        """
        return (self.growth.square() - 1).clamp(min=0).sqrt()


def power_iteration(
    weights: Iterable[Tensor | None] | Tensor,
    state: PowerState | None = None,
    iters: int | None = None,
    seed: int = 0,
    group: ProcessGroup | None = None,
) -> tuple[SpectralStats, PowerState]:
    """Estimates the largest singular value of every weight matrix, and what follows from it.

    One pass, with v a unit vector that is kept from call to call:
        u = W v,   y = W^T u,   sigma_max = |y| / |u|,   z = y / |u|^2 - previous / 4,
        previous = v / max(|z|, 1/2),   v = z / |z|.
    sigma_max is |W^T u'| for the unit vector u' = u/|u|, hence a lower bound, and at least |W v|.

    Args:
        weights: floating-point tensors on one device (float64, float32, bfloat16, float16), or one
            such tensor. One of more than two dimensions is a matrix of shape[0] rows; one of fewer,
            or None, is skipped. Of a DTensor the local shard is read.
        state: what the call before returned for these weights; None for a cold start. It is not
            changed.
        iters: passes over the weights. None: 14 for a matrix whose v is cold, 1 where it is warm.
            Three and more are a Lanczos run from v: 3 follow weights that move fast better than
            one, see docs/power_iteration.md.
        seed: of the first v. The same seed gives the same numbers.
        group: of the ranks that hold these weights: numbers are then those of the whole matrices,
            the same on every rank, and the state fits any number of ranks. A DTensor is split along
            one dimension at most; any other tensor is the same on all ranks. None: what this
            process holds is looked at by itself.
    Returns:
        The stats, and the state for the next call.
    Raises:
        TypeError, ValueError: naming the argument, or the place in `weights`, what stands there and
            what may; also where a shape is not the one that `state` is for.
    Cost:
        Each pass reads every weight once and copies none; O(m + n) memory a matrix. With a group
        one all_reduce a pass, for all matrices together: the columns of a matrix split by rows, the
        rows of one split by columns, 8 bytes each. No
        synchronisation; on the host, only while a matrix is cold. For every step: `PowerIterator`.
    Source:
        Golub and Kahan 1965 (Lanczos); Xu et al. 2018, "Accelerated Stochastic Power Iteration",
        on the momentum term; kappa_tilde after the condition-number proxies of training monitors.
    """
    _check_iters(iters, "iters")
    if torch.compiler.is_compiling():
        if group is not None:
            raise ValueError("group is given under torch.compile; accepted: None")
        return _traced_pass(as_list(weights, "weights"), state, iters)
    mine = None if state is None else state.clone()
    iterator = PowerIterator(weights, mine, seed=seed, group=group)
    return iterator(iters=iters), iterator.state


def _check_iters(iters: int | None, name: str) -> None:
    if iters is not None and (isinstance(iters, bool) or not isinstance(iters, int)):
        raise TypeError(f"{name} is a {type(iters).__name__}; accepted: None or an int from 1 up")
    if iters is not None and iters < 1:
        raise ValueError(f"{name} is {iters}; accepted: None or an int from 1 up")


def _traced_pass(
    weights: list[Tensor | None], state: PowerState | None, iters: int | None
) -> tuple[SpectralStats, PowerState]:
    if state is None or not state.is_all_warm or iters not in (None, 1):
        raise ValueError("under torch.compile one pass with a warm state is accepted, nothing else")
    index = [i for i, w in enumerate(weights) if w is not None and w.dim() >= 2]
    matrices = [w for w in weights if w is not None and w.dim() >= 2]
    packed, vectors = torch.ops.foreshock.power_iteration(matrices, state.vectors)
    skipped = tuple(i for i in range(len(weights)) if i not in index)
    places = torch.tensor(index, dtype=torch.int64, device=state.vectors.device)
    stats = SpectralStats.from_packed(packed, places, skipped)
    return stats, PowerState(state.layouts, vectors, state.is_warm)


def why_not_summed(weight: Tensor, group: ProcessGroup) -> str | None:
    """What keeps a `group` from looking at the whole of a matrix; None if nothing does."""
    spread = spread_of(weight, torch.distributed.get_world_size(group))
    return spread if isinstance(spread, str) else None


class PowerIterator:
    """`power_iteration` bound to a list of weights, to be called every step.

    >>> iterator = PowerIterator(list(model.parameters()))
    >>> stats = iterator()           # the cold start: 14 passes
    >>> stats = iterator()           # from now on one pass, over the weights as they are now

    A call looks first whether the weights still lie where they lay; assigning to `.data` rebuilds
    the table and keeps the directions. Results go to one buffer that the next call overwrites;
    `SpectralStats.clone` keeps them.

    Args:
        weights: as for `power_iteration`.
        state: as for `power_iteration`, but moved along in place, as `self.state`.
        seed: as for `power_iteration`.
        group: as for `power_iteration`; every rank of it calls at the same place.
        recheck: False leaves out that look: the memory that the weights have now is read at each
            call, and kept alive for it.
    Raises:
        TypeError, ValueError: as for `power_iteration`, here and at a call.
    Cost:
        Beyond the pass itself, about 0.5 us a call and 10 ns a tensor for the look; nothing is
        allocated once every matrix is warm.
    """

    def __init__(
        self,
        weights: Iterable[Tensor | None] | Tensor,
        state: PowerState | None = None,
        *,
        seed: int = 0,
        group: ProcessGroup | None = None,
        recheck: bool = True,
    ) -> None:
        self._recheck = recheck
        self._group = group
        self._seed = seed
        self._bind(as_list(weights, "weights"), state)

    def _bind(self, weights: list[Tensor | None], state: PowerState | None) -> None:
        local, index = select_matrices(weights)
        device = device_of(local)
        self._weights = weights
        self._are_plain = local is weights or all(map(is_plain, weights))
        self._matrices = [w for w in (local[i] for i in index) if w is not None]
        self._spreads = self._spread([weights[i] for i in index], index)
        layouts = [s.whole for s in self._spreads] or [layout_of(w) for w in self._matrices]
        cold = PowerState.cold(layouts, index, self._seed, device)
        self.state = cold if state is None else state.fitted(cold, index)
        self._table = make_table(local)
        if not self._recheck:  # not even `weight.data = ...` may free what will be read
            self._memory = [w.untyped_storage() for w in self._matrices]
        self._module = choose("power_iteration", device.type).module
        packed = torch.empty(len(index), 5, dtype=torch.float64, device=device)
        self._pass = self._bound(range(len(index)), self.state.vectors, packed)
        skipped = tuple(i for i in range(len(weights)) if i not in set(index))
        places = torch.tensor(index, dtype=torch.int64, device=device)
        self.stats = SpectralStats.from_packed(packed, places, skipped)

    def _spread(self, weights: list[Any], index: list[int]) -> list[Spread]:
        """How the weights lie on the ranks of the group; empty without one."""
        if self._group is None:
            return []
        num_ranks = torch.distributed.get_world_size(self._group)
        spreads = []
        for weight, i in zip(weights, index, strict=True):
            spread = spread_of(weight, num_ranks)
            if isinstance(spread, str):
                raise ValueError(
                    f"weights[{i}] {spread}; accepted with a group: on all its ranks, and split "
                    "along one dimension at most"
                )
            spreads.append(spread)
        return spreads

    def _bound(
        self, chosen: Sequence[int], vectors: Tensor, packed: Tensor
    ) -> Callable[[], object]:
        """A pass over some of the matrices."""
        matrices = [self._matrices[m] for m in chosen]
        if self._group is None:
            return self._module.bind(matrices, vectors, packed)  # type: ignore[no-any-return]
        spreads = [self._spreads[m] for m in chosen]
        return shards.bind(self._module, matrices, spreads, vectors, packed, self._group)

    def __call__(
        self,
        weights: list[Tensor | None] | None = None,
        iters: int | None = None,
        *,
        warm_iters: int = 1,
    ) -> SpectralStats:
        """Passes over the bound weights, or others of these shapes that take their places.

        Args:
            weights: a list; None for those already bound.
            iters: as for `power_iteration`.
            warm_iters: passes where v is warm, if `iters` is None. Weights that have moved for k
                steps since the last call are followed by min(k, 14): see docs/power_iteration.md.
        Returns:
            `self.stats`, valid until the next call.
        """
        if weights is None:
            weights = self._weights
        if self._recheck or weights is not self._weights:
            local = weights if self._are_plain else select_matrices(weights)[0]
            if not self._table.matches(local):
                self._bind(list(weights), self.state)
        if iters is None and warm_iters == 1 and self.state.is_all_warm:
            self._pass()
        else:
            self._advance(iters, warm_iters)
        return self.stats

    @torch.no_grad()
    def _advance(self, iters: int | None, warm_iters: int) -> None:
        """Cold starts, or as many passes as were asked for."""
        _check_iters(iters, "iters")
        _check_iters(warm_iters, "warm_iters")
        is_warm = self.state.is_warm
        for warm in (True, False) if iters is None else (None,):
            chosen = [m for m, is_so in enumerate(is_warm) if warm in (None, is_so)]
            passes = iters or (warm_iters if warm else lanczos.PASSES)
            if len(chosen) == len(is_warm):
                state, columns = self.state, self.state.columns
                lanczos.advance(self._pass, state.vectors, self.stats.packed, columns, passes)
            elif chosen:
                self._advance_some(chosen, passes)
            if chosen and passes >= lanczos.PASSES:
                self._note_started(chosen)

    def _advance_some(self, chosen: list[int], passes: int) -> None:
        """The same for some of the matrices, bound by themselves."""
        pairs = [self.state.of_matrices()[m] for m in chosen]
        columns = [pair.shape[1] for pair in pairs]
        vectors = torch.cat(pairs, dim=1)
        rows = torch.empty_like(self.stats.packed[: len(chosen)])
        call = self._bound(chosen, vectors, rows)
        lanczos.advance(call, vectors, rows, columns, passes)
        # One by one: an index in host memory would have to be waited for.
        for m, row, pair, moved in zip(
            chosen, rows, pairs, vectors.split(columns, dim=1), strict=True
        ):
            self.stats.packed[m].copy_(row)
            pair.copy_(moved)

    def _note_started(self, chosen: list[int]) -> None:
        """Marks as warm what has met something; off the host that would have to be waited for."""
        started = set(chosen)
        if self.stats.packed.device.type == "cpu":
            has_grown = self.stats.growth.numpy() > 0
            sizes = [math.prod(layout.shape) for layout in self.state.layouts]
            started = {m for m in chosen if has_grown[m] or sizes[m] == 0}
        self.state.is_warm = tuple(w or m in started for m, w in enumerate(self.state.is_warm))


def kappa(W: Tensor, exact: bool = True) -> Tensor:
    """Condition number of one matrix: sigma_max / sigma_min, or what is known of it cheaply.

    Args:
        W: a floating-point tensor of two or more dimensions, as for `power_iteration`.
        exact: False for kappa_tilde, from 14 passes; True for the singular values themselves.
    Returns:
        () float64. Exact, it is infinite for a singular matrix and NaN for one that is not finite.
    Raises:
        TypeError, ValueError: naming `W`, what it is and what is accepted.
    Cost:
        Exact: a singular value decomposition in float64, O(m n min(m, n)); for small matrices.
    """
    if not isinstance(W, Tensor):
        raise TypeError(f"W is a {type(W).__name__}; accepted: a tensor of two or more dimensions")
    if W.dim() < 2 or W.numel() == 0:
        raise ValueError(
            f"W has shape {tuple(W.shape)}; accepted: two or more dimensions, none of them empty"
        )
    local = local_tensors([W], DTYPES, "W")[0]
    assert local is not None
    if not exact:
        return power_iteration(local)[0].kappa_tilde[0]
    matrix = as_matrix(local, layout_of(local)).double()
    is_finite = torch.isfinite(matrix).all()
    values = torch.linalg.svdvals(torch.where(is_finite, matrix, 0))
    ratio = torch.where(values[-1] > 0, values[0] / values[-1], torch.inf)
    return torch.where(is_finite, ratio, torch.nan)
