"""From a score to a verdict: where it stands among scores of data that is known to be normal."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from foreshock.records.atomic_file import write_atomically
from foreshock.records.strict_json import dump_json, load_json

Scores: TypeAlias = "Tensor | Sequence[float] | float"

_FORMAT = "foreshock.percentile_calibrator"
_VERSION = 1


class EmpiricalPercentileCalibrator:
    """Ranks scores among those of in-distribution data; a higher score is a stranger input.

    With n sorted reference scores s_1 <= ... <= s_n:
    threshold(q) = s_k, k = ceil((n + 1) q),  is_ood(x) = not x <= threshold(q),
    percentile(x) = #{s <= x} / n,  p_value(x) = (1 + #{s >= x}) / (n + 1).

    - `is_ood(x, q)` is true exactly where `p_value(x) <= 1 - q`: of inputs that are like the
      reference at most 1 - q are flagged, whatever the distribution.
    - Each score is judged alone. NaN is stranger than everything: out of distribution, percentile
      1, smallest p-value.

    >>> calibrator = EmpiricalPercentileCalibrator().fit(scores_of_held_out_data)
    >>> calibrator.is_ood(scores)

    Args:
        quantiles: the thresholds to be had, each above 0 and below 1; the first is the default.
    Raises:
        TypeError, ValueError: naming the argument, what was given and what is accepted.
    Cost:
        O(log n) per score, without waiting for a device; n numbers of memory on every device that
        scores came from.
    Source:
        Vovk, Gammerman, Shafer, Algorithmic Learning in a Random World (2005): split conformal
        prediction.
    """

    def __init__(self, quantiles: Sequence[float] = (0.95,)) -> None:
        self._quantiles = tuple(float(q) for q in quantiles)
        if not self._quantiles:
            raise ValueError("quantiles is empty; accepted: numbers above 0 and below 1")
        for q in self._quantiles:
            _check_quantile(q, "quantiles")
        self._sorted: list[float] = []
        self._on_devices: dict[torch.device, Tensor] = {}
        self._thresholds: dict[float, float] = {}

    @property
    def quantiles(self) -> tuple[float, ...]:
        """The thresholds to be had; the first is the default."""
        return self._quantiles

    @property
    def reference(self) -> Tensor:
        """(n,) float64: the scores that others are ranked among, sorted, in host memory."""
        return torch.tensor(self._sorted, dtype=torch.float64)

    def fit(self, scores: Scores) -> EmpiricalPercentileCalibrator:
        """Takes in the scores of data that is known to be normal, in place of any before.

        Args:
            scores: n finite numbers, n at least 1 / (1 - q) for every q in quantiles.
        Returns:
            The calibrator.
        Raises:
            TypeError, ValueError: naming what was given and what is accepted; nothing was taken in.
        """
        given = _as_tensor(scores, "scores").flatten().cpu()
        strange = int((~given.isfinite()).sum())
        if strange:
            raise ValueError(
                f"scores holds {strange} numbers of {len(given)} that are not finite; accepted: "
                "finite numbers, since what is normal is to be known"
            )
        for q in self._quantiles:
            _check_count(len(given), q)
        self._sorted = given.sort().values.tolist()
        self._on_devices = {}
        self._thresholds = {}
        return self

    def threshold(self, q: float | None = None) -> float:
        """The highest score that is still normal.

        Args:
            q: above 0 and below 1; default the first of quantiles.
        Raises:
            RuntimeError: nothing has been fitted.
            ValueError: q is out of bounds, or asks for more than the n scores there are.
        """
        self._check_is_fitted()
        q = self._quantiles[0] if q is None else float(q)
        if q not in self._thresholds:
            _check_quantile(q, "q")
            _check_count(len(self._sorted), q)
            rank = math.ceil((len(self._sorted) + 1) * Fraction(str(q)))
            self._thresholds[q] = self._sorted[rank - 1]
        return self._thresholds[q]

    def is_ood(self, x: Scores, q: float | None = None) -> Tensor:
        """bool, of the shape of x: whether x lies above `threshold(q)`, or is NaN."""
        return self._is_above(_as_tensor(x, "x"), q)

    def percentile(self, x: Scores) -> Tensor:
        """float64, of the shape of x: the share of the reference that is not above x, 0 to 1."""
        return self._share(_as_tensor(x, "x"))

    def p_value(self, x: Scores) -> Tensor:
        """float64, of the shape of x: how often normal data would be at least as strange, 0 to 1.

        Uniform, or larger, for a score that is exchangeable with the reference.
        """
        scores = _as_tensor(x, "x")
        below = self._rank(scores, is_after_equals=False)
        return (1 + len(self._sorted) - below).double() / (len(self._sorted) + 1)

    def to_json_object(self) -> dict[str, Any]:
        """What `from_json_object` makes the same calibrator of."""
        self._check_is_fitted()
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "quantiles": list(self._quantiles),
            "reference": list(self._sorted),
        }

    @classmethod
    def from_json_object(cls, saved: Mapping[str, Any]) -> EmpiricalPercentileCalibrator:
        """The calibrator of which this was made.

        Raises:
            ValueError: it is none, or of a version to come, or its numbers cannot be right.
        """
        kind = (saved.get("format"), saved.get("version")) if isinstance(saved, Mapping) else saved
        if kind != (_FORMAT, _VERSION):
            raise ValueError(f"a calibrator says {kind!r}; accepted: {(_FORMAT, _VERSION)!r}")
        try:
            return cls(saved["quantiles"]).fit(saved["reference"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"a calibrator is damaged: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes JSON in one step; every number comes back bit for bit."""
        write_atomically(path, dump_json(self.to_json_object(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> EmpiricalPercentileCalibrator:
        """Reads what `save` wrote.

        Raises:
            OSError, ValueError: the file cannot be read, or holds no calibrator.
        """
        return cls.from_json_object(load_json(Path(path).read_bytes()))

    def _is_above(self, scores: Tensor, q: float | None) -> Tensor:
        return (scores <= self.threshold(q)).logical_not_()

    def _share(self, scores: Tensor) -> Tensor:
        # searchsorted puts a NaN behind all numbers.
        return self._rank(scores, is_after_equals=True).double() / len(self._sorted)

    def reference_on(self, device: torch.device) -> Tensor:
        """`reference` on a device, where it stays."""
        self._check_is_fitted()
        reference = self._on_devices.get(device)
        if reference is None:
            reference = self._on_devices[device] = self.reference.to(device)
        return reference

    def _rank(self, scores: Tensor, *, is_after_equals: bool) -> Tensor:
        reference = self.reference_on(scores.device)
        return torch.searchsorted(reference, scores.contiguous(), right=is_after_equals)

    def _check_is_fitted(self) -> None:
        if not self._sorted:
            raise RuntimeError("the calibrator has no reference scores; call fit(scores) first")


def _as_tensor(scores: Any, name: str) -> Tensor:
    """float64 on the device that the scores are on, without their history."""
    if isinstance(scores, Tensor) and scores.is_floating_point():
        return scores.detach().double()
    # Numbers of Python would become float32, and lose digits that decide at a boundary.
    dtype = scores.dtype if isinstance(scores, Tensor) else torch.float64
    try:
        tensor = torch.as_tensor(scores, dtype=dtype)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{name} is a {type(scores).__name__} ({error}); accepted: numbers or a tensor"
        ) from None
    if tensor.is_complex():
        raise TypeError(f"{name} is {dtype}; accepted: real numbers")
    return tensor.detach().double()


def _check_quantile(q: float, name: str) -> None:
    if not 0 < q < 1:
        raise ValueError(f"{name} holds {q}; accepted: numbers above 0 and below 1")


def samples_needed(q: float) -> int:
    """How many scores a threshold at q needs: 1 / (1 - q)."""
    # As it is written: in binary 1 / (1 - 0.9) is above 10.
    return math.ceil(1 / (1 - Fraction(str(q))))


def _check_count(count: int, q: float) -> None:
    needed = samples_needed(q)
    if count < needed:
        raise ValueError(
            f"there are {count} scores to calibrate with; accepted: at least {needed}, which is "
            f"1 / (1 - q) for q = {q}"
        )
