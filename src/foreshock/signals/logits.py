"""What a model's logits look like: their range, and how their distribution drifts."""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike

from foreshock.ops import health_scan
from foreshock.signals.divergence import jensen_shannon
from foreshock.signals.given_numbers import as_count, as_series
from foreshock.signals.saved_state import check_settings
from foreshock.signals.trend import Floats

_BINS_PER_DECADE = 16
_SMALLEST_EXPONENT, _LARGEST_EXPONENT = -3, 4
_SAMPLE = 16_384


class LogitStatistics(NamedTuple):
    """Of all logits of a step; each a () float64 tensor on their device."""

    mean: torch.Tensor
    """Of the finite ones; 0 where there are none."""
    std: torch.Tensor
    """Of the population of the finite ones."""
    max: torch.Tensor
    """The largest; inf where one is, NaN where one is."""
    min: torch.Tensor
    """The smallest, likewise: -inf where logits are masked."""
    nonfinite: torch.Tensor
    """How many are NaN or infinite."""


def logit_statistics(logits: torch.Tensor) -> LogitStatistics:
    """Mean, spread, range and health of logits.

    std = sqrt(sumsq / n - mean^2) over the n finite ones

    Args:
        logits: floating point, any shape and stride, at least one.
    Returns:
        LogitStatistics. The error of std^2 is under 1e-6 * (mean^2 + std^2).
    Raises:
        TypeError, ValueError: logits is something else.
    Cost:
        Two reads of the logits, `health_scan` and `torch.aminmax`; no copy, no synchronisation.
        To take both block by block, so that the second read finds the block in a cache, is not
        faster: each is bound by memory only where the blocks are large.
    """
    _check(logits)
    logits = logits.detach()
    stats = health_scan([logits])
    low, high = torch.aminmax(logits)
    mean, nonfinite = stats.mean[0], stats.nonfinite[0]
    count = (stats.numel[0] - nonfinite).clamp(min=1)
    spread = (stats.sumsq[0] / count - mean**2).clamp(min=0).sqrt()
    return LogitStatistics(mean, spread, high.double(), low.double(), nonfinite.double())


def logit_histogram(logits: torch.Tensor) -> torch.Tensor:
    """How many of a sample of logits lie in each of the bins, which are the same for all models.

    16 bins per decade of |x| from 0.001 to 10000 on either side of 0, one between, and one beyond
    at either end. So a bin is 15 % wide, whatever the scale of the logits.

    Args:
        logits: as for `logit_statistics`; those not finite are left out.
    Returns:
        (227,) float32 on their device.
    Raises:
        TypeError, ValueError: logits is something else.
    Cost:
        About 16384 of them, evenly spaced, are read: half a millisecond on a CPU. No
        synchronisation.
    """
    _check(logits)
    sample = _thinned(logits.detach()).float().flatten().contiguous()
    edges = _edges(sample.device)
    places = torch.bucketize(sample, edges)
    counts = sample.new_zeros(len(edges) + 1)
    counts.scatter_add_(0, places, torch.ones_like(sample))
    return counts[1:-1]  # beyond the largest floats lies only what is no number


def logit_drift(
    logits: torch.Tensor | ArrayLike | Iterable[float],
    reference: torch.Tensor | ArrayLike | Iterable[float],
) -> float:
    """How unlike the distributions of two sets of logits are.

    drift = JSD(h(logits), h(reference)), h = share of each bin of `logit_histogram`

    Args:
        logits: any shape, or a sequence of numbers; those not finite are left out.
        reference: likewise.
    Returns:
        In nats, from 0, the same, to ln 2, nothing in common; 0 if either has no finite logit.
    Raises:
        TypeError, ValueError: naming the argument, what was given and what is accepted.
    Cost:
        That of two histograms; waits for their device.
    Source:
        foreshock's specification; Lin 1991.
    """
    found = [
        _shares(logit_histogram(_as_tensor(given, name)).cpu().double().numpy())
        for given, name in ((logits, "logits"), (reference, "reference"))
    ]
    p, q = found
    return 0.0 if p is None or q is None else jensen_shannon(p, q)


