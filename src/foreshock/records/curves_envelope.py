"""A curve of any length in memory that does not grow: the extremes between steps, not each step."""

import math
from collections.abc import Sequence
from typing import NamedTuple

MAX_BUCKETS = 2048


class Bucket(NamedTuple):
    """What is kept of the values whose steps lie in `[step, step + width)`.

    Attributes:
        step: the first of these steps.
        low: the smallest finite value.
        high: the largest.
        mean: of all finite values; NaN if there is none.
        nonfinite: how many values were NaN or infinite.
    """

    step: int
    low: float
    high: float
    mean: float
    nonfinite: int


class Envelope:
    """Minimum, maximum and mean of a series over equal intervals of steps, at most 2048 of them.

    An interval is one step long until there are too many; then every two become one. So a short
    series is kept value by value, a long one loses detail and never an extreme. Steps may come in
    any order and more than once, as after a rollback.

    Attributes:
        width: steps in an interval, a power of two.
    """

    def __init__(self) -> None:
        self.width = 1
        # By index of the interval: [lowest, highest, sum, number of finite values, of others].
        self._buckets: dict[int, list[float]] = {}

    def add(self, steps: Sequence[int], values: Sequence[float]) -> None:
        """Takes in values and the steps they belong to.

        Args:
            steps: not negative.
            values: as many; those that are not finite are counted.

        Cost: half a microsecond per value.
        """
        width, buckets = self.width, self._buckets
        for step, value in zip(steps, values, strict=True):
            index = step // width
            bucket = buckets.get(index)
            if bucket is None:
                bucket = buckets[index] = [math.inf, -math.inf, 0.0, 0, 0]
            if not math.isfinite(value):
                bucket[4] += 1
                continue
            if value < bucket[0]:
                bucket[0] = value
            if value > bucket[1]:
                bucket[1] = value
            bucket[2] += value
            bucket[3] += 1
        self.shrink(MAX_BUCKETS)

    def shrink(self, max_buckets: int) -> None:
        """Widens the intervals until there are no more than so many."""
        while len(self._buckets) > max_buckets:
            self._coarsen()

    def copy(self) -> "Envelope":
        """Another one, which further values do not change."""
        other = Envelope()
        other.width = self.width
        other._buckets = {index: [*bucket] for index, bucket in self._buckets.items()}
        return other

    def buckets(self) -> list[Bucket]:
        """What is kept, in the order of the steps."""
        return [
            Bucket(index * self.width, low, high, total / count if count else math.nan, int(others))
            for index, (low, high, total, count, others) in sorted(self._buckets.items())
        ]

    def _coarsen(self) -> None:
        self.width *= 2
        fine, self._buckets = self._buckets, {}
        for index, bucket in fine.items():
            into = self._buckets.get(index // 2)
            if into is None:
                self._buckets[index // 2] = bucket
            else:
                into[:] = [
                    min(into[0], bucket[0]),
                    max(into[1], bucket[1]),
                    *(a + b for a, b in zip(into[2:], bucket[2:], strict=True)),
                ]
