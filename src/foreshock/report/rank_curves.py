"""The numbers that are not the same on all ranks of a run: a line for each rank, or a band."""

from __future__ import annotations

import math
import statistics
from array import array
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

from foreshock.records.curves_envelope import Bucket
from foreshock.report.curves import Curves, place_of, short

MAX_LINES = 8
"""Ranks up to which each has its own line."""
MAX_RANK_CURVES = 24
_ALL_POINTS, _MOST_POINTS, _FEWEST_POINTS = 8192, 512, 32
"""Of one number: over all ranks together, and of one rank."""
_SAME, _OFF = 1e-3, 1e-2
"""Of the median over ranks: what is no nearer to it differs, and what is farther is off."""
_MOST_TIMES = 10.0
"""That a rank counts as farther than most in one interval, so that no single one decides."""
_LEAST_ALONE, _ALONE_SHARE, _OF_ALL_ALONE = 3, 0.1, 0.9
"""Of the intervals in which a rank is off alone: how many, which share of all, and of those in
which any rank is."""

_Name = tuple[str, str]


class _Line(NamedTuple):
    """One number on one rank, in intervals of `width` steps."""

    width: int
    steps: tuple[int, ...]
    means: array[float]


class RankCurves:
    """Takes in the curves of one rank after the other, and tells where they part.

    Args:
        num_ranks: how many will come.

    Cost: up to 8192 numbers for each curve, over all ranks, and not fewer than 32 a rank.
    """

    def __init__(self, num_ranks: int) -> None:
        self._limit = min(_MOST_POINTS, max(_FEWEST_POINTS, _ALL_POINTS // num_ranks))
        self._lines: dict[_Name, dict[int, _Line]] = defaultdict(dict)
        self._all_steps: dict[tuple[int, ...], tuple[int, ...]] = {}

    def add(self, rank: int, curves: Curves) -> None:
        """Takes in those of a rank."""
        for name, (width, buckets) in curves.thinned(self._limit).items():
            self._lines[name][rank] = self._line(width, buckets)

    def means(self, rank: int, name: _Name) -> list[float]:
        """What a rank's curve is made of, as far as it is finite; by file and name."""
        line = self._lines.get(name, {}).get(rank)
        return [] if line is None else [mean for mean in line.means if math.isfinite(mean)]

    def compared(self) -> Compared:
        """What all of them come to."""
        found = Compared()
        for source, name in sorted(self._lines, key=lambda line: place_of({"name": line[1]})):
            number = Differing(source, name, self._lines[source, name])
            if not number.has_differed:
                continue
            if number.alone is not None:
                found.alone[number.alone].append(name)
            if len(found.numbers) < MAX_RANK_CURVES:
                found.numbers.append(number)
            else:
                found.left_out += 1
        return found

    def _line(self, width: int, buckets: list[Bucket]) -> _Line:
        steps = tuple(bucket.step for bucket in buckets)
        steps = self._all_steps.setdefault(steps, steps)  # mostly the same on all ranks
        return _Line(width, steps, array("d", [bucket.mean for bucket in buckets]))


class Compared:
    """Where the ranks part.

    Attributes:
        numbers: in which they do; the main ones first, those by label last.
        left_out: how many more there are.
        alone: by rank, the numbers that are the same on all ranks but it.
    """

    def __init__(self) -> None:
        self.numbers: list[Differing] = []
        self.left_out = 0
        self.alone: dict[int, list[str]] = defaultdict(list)


class Differing:
    """One number on many ranks, interval by interval.

    Args:
        source, name: the file, and the field in it.
        lines: by rank.

    Attributes:
        has_differed: whether the ranks did, by more than 1 in 1000, in some interval.
        distance: by rank, how far it is from the median of the ranks, as a multiple of their median
            distance: its mean over the intervals.
        alone: the rank that is off where all others are as good as the same; None if that was
            seldom, or not always the same one. Of two, only one that is not finite can be.
    """

    def __init__(self, source: str, name: str, lines: Mapping[int, _Line]) -> None:
        self.source, self.name = source, name
        self.ranks = list(lines)
        self.width = max(line.width for line in lines.values())
        self.has_differed = False
        self._rows = _by_interval(lines, self.width)
        # A long curve ends inside an interval, and a rank that was cut short elsewhere than others.
        ends = {rank: line.steps[-1] for rank, line in lines.items()} if self.width > 1 else {}
        distances: dict[int, list[float]] = defaultdict(list)
        off_alone: Counter[int] = Counter()
        for step, row in self._rows.items():
            end = step + self.width
            self._compare(
                {r: mean for r, mean in row.items() if end <= ends.get(r, end)},
                distances,
                off_alone,
            )
        self.distance = {rank: _mean(found) for rank, found in distances.items()}
        self.alone = None
        for rank, count in off_alone.most_common(1):
            least = max(_LEAST_ALONE, _ALONE_SHARE * len(distances[rank]))
            if count >= max(least, _OF_ALL_ALONE * off_alone.total()):
                self.alone = rank

    @property
    def farthest(self) -> int | None:
        """That of the largest distance, where ranks differ; None if two are as good as alike."""
        (next_to_it, _), (most, rank) = sorted((far, r) for r, far in self.distance.items())[-2:]
        return rank if most > (1 + _OFF) * next_to_it else None

    def drawn(self, steps: list[list[int]]) -> dict[str, Any]:
        """What the page draws: median, lowest and highest of the ranks, and the lines of some.

        Args:
            steps: lists of steps of other curves, to which that of this one is added.
        """
        shown = self.ranks
        if len(shown) > MAX_LINES:
            shown = [] if self.farthest is None else [self.farthest]
        order = sorted(self._rows)
        finite = [_finite(self._rows[step]) for step in order]
        if order not in steps:
            steps.append(order)
        return {
            "source": self.source,
            "name": f"{self.name} by rank",
            "width": self.width,
            "steps": steps.index(order),
            "mean": [short(statistics.median(row)) if row else None for row in finite],
            "low": [short(row[0]) if row else None for row in finite],
            "high": [short(row[-1]) if row else None for row in finite],
            "ranks": len(self.ranks),
            "lines": [
                {"rank": r, "mean": [short(self._rows[step].get(r, math.nan)) for step in order]}
                for r in shown
            ],
            "farthest": self.farthest,
        }

    def in_numbers(self) -> dict[str, Any]:
        """A row of a table: the lowest and the highest mean over all steps, and whose it is."""
        sums: dict[int, list[float]] = defaultdict(list)
        for row in self._rows.values():
            for rank, mean in row.items():
                if math.isfinite(mean):
                    sums[rank].append(mean)
        means = sorted((_mean(values), rank) for rank, values in sums.items())
        (lowest, lowest_rank), (highest, highest_rank) = (means[0], means[-1])
        return {
            "name": self.name,
            "source": self.source,
            "lowest": short(lowest),
            "lowest_rank": lowest_rank,
            "highest": short(highest),
            "highest_rank": highest_rank,
            "farthest": self.farthest,
            "distance": None if self.farthest is None else self.distance[self.farthest],
            "alone": self.alone,
        }

    def _compare(
        self, row: Mapping[int, float], distances: dict[int, list[float]], off_alone: Counter[int]
    ) -> None:
        finite = _finite(row)
        if len(row) < 2 or not finite:
            return
        median = statistics.median(finite)
        same, off = _SAME * abs(median), _OFF * abs(median)
        far = {r: abs(v - median) if math.isfinite(v) else math.inf for r, v in row.items()}
        *_, second, most = sorted(far.values())
        self.has_differed |= most > same
        usual = max(same, statistics.median(far.values()))
        for rank, distance in far.items():
            is_far = math.isinf(distance) or distance > _MOST_TIMES * usual
            distances[rank].append(_MOST_TIMES if is_far else distance / usual if usual else 0.0)
        if second <= same and most > off:
            off_alone[max(far, key=lambda rank: far[rank])] += 1


def _by_interval(lines: Mapping[int, _Line], width: int) -> dict[int, dict[int, float]]:
    """By step and rank the mean; finer lines are made as coarse as the coarsest."""
    rows: dict[int, dict[int, float]] = defaultdict(dict)
    for rank, line in lines.items():
        parts: dict[int, list[float]] = defaultdict(list)
        for step, mean in zip(line.steps, line.means, strict=True):
            parts[step // width * width].append(mean)
        for step, means in parts.items():
            finite = [mean for mean in means if math.isfinite(mean)]
            rows[step][rank] = _mean(finite) if finite else math.nan
    return rows


def _finite(row: Mapping[int, float]) -> list[float]:
    return sorted(value for value in row.values() if math.isfinite(value))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)  # fmean fails where the sum is infinite