class LogitDrift:
    """`logit_drift` against the looks before: how unlike the last ones the present logits are.

    >>> drift = LogitDrift()
    >>> found = drift.update(logit_histogram(logits).tolist())

    Args:
        window: looks that make up the reference, each of them as much as another.
        min_count: looks before the first answer.
    Raises:
        TypeError, ValueError: naming the argument, what was given and what is accepted.
    Cost:
        window histograms of 227 numbers; some 50 microseconds an update.
    """

    def __init__(self, window: int = 16, min_count: int = 4) -> None:
        self._window = as_count(window, "window")
        self._min_count = as_count(min_count, "min_count")
        if self._min_count > self._window:
            raise ValueError(f"min_count is {min_count}; accepted: up to window, {window}")
        self._shares: deque[Floats] = deque(maxlen=self._window)

    def update(self, histogram: ArrayLike | Iterable[float]) -> float | None:
        """Takes in the histogram of a look.

        Args:
            histogram: (227,) counts, from `logit_histogram`.
        Returns:
            Its drift in nats, from 0 to ln 2; None with fewer than min_count looks before it, or if
            it counts nothing, and then it is not taken in.
        Raises:
            TypeError, ValueError: histogram is something else.
        """
        shares = _shares(_checked_counts(histogram, "histogram"))
        if shares is None:
            return None
        is_enough = len(self._shares) >= self._min_count
        reference = np.mean(self._shares, axis=0) if is_enough else None
        self._shares.append(shares)
        return None if reference is None else jensen_shannon(shares, reference)

    def state_dict(self) -> dict[str, Any]:
        """What later answers depend on."""
        return {"settings": self._settings, "shares": [s.tolist() for s in self._shares]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on from a saved state.

        Raises:
            KeyError, TypeError, ValueError: it is of a stream with other settings, or none.
        """
        check_settings(state_dict, self._settings)
        given: Sequence[Any] = state_dict["shares"]
        shares = [_checked_counts(s, "state_dict['shares']") for s in given]
        self._shares = deque(shares[-self._window :], maxlen=self._window)

    @property
    def _settings(self) -> dict[str, Any]:
        return {"window": self._window, "min_count": self._min_count}


def _check(logits: Any) -> None:
    accepted = "a tensor of floating-point numbers, at least one"
    if not isinstance(logits, torch.Tensor):
        raise TypeError(f"logits is a {type(logits).__name__}; accepted: {accepted}")
    if not logits.is_floating_point():
        raise TypeError(f"logits is a tensor of {logits.dtype}; accepted: {accepted}")
    if not logits.numel():
        raise ValueError(f"logits has the shape {tuple(logits.shape)}; accepted: {accepted}")


def _as_tensor(given: Any, name: str) -> torch.Tensor:
    if isinstance(given, torch.Tensor) and given.is_floating_point():
        return given
    return torch.from_numpy(as_series(given, name))


@functools.lru_cache(maxsize=16)
def _edges(device: torch.device) -> torch.Tensor:
    decades = _LARGEST_EXPONENT - _SMALLEST_EXPONENT
    num = decades * _BINS_PER_DECADE + 1
    positive = torch.logspace(_SMALLEST_EXPONENT, _LARGEST_EXPONENT, num, dtype=torch.float64)
    end = torch.tensor([torch.finfo(torch.float32).max], dtype=torch.float64)
    outward = torch.cat([positive, end])
    return torch.cat([-outward.flip(0), outward]).float().to(device)


def _thinned(logits: torch.Tensor) -> torch.Tensor:
    """About `_SAMPLE` of them, a view: classes and positions are thinned alike."""
    last = logits.dim() - 1
    for i, dim in enumerate((last, *range(last), last)):
        excess = logits.numel() / _SAMPLE
        if excess <= 1:
            break
        stride = math.ceil(excess if i else math.sqrt(excess))
        logits = logits[(slice(None),) * dim + (slice(None, None, stride),)]
    return logits


def _checked_counts(given: Any, name: str) -> Floats:
    counts = as_series(given, name)
    num = 2 * ((_LARGEST_EXPONENT - _SMALLEST_EXPONENT) * _BINS_PER_DECADE + 1) + 1
    if len(counts) != num or not np.isfinite(counts).all() or (counts < 0).any():
        raise ValueError(f"{name} is {given!r}; accepted: {num} numbers from 0 up")
    return counts


def _shares(counts: Floats) -> Floats | None:
    total = float(counts.sum())
    return counts / total if total > 0 else None
