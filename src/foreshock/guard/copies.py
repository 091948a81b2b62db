"""Whether what several ranks hold copies of is the same on all of them."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from foreshock.distributed_part import copied_dims, is_distributed, split_dims
from foreshock.guard.consensus import Consensus
from foreshock.guard.events import Offender
from foreshock.guard.state_seal import sum_of_bits
from foreshock.host_read import read

_WORDS = 2
_MASK = (1 << 64) - 1


class _Holder(NamedTuple):
    """This rank among those that hold a copy of the same part of a parameter."""

    weight: int
    """The weights of all of them add up to 0."""
    part: int
    """Number of the part."""


class Copies:
    """Checksums of parameters, weighted so that over ranks that hold the same they add up to 0.

    s = sum over k copies of w_i c_i, w_0 = 1 - k, w_1 .. w_(k-1) = 1, c_i the sum of the words of
    the copy's memory mod 2^64, in two parts of 32 bits: float64 adds them up exactly, for a hundred
    thousand ranks.

    A single changed bit in one copy always changes c, and with it s. Copies outside of the mesh of
    a DTensor are not compared.

    Args:
        parameters: by name, the same names on all ranks.
        ranks: that hold them, as a whole or a part of each.
    """

    def __init__(self, parameters: Mapping[str, torch.Tensor], ranks: Consensus) -> None:
        self._ranks = ranks
        self._parameters = dict(parameters)
        self._holders = [_holder(p, ranks) for p in parameters.values()]

    def weighted_sums(self) -> list[float]:
        """(2,) what this rank adds to the sums over all ranks.

        Cost: one read of the parameters that others hold too.
        """
        by_weight: dict[int, int] = defaultdict(int)
        for holder, c in zip(self._holders, self._checksums(), strict=True):
            by_weight[holder.weight] += c
        return [
            float(sum(weight * _word(c & _MASK, i) for weight, c in by_weight.items()))
            for i in range(_WORDS)
        ]

    def find_different(self) -> Offender | None:
        """The first parameter that is not the same on all its ranks, and which of them differs.

        Of two copies, or as many on one side as on the other, it cannot be told which is wrong.

        Cost: two all_reduces, of 16 bytes for each parameter and 16 for each rank.
        """
        checksums = self._checksums()
        weighted = [
            [h.weight * _word(c, i) for i in range(_WORDS)]
            for h, c in zip(self._holders, checksums, strict=True)
        ]
        sums = self._ranks.sums(torch.tensor(weighted, dtype=torch.float64))
        different = read(sums.any(1)).nonzero()[0].tolist()
        if not different:
            return None
        first = different[0]
        mine = torch.zeros(self._ranks.size, 2, dtype=torch.int64)
        signed = checksums[first] - (1 << 64) * (checksums[first] >> 63)
        mine[self._ranks.rank] = torch.tensor([self._holders[first].part, signed])
        held = [tuple(row) for row in read(self._ranks.sums(mine)).tolist()]
        name, parameter = list(self._parameters.items())[first]
        return Offender("parameter", name, 0, 0, parameter.numel(), _outvoted(held))

    def _checksums(self) -> list[int]:
        with torch.no_grad():
            return [
                int(read(sum_of_bits(p))) & _MASK if holder.weight else 0
                for p, holder in zip(self._parameters.values(), self._holders, strict=True)
            ]


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
