"""Health scans of tensors that have names, and the first of them that went bad."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch

from foreshock.guard.events import Offender
from foreshock.ops import HealthScanner, HealthStats

Kind = Literal["parameter", "buffer", "gradient"]


class Finding(NamedTuple):
    """What one inspection found; tensors on the device of the first inspected tensor."""

    has_nonfinite: torch.Tensor
    """bool ()."""
    total_norm: torch.Tensor
    """float64 (): L2 norm of the finite elements of all tensors."""


class Inspector:
    """Scans the tensors that stand under fixed names, whatever devices they are on.

    Args:
        kinds: kind of each tensor, by name; the order of names decides which offender is first.
    """

    def __init__(self, kinds: Mapping[str, Kind]) -> None:
        self._kinds = list(kinds.items())
        self._scanners: dict[torch.device | None, HealthScanner] = {}
        self._found: list[tuple[list[int], HealthStats]] = []

    def inspect(self, tensors: Sequence[torch.Tensor | None]) -> Finding:
        """Scans the tensors, given in the order of their names (None where there is none now).

        Cost: one read, a launch or two per device, no synchronisation.
        """
        places: dict[torch.device | None, list[int]] = defaultdict(list)
        for i, tensor in enumerate(tensors):
            places[None if tensor is None else tensor.device].append(i)
        places.pop(None, None)
        self._found = [
            (where, self._scan(device, [tensors[i] for i in where]))
            for device, where in places.items()
        ]
        if not self._found:
            return Finding(torch.tensor(False), torch.zeros((), dtype=torch.float64))
        home = self._found[0][1].sumsq.device
        nonfinite = [stats.nonfinite.sum().to(home) for _, stats in self._found]
        sumsq = [stats.sumsq.sum().to(home) for _, stats in self._found]
        return Finding(torch.stack(nonfinite).sum() > 0, torch.stack(sumsq).sum().sqrt())

    def _scan(
        self, device: torch.device | None, tensors: list[torch.Tensor | None]
    ) -> HealthStats:
        scanner = self._scanners.get(device)
        if scanner is None:
            scanner = self._scanners[device] = HealthScanner(tensors)
        return scanner(tensors)

    def find_offender(self) -> Offender | None:
        """The first tensor of the last inspection that is not finite. Synchronises."""
        bad: dict[int, tuple[int, int, int]] = {}
        for where, stats in self._found:
            rows = torch.stack([stats.nan, stats.inf, stats.numel], dim=1).tolist()
            bad |= {i: (n, m, k) for i, (n, m, k) in zip(where, rows, strict=True) if n or m}
        if not bad:
            return None
        first = min(bad)
        name, kind = self._kinds[first]
        nan, inf, numel = bad[first]
        return Offender(kind, name, nan, inf, numel)
