"""Reads training_metrics.json and training_metrics.csv, whatever a kill left of them."""

import csv
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from foreshock.records.posix_file import checked_path
from foreshock.records.strict_json import decode_nonfinite_texts, load_json

_NUMBER = re.compile(r"-?[0-9]{1,700}(\.[0-9]+)?(e[+-]?[0-9]+)?")


@dataclass(frozen=True)
class Metrics:
    """The contents of a metrics file.

    Attributes:
        records: every whole record in the order of the file.
        torn_lines: lines skipped because they are no whole record.
    """

    records: list[dict[str, Any]]
    torn_lines: int


def read_metrics(path: str | os.PathLike[str], *, decode_nonfinite: bool = True) -> Metrics:
    """Reads what a `MetricsRecorder` wrote, also while it is being written or after a kill.

    Args:
        path: `training_metrics.json`, or `training_metrics.csv`, which the ending tells. A CSV file
            knows no types: its cells come back as ints, floats or texts, empty ones not at all.
        decode_nonfinite: give the texts "NaN", "Infinity" and "-Infinity", which is how the
            recorder spells floats that JSON lacks, back as floats.

    Returns:
        The records, and how many lines were skipped.

    Raises:
        FileNotFoundError: there is no such file.
        IsADirectoryError: the path is a directory.
        ValueError: the file is neither.

    Cost: one pass; all records are held in memory.
    """
    file_path = checked_path(path)
    is_csv = file_path.suffix == ".csv"
    found = _read_csv(file_path) if is_csv else _read_json(file_path)
    if not decode_nonfinite:
        return found
    decoded = [
        {key: _decoded(key, value) for key, value in record.items()} for record in found.records
    ]
    return Metrics(decoded, found.torn_lines)


def scan_json(file: BinaryIO) -> Iterator[tuple[dict[str, Any] | None, int]]:
    """Goes through the lines of an array of records.

    Args:
        file: opened at its beginning.

    Yields:
        A record, None for a line that is not a whole one; and where in the file it ends, its comma
        and line break not counted.

    Raises:
        ValueError: the file does not begin as such an array does.
    """
    first = file.readline()
    if first.strip() not in (b"", b"[", b"[]"):
        raise ValueError('it does not begin with a line "["')
    offset = len(first)
    for line in file:
        # A kill may leave the bracket that closes the array, or only a part of what replaced it.
        text = line.rstrip(b"\n,] ")
        if text:
            yield _record(text), offset + len(text)
        offset += len(line)


def _read_json(path: Path) -> Metrics:
    with open(path, "rb") as file:
        try:
            found = [record for record, _ in scan_json(file)]
        except ValueError as error:
            raise ValueError(f"path {str(path)!r} holds no metrics: {error}") from error
    records = [record for record in found if record is not None]
    return Metrics(records, len(found) - len(records))


def _record(text: bytes) -> dict[str, Any] | None:
    try:
        record = load_json(text)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _read_csv(path: Path) -> Metrics:
    text = path.read_bytes()
    whole, _, torn = text.rpartition(b"\n")
    try:
        lines = list(csv.reader(whole.decode().split("\n"), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"path {str(path)!r} does not hold CSV: {error}") from error
    columns = lines[0] if lines else []
    records = [
        {name: _number(cell) for name, cell in zip(columns, line, strict=True) if cell}
        for line in lines[1:]
        if len(line) == len(columns)
    ]
    return Metrics(records, max(0, len(lines) - 1) - len(records) + bool(torn))


def _number(cell: str) -> int | float | str:
    if not _NUMBER.fullmatch(cell):
        return cell
    return int(cell) if cell.lstrip("-").isdigit() else float(cell)


def _decoded(key: str, value: Any) -> Any:
    return value if key == "timestamp" else decode_nonfinite_texts(value)
