"""Minimum, maximum, mean and spread of a series of any length, in memory that does not grow."""

import math
from collections.abc import Sequence


class MetricStatistics:
    """Statistics of one metric, taken in batch by batch.

    Batches are merged by the formula of Chan, Golub and LeVeque (1979), Welford's for one value: no
    sum of squares that would cancel. What is not finite is counted and does not enter.

    Attributes:
        count: finite values.
        nonfinite: NaN and infinities.
        final: the last value, finite or not.
    """

    __slots__ = ("_high", "_low", "_mean", "_squares", "count", "final", "nonfinite")

    def __init__(self) -> None:
        self.count = 0
        self.nonfinite = 0
        self.final: float | None = None
        self._low = math.inf
        self._high = -math.inf
        self._mean = 0.0
        self._squares = 0.0

    def add(self, values: Sequence[float]) -> None:
        """Takes in the next values.

        Args:
            values: in order; any number of them.

        Cost: some tenths of a microsecond per value.
        """
        if not values:
            return
        self.final = values[-1]
        finite = values
        total = sum(values)
        if not math.isfinite(total):
            finite = [value for value in values if math.isfinite(value)]
            self.nonfinite += len(values) - len(finite)
            if not finite:
                return
            total = sum(finite)
        self._merge(finite, total)

    def summary(self) -> dict[str, float | int | None]:
        """What is known of the metric.

        Returns:
            "min", "max", "mean", "std" (of the population, sqrt(sum (x - mean)^2 / count)) of the
            finite values, None if there are none; "final", the last value; "count", "nonfinite".
        """
        has_any = self.count > 0
        return {
            "min": self._low if has_any else None,
            "max": self._high if has_any else None,
            "mean": self._mean if has_any else None,
            "std": math.sqrt(self._squares / self.count) if has_any else None,
            "final": self.final,
            "count": self.count,
            "nonfinite": self.nonfinite,
        }

    def _merge(self, values: Sequence[float], total: float) -> None:
        added = len(values)
        mean = total / added
        if not math.isfinite(mean):  # the sum went beyond the largest float, the mean cannot
            mean = math.fsum(value / added for value in values)
        squares = 0.0
        for value in values:
            off = value - mean
            squares += off * off
        count = self.count + added
        off = mean - self._mean
        if math.isfinite(off):
            self._mean += off * (added / count)
        else:
            self._mean = self._mean * (self.count / count) + mean * (added / count)
        self._squares += squares + off * off * (self.count * (added / count))
        self.count = count
        self._low = min(self._low, min(values))
        self._high = max(self._high, max(values))
