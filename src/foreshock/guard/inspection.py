"""Health scans of tensors that have names, and the first of them that went bad."""

from __future__ import annotations

import heapq
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from foreshock.guard.events import Offender
from foreshock.host_read import Later, read
from foreshock.ops import HealthScanner, HealthStats, health_scan

Kind = Literal["parameter", "buffer", "gradient"]
Tensors = list[torch.Tensor | None]

_SCANNED_DTYPES = frozenset(
    {
        torch.float64,
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.complex128,
        torch.complex64,
    }
)


def can_scan(tensor: torch.Tensor) -> bool:
    """Whether an inspection can read a tensor; integers have no NaN, and float4 no kernel."""
    return tensor.dtype in _SCANNED_DTYPES


def readable(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor, or a dense and real one with the same values."""
    if tensor is None:
        return None
    if tensor.is_sparse:
        # Rows that come more than once are summed first, as the optimizer does.
        tensor = tensor.detach().coalesce()._values()
    return torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor


class Finding(NamedTuple):
    """What one inspection found in all tensors together."""

    nan: int = 0
    """Elements that are NaN."""
    inf: int = 0
    """Elements that are infinite."""
    sumsq: float = 0.0
    """Sum of squares of the finite elements."""
    absmax: float = 0.0
    """Largest magnitude of the finite elements."""

    @property
    def has_nonfinite(self) -> bool:
        """Whether any element is NaN or infinite."""
        return self.nan + self.inf > 0

    @property
    def finite_norm(self) -> float:
        """L2 norm of the finite elements."""
        return math.sqrt(self.sumsq)

    @property
    def norm(self) -> float:
        """L2 norm of all elements: NaN if one is, else infinite if one is."""
        if self.nan:
            return math.nan
        return math.inf if self.inf else math.sqrt(self.sumsq)


Packed = list[tuple[list[int], Any]]
"""For each device the places of its tensors, and the packed result of their scan."""


class Inspector:
    """Scans the tensors that stand under fixed names, whatever devices they are on.

    Args:
        kinds: kind of each tensor, by name; the order of names decides which offender is first.
        get: gives the tensors in the order of their names, None where there is none now.
    """

    def __init__(self, kinds: Mapping[str, Kind], get: Callable[[], Tensors]) -> None:
        self._kinds = list(kinds.items())
        self._get = get
        self._groups: list[tuple[list[int], HealthScanner]] = []
        self._is_readable_as_is = True
        self._found: list[tuple[list[int], HealthStats]] = []

    def inspect(self, shares: np.ndarray[Any, Any] | None = None) -> Finding:
        """Scans the tensors as they are now.

        Args:
            shares: (T,) what the sum of squares of each tensor counts; None: 1.
        Cost: one read, a launch or two and one synchronisation per device.
        """
        self._scan_present()
        found = _total([read(stats.packed) for _, stats in self._found])
        if shares is None:
            return found
        sums = ((read(stats.sumsq), where) for where, stats in self._found)
        return found._replace(sumsq=float(sum(np.dot(s, shares[where]) for s, where in sums)))

    def inspect_later(self) -> Inspection:
        """Scans the tensors as they are now, and does not wait for what is found.

        Cost: one read, a launch or two and a small copy per device.
        """
        self._scan_present()
        return Inspection(self._kinds, self._found)

    def largest_norms(self, k: int) -> dict[str, float]:
        """The largest L2 norms found by the last inspection, by name, largest first."""
        return _largest_norms(
            self._kinds, [(where, read(stats.packed)) for where, stats in self._found], k
        )

    def find_offender(self) -> Offender | None:
        """The first tensor of the last inspection that is not finite."""
        return _first_offender(
            self._kinds, [(where, read(stats.packed)) for where, stats in self._found]
        )

    def place_of(self, offender: Offender) -> int | None:
        """Where a tensor stands in the order of names; None for one that is not looked at."""
        names = ((name, str(kind)) for name, kind in self._kinds)
        return next((i for i, at in enumerate(names) if at == (offender.name, offender.kind)), None)

    def _scan_present(self) -> None:
        tensors = self._get()
        if not self._is_readable_as_is:
            tensors = [readable(t) for t in tensors]
        try:
            self._scan(tensors)
        except (TypeError, ValueError):
            # Sparse or complex ones among them, or on other devices than before.
            dense = [readable(t) for t in tensors]
            self._is_readable_as_is = all(map(operator.is_, dense, tensors))
            self._groups = _group_by_device(dense)
            self._scan(dense)

    def _scan(self, tensors: Tensors) -> None:
        if not self._groups:
            self._groups = _group_by_device(tensors)
        if len(self._groups) == 1:
            where, scanner = self._groups[0]
            self._found = [(where, scanner(tensors))]
        else:
            self._found = [
                (where, scanner([tensors[i] for i in where])) for where, scanner in self._groups
            ]


class Inspection:
    """What an inspection found, on its way to the host; on the device it can be used at once."""

    def __init__(
        self, kinds: Sequence[tuple[str, Kind]], found: Sequence[tuple[list[int], HealthStats]]
    ) -> None:
        self._kinds = kinds
        self._copies = [(where, Later(stats.packed)) for where, stats in found]
        self._totals = _totals_on_device([stats.packed for _, stats in found])

    @property
    def is_bad(self) -> torch.Tensor:
        """() bool, on the first tensor's device: whether any element is NaN or infinite."""
        nan, inf = self._totals[:2]
        return nan + inf > 0

    def norm(self, norm_type: float) -> torch.Tensor:
        """() float64, on the first tensor's device: NaN if an element is, else inf if one is."""
        nan, inf, sumsq, absmax = self._totals
        finite = sumsq.sqrt() if norm_type == 2.0 else absmax
        return torch.where(nan > 0, torch.nan, torch.where(inf > 0, torch.inf, finite))

    def read(self) -> Finding:
        """All of it, on the host."""
        return _total([copy.get() for _, copy in self._copies])

    def largest_norms(self, k: int) -> dict[str, float]:
        """The largest L2 norms, by name, largest first."""
        return _largest_norms(self._kinds, [(where, c.get()) for where, c in self._copies], k)

    def find_offender(self) -> Offender | None:
        """The first tensor that is not finite."""
        return _first_offender(self._kinds, [(where, copy.get()) for where, copy in self._copies])


def _totals_on_device(
    packed: Sequence[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """() NaN, infinities, sum of squares and largest magnitude of all, float64."""
    device = packed[0].device
    counts = torch.stack(
        [p.view(torch.int64)[:, 1:3].sum(0).to(device, non_blocking=True) for p in packed]
    ).sum(0)
    sumsq = torch.stack([p[:, 5].sum().to(device, non_blocking=True) for p in packed]).sum()
    none = torch.zeros(1, dtype=torch.float64, device=device)
    absmax = torch.cat([none, *(p[:, 3].to(device, non_blocking=True) for p in packed)]).amax()
    nan, inf = counts.double().unbind()
    return nan, inf, sumsq, absmax


def _largest_norms(kinds: Sequence[tuple[str, Kind]], found: Packed, k: int) -> dict[str, float]:
    """Of the finite elements of each tensor."""
    sums = [(float(x), i) for where, v in found for x, i in zip(v[:, 5], where, strict=True)]
    return {kinds[i][0]: math.sqrt(sumsq) for sumsq, i in heapq.nlargest(k, sums)}


def _first_offender(kinds: Sequence[tuple[str, Kind]], found: Packed) -> Offender | None:
    bad: dict[int, tuple[int, int, int]] = {}
    for where, values in found:
        counts = values.view(np.int64)[:, :3].tolist()
        bad |= {i: (n, m, k) for i, (k, n, m) in zip(where, counts, strict=True) if n or m}
    if not bad:
        return None
    first = min(bad)
    name, kind = kinds[first]
    nan, inf, numel = bad[first]
    return Offender(kind, name, nan, inf, numel)


def _group_by_device(tensors: Tensors) -> list[tuple[list[int], HealthScanner]]:
    """Places of the tensors of each device; those that stand empty go with the first."""
    places: dict[torch.device | None, list[int]] = {}
    for i, tensor in enumerate(tensors):
        places.setdefault(None if tensor is None else tensor.device, []).append(i)
    empty = places.pop(None, [])
    groups = list(places.values()) or [[]]
    groups[0] = sorted([*groups[0], *empty])
    return [(where, HealthScanner([tensors[i] for i in where])) for where in groups]


def _total(found: Sequence[Any]) -> Finding:
    nan = inf = 0
    sumsq = absmax = 0.0
    for values in found:
        # One transfer, and NumPy's sums: a tenth of the time of PyTorch's on so few numbers.
        if not len(values):
            continue
        more_nan, more_inf = np.add.reduce(values.view(np.int64)[:, 1:3]).tolist()
        nan, inf = nan + more_nan, inf + more_inf
        absmax = max(absmax, float(np.maximum.reduce(values[:, 3])))
        sumsq += float(np.add.reduce(values[:, 5]))
    return Finding(nan, inf, sumsq, absmax)


def inspect_gradients(parameters: Mapping[str, torch.Tensor]) -> Inspector:
    """An inspector of the gradients that these parameters have at each inspection."""
    owners = list(parameters.values())
    return Inspector(dict.fromkeys(parameters, "gradient"), lambda: [p.grad for p in owners])


def inspect_weights(
    model: torch.nn.Module, parameters: Mapping[str, torch.Tensor]
) -> tuple[Inspector, list[str]]:
    """An inspector of the parameters and of the model's floating-point buffers.

    Returns:
        The inspector, and the names of buffers that it leaves alone: a mask of -inf, the bounds of
        an observer and the like, which hold such values before anything could go wrong.
    """
    watched = {name: p for name, p in parameters.items() if can_scan(p)}
    owners = list(watched.values())
    kinds: dict[str, Kind] = dict.fromkeys(watched, "parameter")
    places: list[tuple[dict[str, torch.Tensor | None], str]] = []
    left_alone = []
    for name, buffer in model.named_buffers():
        if not can_scan(buffer):
            continue
        if bool(health_scan([readable(buffer)]).nonfinite.any()):
            left_alone.append(name)
            continue
        kinds[name] = "buffer"
        owner, _, own_name = name.rpartition(".")
        # Looked up anew each time, since modules assign new tensors to their buffers.
        places.append((model.get_submodule(owner)._buffers, own_name))
    inspector = Inspector(
        kinds, lambda: [*owners, *(buffers.get(name) for buffers, name in places)]
    )
    return inspector, left_alone
