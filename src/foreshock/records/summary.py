"""summary.json: how a run ended, or stands."""

import os
from collections.abc import Mapping
from typing import Any

from foreshock.records.atomic_file import write_atomically
from foreshock.records.posix_file import checked_path
from foreshock.records.strict_json import (
    decode_nonfinite_texts,
    dump_json,
    load_json,
    to_json_object,
)


def write_summary(
    path: str | os.PathLike[str], summary: Mapping[str, object], *, redact: bool = True
) -> None:
    """Writes the summary of a run, atomically, as strict and indented JSON.

    Args:
        path: the file, usually `summary.json` in the run's directory.
        summary: any mapping; `strict_json` says how each kind of value is written.
        redact: replace texts of more than 256 characters by their length and digest. Values under
            keys that name secrets are redacted whatever this says.

    Raises:
        TypeError: the summary is not a mapping.
        OSError: the file cannot be written; an older summary is then untouched.

    Cost: as `write_atomically`.
    """
    if not isinstance(summary, Mapping):
        raise TypeError(f"summary must be a mapping, not {type(summary).__name__}")
    write_atomically(path, dump_json(to_json_object(summary, redact=redact), indent=2) + "\n")


def read_summary(path: str | os.PathLike[str], *, decode_nonfinite: bool = True) -> dict[str, Any]:
    """Reads what `write_summary` wrote.

    Args:
        path: the file.
        decode_nonfinite: give the texts "NaN", "Infinity" and "-Infinity" back as floats.

    Returns:
        The summary.

    Raises:
        FileNotFoundError: there is no such file.
        IsADirectoryError: the path is a directory.
        ValueError: the file is not strict JSON, or not one object.
    """
    file = checked_path(path)
    try:
        summary = load_json(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"path {str(file)!r} does not hold strict JSON: {error}") from error
    if not isinstance(summary, dict):
        kind = type(summary).__name__
        raise ValueError(f"path {str(file)!r} must hold one JSON object, it holds a {kind}")
    return {
        key: decode_nonfinite_texts(value) if decode_nonfinite else value
        for key, value in summary.items()
    }
