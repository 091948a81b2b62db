"""Whether what several ranks hold copies of is the same on all of them."""

from __future__ import annotations

import logging
import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import xxhash

from foreshock.distributed_part import copied_dims, is_distributed, split_dims
from foreshock.guard.consensus import Consensus
from foreshock.guard.containers import tensors_in
from foreshock.guard.events import Offender
from foreshock.guard.state_seal import sum_of_bits
from foreshock.host_read import read

_log = logging.getLogger("foreshock")

_WORDS = 2
_SLOTS = 8
"""Tensors that are compared of a parameter, itself among them; torch's optimizers have no more."""
_MASK = (1 << 64) - 1


class _Holder(NamedTuple):
    """This rank among those that hold a copy of the same part of a parameter."""

    weight: int
    """The weights of all of them add up to 0."""
    part: int
    """Number of the part."""


class Copies:
    """Checksums of parameters and moments, weighted so that over equal copies they add up to 0.

    s = sum over k copies of w_i c_i, w_0 = 1 - k, w_1 .. w_(k-1) = 1, c_i the sum of the words of
    the copy's memory mod 2^64, in two parts of 32 bits: float64 adds them up exactly, for a hundred
    thousand ranks.

    A single changed bit in one copy always changes c, and with it s. Copies outside of the mesh of
    a DTensor are not compared.

    The state of an optimizer of torch's own follows from gradients that are the same on all ranks;
    what others keep may be a rank's own. If ranks keep other tensors for a parameter, as where each
    updates a part of them and sends it to the rest, its state is left out from then on.

    Args:
        parameters: by name, the same names on all ranks.
        optimizer: whose state is compared, if it is one of torch's.
        ranks: that hold them, as a whole or a part of each.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.Tensor],
        optimizer: torch.optim.Optimizer,
        ranks: Consensus,
    ) -> None:
        self._ranks = ranks
        self._names = list(parameters)
        self._parameters = list(parameters.values())
        self._holders = [_holder(p, ranks) for p in self._parameters]
        self._optimizer = optimizer
        is_torchs = type(optimizer).__module__.split(".")[:2] == ["torch", "optim"]
        self._has_state = [is_torchs and holder.weight != 0 for holder in self._holders]
        self._first_different: int | None = None

    def weighted_sums(self) -> list[float]:
        """(2,) what this rank adds to the sums over all ranks.

        Cost: one read of the parameters, and of the state, that others hold too.
        """
        by_weight: dict[int, int] = defaultdict(int)
        for holder, sums in zip(self._holders, self._checksums(), strict=True):
            by_weight[holder.weight] += sum(sums)
        return [
            float(sum(weight * _word(c & _MASK, i) for weight, c in by_weight.items()))
            for i in range(_WORDS)
        ]

    def are_different(self) -> bool:
        """Whether a parameter, or the same state of it, is not the same on all its ranks.

        All ranks ask when their sums were not 0; of state that they keep in other tensors they ask
        once.

        Cost: the read again, and an all_reduce of 48 bytes for each parameter.
        """
        rows = []
        for i, (holder, sums) in enumerate(zip(self._holders, self._checksums(), strict=True)):
            of = (sum(sums[:1]), sum(sums[1:]), self._layout(i))
            rows.append([holder.weight * _word(c & _MASK, j) for c in of for j in range(_WORDS)])
        weighted = self._ranks.sums(torch.tensor(rows, dtype=torch.float64))
        different = weighted.view(len(rows), 3, _WORDS).any(2)
        found = []
        for i, (of_parameter, of_state, of_layout) in enumerate(different.tolist()):
            if of_layout and self._has_state[i]:
                self._has_state[i] = False
                _log.info("optimizer state of %s is not compared", self._names[i])
            if of_parameter or (of_state and not of_layout):
                found.append(i)
        self._first_different = found[0] if found else None
        return bool(found)

    def find_different(self) -> Offender | None:
        """The first tensor that `are_different` has found, and which of its ranks differ.

        Of two copies, or as many on one side as on the other, it cannot be told which is wrong.

        Cost: an all_reduce of 72 bytes for each rank.
        """
        i = self._first_different
        if i is None:
            return None
        sums = self._checksums()[i]
        mine = torch.zeros(self._ranks.size, 1 + _SLOTS, dtype=torch.int64)
        mine[self._ranks.rank, 0] = self._holders[i].part
        mine[self._ranks.rank, 1 : 1 + len(sums)] = torch.tensor(sums)
        held = read(self._ranks.sums(mine)).tolist()
        for slot, (key, tensors) in enumerate(self._tensors(i).items(), 1):
            outvoted = _outvoted([(row[0], row[slot]) for row in held])
            if outvoted:
                numel = sum(t.numel() for t in tensors)
                name = self._names[i]
                if key is None:
                    return Offender("parameter", name, 0, 0, numel, outvoted)
                return Offender("optimizer state", f"{name}: {key}", 0, 0, numel, outvoted)
        return None

    def _tensors(self, i: int) -> dict[str | None, list[torch.Tensor]]:
        """A parameter (None) and its state, by key; at most as many as there are slots."""
        found: dict[str | None, list[torch.Tensor]] = {None: [self._parameters[i]]}
        # Looked up anew: load_state_dict puts another one there.
        state = self._optimizer.state.get(self._parameters[i], {}) if self._has_state[i] else {}
        for key in sorted(state):
            tensors = [t for _, t in tensors_in(state[key])]
            if tensors and len(found) < _SLOTS:
                found[key] = tensors
        return found

    def _layout(self, i: int) -> int:
        tensors = self._tensors(i).items()
        seen = [(key, [(t.shape, t.dtype) for t in of]) for key, of in tensors if key is not None]
        return xxhash.xxh3_64_intdigest(repr(seen).encode()) if self._has_state[i] else 0

    def _checksums(self) -> list[list[int]]:
        """Of each parameter that others hold too, and of its state; mod 2^64, signed."""
        held = [i for i, holder in enumerate(self._holders) if holder.weight]
        tensors = [list(self._tensors(i).values()) for i in held]
        values = iter(_sums([t for of in tensors for several in of for t in several]))
        found: list[list[int]] = [[] for _ in self._holders]
        for i, of in zip(held, tensors, strict=True):
            found[i] = [_signed(sum(next(values) for _ in several)) for several in of]
        return found


def _sums(tensors: list[torch.Tensor]) -> list[int]:
    if not tensors:
        return []
    with torch.no_grad():
        sums = [sum_of_bits(t) for t in tensors]
        first = sums[0].device
        found: list[int] = read(
            torch.stack([s.to(first, non_blocking=True) for s in sums])
        ).tolist()
    return found


def _signed(value: int) -> int:
    value &= _MASK
    return value - (1 << 64) * (value >> 63)


def _word(checksum: int, i: int) -> int:
    return (checksum >> (32 * i)) & 0xFFFFFFFF


def _outvoted(held: list[tuple[int, int]]) -> tuple[int, ...]:
    """Ranks whose checksum of a part is not that of most who hold it."""
    votes = Counter(held)
    most: dict[int, int] = defaultdict(int)
    for (part, _), count in votes.items():
        most[part] = max(most[part], count)
    tied = Counter(part for (part, _), count in votes.items() if count == most[part])
    return tuple(
        rank
        for rank, (part, checksum) in enumerate(held)
        if votes[part, checksum] < most[part] or tied[part] > 1
    )


def _holder(parameter: Any, ranks: Consensus) -> _Holder:
    if not is_distributed(parameter):
        return _Holder(_weight(ranks.rank, ranks.size), 0)
    mesh = parameter.device_mesh
    at = mesh.get_coordinate()
    if at is None:
        return _Holder(0, -1)
    copied, split = copied_dims(parameter), split_dims(parameter)
    count = math.prod(mesh.size(dim) for dim in copied)
    part = int(mesh.mesh.flatten()[0]) * mesh.size() + _number(at, split, mesh)
    return _Holder(_weight(_number(at, copied, mesh), count), part)


def _number(at: list[int], dims: list[int], mesh: Any) -> int:
    number = 0
    for dim in dims:
        number = number * mesh.size(dim) + at[dim]
    return number


def _weight(index: int, count: int) -> int:
    return 1 if index else 1 - count
