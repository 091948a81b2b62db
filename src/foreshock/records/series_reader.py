"""Reads the lines of a series, whatever a kill left of them."""

import os
from dataclasses import dataclass
from typing import Any

from foreshock.records.posix_file import checked_path
from foreshock.records.series_row import row_of_line


@dataclass(frozen=True)
class Series:
    """The contents of a series' file.

    Attributes:
        rows: every whole row in the order of the file: "step", "time" (UTC, a text), and its
            values, each a float or a dict of floats by label.
        torn_lines: lines skipped because they are no whole row.
    """

    rows: list[dict[str, Any]]
    torn_lines: int


def read_series(path: str | os.PathLike[str]) -> Series:
    """Reads what a `SeriesRecorder` wrote, also while it is being written or after a kill.

    Args:
        path: `monitoring/NAME.jsonl`. The arrays beside it are read by `numpy.load`.

    Returns:
        The rows, and how many lines were skipped.

    Raises:
        FileNotFoundError: there is no such file.
        IsADirectoryError: the path is a directory.

    Cost: one pass; all rows are held in memory.
    """
    rows: list[dict[str, Any]] = []
    torn_lines = 0
    with open(checked_path(path), "rb") as file:
        for line in file:
            row = row_of_line(line)
            if row is not None:
                rows.append(row.record())
            elif not line.isspace():
                torn_lines += 1
    return Series(rows, torn_lines)
