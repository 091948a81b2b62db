"""The files of one series: lines as they come, arrays and curves of all of them."""

import contextlib
from collections.abc import Callable, Iterator
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path

from foreshock.records.curves_envelope import Envelope
from foreshock.records.line_file import LineFile
from foreshock.records.series_arrays import write_arrays
from foreshock.records.series_picture import draw_series
from foreshock.records.series_row import Column, SeriesRow, row_of_line

MAX_COLUMNS = 4096
MAX_CURVES = 16


class SeriesFile:
    """`NAME.jsonl`, with `NAME.npz` and `NAME.png` made of it. For one thread at a time.

    Args:
        directory: of the files; it is created if missing.
        name: of the series. What is in its lines already is taken in.

    Raises:
        OSError: the lines cannot be read or appended to.

    Cost: memory for 4096 columns' names and 16 curves at most, however long the series.

    Attributes:
        num_rows: in the file.
        num_in_arrays: of them when the arrays were written last.
    """

    def __init__(self, directory: Path, name: str) -> None:
        self._lines_path = directory / f"{name}.jsonl"
        self.num_rows = self.num_in_arrays = 0
        # In the order in which they came, for the arrays.
        self._columns: dict[Column, None] = {}
        self._known: set[tuple[Column, ...]] = set()
        self._curves: dict[str, Envelope] = {}
        self._lines = LineFile(self._lines_path)
        for row in self._rows():
            self._take_in(row)

    def append(self, row: SeriesRow) -> None:
        """Appends a row.

        Raises:
            OSError: it is not in the file.
            ValueError: the series has more columns than it may have.
        """
        self._make_room(row)
        self._lines.append(row.line())
        self._take_in(row)

    def write_arrays(self, pause: Callable[[], object] = lambda: None) -> None:
        """Writes all rows as arrays, one per name, into `NAME.npz`.

        Args:
            pause: called after every few rows.

        Raises:
            OSError: they cannot be written; the old ones are still there.

        Cost: one pass over the lines, some microseconds per number; memory does not grow with them.
        """
        path = self._lines_path.with_suffix(".npz")
        self.num_in_arrays = self.num_rows  # also where it fails: not to be tried every row
        write_arrays(path, islice(self._rows(), self.num_rows), [*self._columns], pause)

    def draw(self) -> Path:
        """Draws all numbers over the steps into `NAME.png`, a panel for each name.

        Raises:
            ImportError: matplotlib is not installed.
            OSError: the picture cannot be written.
        """
        path = self._lines_path.with_suffix(".png")
        return draw_series(path, self._lines_path.stem, self.num_rows, self._curves)

    def sync(self) -> None:
        """Makes the lines survive a crash of the machine."""
        self._lines.sync()

    def close(self) -> None:
        """Closes the lines."""
        with contextlib.suppress(OSError):
            self._lines.close()

    def _rows(self) -> Iterator[SeriesRow]:
        with open(self._lines_path, "rb") as file:
            for line in file:
                row = row_of_line(line)
                if row is not None:
                    yield row

    def _make_room(self, row: SeriesRow) -> None:
        if row.columns in self._known:
            return
        new = [column for column in row.columns if column not in self._columns]
        if len(self._columns) + len(new) > MAX_COLUMNS:
            raise ValueError(f"the series has more than {MAX_COLUMNS} names and labels")
        self._columns.update(dict.fromkeys(new))
        if len(self._known) >= MAX_COLUMNS:
            self._known.clear()
        self._known.add(row.columns)

    def _take_in(self, row: SeriesRow) -> None:
        with contextlib.suppress(ValueError):  # too many, in a file that somebody else wrote
            self._make_room(row)
        self.num_rows += 1
        pairs = zip(row.columns, row.numbers, strict=True)
        for name, of_name in groupby(pairs, key=lambda pair: pair[0][0]):
            if name not in self._curves:
                if len(self._curves) >= MAX_CURVES:
                    continue
                self._curves[name] = Envelope()
            numbers = [*map(itemgetter(1), of_name)]
            self._curves[name].add([row.step] * len(numbers), numbers)
