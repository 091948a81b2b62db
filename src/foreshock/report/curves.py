"""The curves of a run, of any number of records, in memory and in a page that do not grow."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from foreshock.records.curves_envelope import Bucket, Envelope

MAIN_CURVES = ("train_loss", "loss", "grad_norm", "learning_rate", "spectral_kappa")
MAX_CURVES = 160
MAX_LABELS = 24
"""Curves of one field that holds many by label, such as the largest gradients by layer."""
MAX_POINTS = 100_000
"""Of all curves together."""
_FEWEST_POINTS = 256
_AT_ONCE = 4096
_NO_CURVES = frozenset({"step", "spectral_step", "surprise_step", "epoch", "schema_version"})


class Curves:
    """Takes in records, and gives what a page needs to draw every number in them.

    A curve of few points is kept as it is; of a long one, the lowest, highest and mean value of
    equal intervals of steps. What is beyond the limits of this module is counted, not kept.

    Attributes:
        omitted: numbers that belong to curves beyond the limits.
    """

    def __init__(self) -> None:
        self.omitted = 0
        self._last_step = 0
        self._num_pending = 0
        # By file and name; None stands for what is not drawn.
        self._columns: dict[str, dict[str, _Column | None]] = {}
        self._num_columns = 0
        self._labels: Counter[tuple[str, str]] = Counter()

    def add(self, source: str, step: int, record: Mapping[str, Any]) -> None:
        """Takes in a record.

        Args:
            source: the file that it is from; curves of one name in two files are two.
            step: from 0.
            record: its fields; those that are no numbers, and hold none by label, are passed over.
        """
        columns = self._columns.setdefault(source, {})
        if step > self._last_step:
            self._last_step = step
        for name, value in record.items():
            kind = type(value)
            if kind is float or kind is int:
                column = columns[name] if name in columns else self._open(columns, name)
                if column is not None:
                    column.steps.append(step)
                    column.values.append(value)
                elif name not in _NO_CURVES:
                    self.omitted += 1
            elif kind is dict:
                for label, number in _numbers_in(value, name):
                    self._add_labelled(source, name, label, step, number)
        self._num_pending += 1
        if self._num_pending >= _AT_ONCE:
            self._flush()

    def drawn(self) -> dict[str, Any]:
        """What the page needs.

        Returns:
            `{"last": step, "steps": [[step, ...], ...], "curves": [{"source", "name", "width",
            "steps" (which of the lists), "mean", "low", "high" (where they differ from the mean),
            "nonfinite" (pairs of index and count)}, ...]}`; a mean is None where no value was
            finite.
        """
        self._flush()
        limit = max(_FEWEST_POINTS, MAX_POINTS // max(1, self._num_columns))
        steps: dict[tuple[int, ...], int] = {}
        curves = []
        for source, columns in self._columns.items():
            for name, column in columns.items():
                if column is None:
                    continue
                column.envelope.shrink(limit)
                buckets = column.envelope.buckets()
                place = steps.setdefault(tuple(bucket.step for bucket in buckets), len(steps))
                curve = {
                    "source": source,
                    "name": name,
                    "width": column.envelope.width,
                    "steps": place,
                }
                curves.append(curve | _values(buckets))
        return {"last": self._last_step, "steps": [list(row) for row in steps], "curves": curves}

    def thinned(self, max_points: int) -> dict[tuple[str, str], tuple[int, list[Bucket]]]:
        """Every curve, of no more points than this: by file and name its width, and the points."""
        self._flush()
        found = {}
        for source, columns in self._columns.items():
            for name, column in columns.items():
                if column is not None:
                    envelope = column.envelope.copy()
                    envelope.shrink(max_points)
                    found[source, name] = envelope.width, envelope.buckets()
        return found

    def _flush(self) -> None:
        self._num_pending = 0
        for columns in self._columns.values():
            for column in columns.values():
                if column is not None:
                    column.flush()

    def _add_labelled(self, source: str, name: str, label: str, step: int, number: float) -> None:
        columns = self._columns[source]
        if label not in columns:
            if self._labels[source, name] >= MAX_LABELS:
                self.omitted += 1
                return
            self._labels[source, name] += 1
        self.add(source, step, {label: number})

    def _open(self, columns: dict[str, _Column | None], name: str) -> _Column | None:
        if name in _NO_CURVES:
            columns[name] = None
            return None
        if self._num_columns >= MAX_CURVES:
            return None
        self._num_columns += 1
        column = columns[name] = _Column()
        return column


class _Column:
    """One curve, and what has not been put into its envelope yet."""

    def __init__(self) -> None:
        self.envelope = Envelope()
        self.steps: list[int] = []
        self.values: list[float] = []

    def flush(self) -> None:
        self.envelope.add(self.steps, list(map(_as_float, self.values)))
        self.steps.clear()
        self.values.clear()


def place_of(curve: Mapping[str, Any]) -> tuple[int, bool]:
    """The main curves first, those by label last; otherwise in the order of the files."""
    name = curve["name"]
    main = MAIN_CURVES.index(name) if name in MAIN_CURVES else len(MAIN_CURVES)
    return main, "." in name


def is_step(step: object) -> bool:
    """Tells whether this is the number of a step."""
    return type(step) is int and 0 <= step < 2**53  # what JavaScript counts exactly


def short(number: float) -> float | None:
    """Seven digits of a number, which is more than a curve shows; None if it is not finite."""
    return float(f"{number:.7g}") if math.isfinite(number) else None


def _as_float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _numbers_in(value: Mapping[str, Any], path: str) -> Iterator[tuple[str, float]]:
    for key, inner in value.items():
        name = f"{path}.{key}"
        if type(inner) is float or type(inner) is int:
            yield name, inner
        elif type(inner) is dict:
            yield from _numbers_in(inner, name)


def _values(buckets: list[Bucket]) -> dict[str, Any]:
    values: dict[str, Any] = {"mean": [short(bucket.mean) for bucket in buckets]}
    if any(bucket.low < bucket.high for bucket in buckets):
        values["low"] = [short(bucket.low) for bucket in buckets]
        values["high"] = [short(bucket.high) for bucket in buckets]
    nonfinite = [[i, bucket.nonfinite] for i, bucket in enumerate(buckets) if bucket.nonfinite]
    if nonfinite:
        values["nonfinite"] = nonfinite
    return values
