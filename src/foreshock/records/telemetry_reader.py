"""Reads telemetry.jsonl, whatever a kill left of it."""

import os
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
    file_path = checked_path(path)
    records: list[dict[str, Any]] = []
    schema_version = 0
    torn_lines = 0
    with open(file_path, "rb") as file:
        for line in file:
            if line.isspace():
                continue
            record = _parse_record(line, decode_nonfinite)
            if record is None:
                torn_lines += 1
                continue
            if record.get("event") == START_EVENT:
                schema_version = max(schema_version, _known_version(record, file_path))
            records.append(record)
    return Telemetry(records, schema_version, torn_lines)


def _parse_record(line: bytes, decode_nonfinite: bool) -> dict[str, Any] | None:
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


def _known_version(start: dict[str, Any], path: Path) -> int:
    version = start.get("schema_version")
    if type(version) is int and 1 <= version <= SCHEMA_VERSION:
        return version
    raise ValueError(
        f"path {str(path)!r} states schema_version {version!r}; this version of foreshock reads "
        f"1 to {SCHEMA_VERSION}, a newer one may read it"
    )
