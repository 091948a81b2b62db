"""Reads telemetry.jsonl, whatever a kill left of it."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foreshock.records.posix_file import checked_path
from foreshock.records.strict_json import decode_nonfinite_texts, load_json
from foreshock.records.telemetry_schema import SCHEMA_VERSION, START_EVENT, TEXT_FIELDS


@dataclass(frozen=True)
class Telemetry:
    """The contents of a telemetry file.

    Attributes:
        records: every whole record in the order of the file, the "start" records included (one
            per run or resumption).
        schema_version: the newest version that a start record states; 0 if none does (a file
            killed before its first line was out).
        torn_lines: lines skipped because they are no whole record, wherever they stand.
    """

    records: list[dict[str, Any]]
    schema_version: int
    torn_lines: int


def read_telemetry(path: str | os.PathLike[str], *, decode_nonfinite: bool = True) -> Telemetry:
    """Reads a telemetry file, also one that is still being written or was cut short.

    Args:
        path: the file.
        decode_nonfinite: give the texts "NaN", "Infinity" and "-Infinity", which is how the writer
            spells floats that JSON lacks, back as floats. A field that held one of these three
            texts as a text cannot be told from a float and comes back as a float too; only "event"
            and "time", which are always text, are left alone. False leaves all of them texts.

    Returns:
        The records, the version of their schema, and how many lines were skipped.

    Raises:
        FileNotFoundError: there is no such file.
        IsADirectoryError: the path is a directory.
        ValueError: a newer library wrote the file, under a schema that this one does not know.

    Cost: one pass; all records are held in memory.
    """
    records: list[dict[str, Any]] = []
    schema_version = 0
    torn_lines = 0
    for record in scan_telemetry(path, decode_nonfinite=decode_nonfinite):
        if record is None:
            torn_lines += 1
            continue
        if record.get("event") == START_EVENT:
            schema_version = max(schema_version, record["schema_version"])
        records.append(record)
    return Telemetry(records, schema_version, torn_lines)


def scan_telemetry(
    path: str | os.PathLike[str], *, decode_nonfinite: bool = True
) -> Iterator[dict[str, Any] | None]:
    """Goes through a telemetry file of any length.

    Args:
        path: the file.
        decode_nonfinite: as for `read_telemetry`.

    Yields:
        A record; None for a line that is no whole one.

    Raises:
        FileNotFoundError, IsADirectoryError, ValueError: as `read_telemetry`, when it gets there.

    Cost: one pass, one record in memory at a time.
    """
    file_path = checked_path(path)
    with open(file_path, "rb") as file:
        for line in file:
            if line.isspace():
                continue
            record = parse_telemetry_line(line, decode_nonfinite=decode_nonfinite)
            if record is not None and record.get("event") == START_EVENT:
                _check_version(record, file_path)
            yield record


def parse_telemetry_line(line: bytes, *, decode_nonfinite: bool = True) -> dict[str, Any] | None:
    """Reads one line of a telemetry file.

    Args:
        line: with or without its line break.
        decode_nonfinite: as for `read_telemetry`.

    Returns:
        The record; None if the line is no whole one.
    """
    try:
        record = load_json(line)
    except ValueError:
        return None
    if not isinstance(record, dict):
        return None
    if decode_nonfinite and (b'"NaN"' in line or b'Infinity"' in line):
        for key in record.keys() - TEXT_FIELDS:
            record[key] = decode_nonfinite_texts(record[key])
    return record


def _check_version(start: dict[str, Any], path: Path) -> None:
    version = start.get("schema_version")
    if type(version) is int and 1 <= version <= SCHEMA_VERSION:
        return
    raise ValueError(
        f"path {str(path)!r} states schema_version {version!r}; this version of foreshock reads "
        f"1 to {SCHEMA_VERSION}, a newer one may read it"
    )
