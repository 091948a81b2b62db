"""What is kept in memory of all rows: statistics and curves, of a size that does not grow."""

import contextlib
import sys
from collections.abc import Sequence
from itertools import groupby
from operator import attrgetter
from typing import cast

from foreshock.records.curves_envelope import Envelope
from foreshock.records.curves_figure import panel_of
from foreshock.records.metrics_row import REQUIRED, Row, is_number
from foreshock.records.metrics_statistics import MetricStatistics
from foreshock.records.strict_json import JsonValue

MAX_CURVES = 16
_LARGEST = int(sys.float_info.max)
_NOT_METRICS = ("step", "epoch")


class MetricsTally:
    """Takes rows in, in the order in which they were recorded.

    Attributes:
        num_rows: how many.
        last_step: of the last one.
        first_ns: when the first was recorded, nanoseconds since the epoch.
        last_ns: when the last was.
        elapsed_s: seconds of training until then.
        statistics: of each metric.
        curves: of those that are drawn.
    """

    def __init__(self) -> None:
        self.num_rows = 0
        self.last_step: int | None = None
        self.first_ns: int | None = None
        self.last_ns: int | None = None
        self.elapsed_s = 0.0
        self.statistics: dict[str, MetricStatistics] = {}
        self.curves: dict[str, Envelope] = {}

    def take_in(self, rows: Sequence[Row]) -> None:
        """Takes in the next rows.

        Cost: some tenths of a microsecond per value, half a one more where it is drawn.
        """
        if not rows:
            return
        for names, group in groupby(rows, key=attrgetter("names")):
            self._take_in_alike(names, list(group))
        last = rows[-1]
        if self.first_ns is None:
            self.first_ns = rows[0].time_ns
        self.num_rows += len(rows)
        self.last_ns, self.elapsed_s = last.time_ns, last.elapsed_s
        self.last_step = cast(int, last.values[0])

    def _take_in_alike(self, names: tuple[str, ...], rows: list[Row]) -> None:
        are_plain = all(row.is_plain for row in rows)
        steps, *columns = zip(*[row.values for row in rows], strict=True)
        for name, column in zip((*REQUIRED[1:], *names), columns, strict=True):
            if name not in _NOT_METRICS:
                self._add(name, *_floats(cast("tuple[int, ...]", steps), column, are_plain))

    def _add(self, name: str, steps: Sequence[int], values: Sequence[float]) -> None:
        if not values:
            return
        statistics = self.statistics.get(name)
        if statistics is None:
            statistics = self.statistics[name] = MetricStatistics()
            if panel_of(name) is not None and len(self.curves) < MAX_CURVES:
                self.curves[name] = Envelope()
        statistics.add(values)
        curve = self.curves.get(name)
        if curve is not None:
            curve.add(steps, values)


def _floats(
    steps: Sequence[int], values: Sequence[JsonValue], are_numbers: bool
) -> tuple[Sequence[int], Sequence[float]]:
    """The values that are numbers which a float can hold, and their steps."""
    if are_numbers:
        with contextlib.suppress(OverflowError):
            return steps, [*map(float, cast("Sequence[float]", values))]
    found = [
        (step, float(cast(float, value)))
        for step, value in zip(steps, values, strict=True)
        if is_number(value) and not (isinstance(value, int) and abs(value) > _LARGEST)
    ]
    return [step for step, _ in found], [value for _, value in found]
