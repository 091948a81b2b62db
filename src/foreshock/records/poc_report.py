"""The report of a whole run: one JSON file with its history, one table of its summary."""

import csv
import os
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foreshock.records.atomic_file import write_atomically, write_blocks_atomically
from foreshock.records.metrics_row import csv_cell
from foreshock.records.metrics_tally import MetricsTally
from foreshock.records.posix_file import checked_path
from foreshock.records.strict_json import (
    JsonValue,
    decode_nonfinite_texts,
    dump_json,
    load_json,
    to_json_object,
)
from foreshock.records.summary import read_summary
from foreshock.records.timestamp import format_utc

_COLUMNS = ["metric", "statistic", "value"]
_FILES = {
    "metrics_json": "metrics/training_metrics.json",
    "metrics_csv": "metrics/training_metrics.csv",
    "curves_png": "plots/training_curves.png",
    "curves_svg": "plots/training_curves.svg",
}


@dataclass(frozen=True)
class PocReport:
    """What a report says, but for the history.

    Attributes:
        out_dir: directory of the run.
        model_name: as given to the recorder.
        model_config: of the model.
        training_config: of the training.
        final_metrics: measured in the end; None: the last value of each metric.
        summary: of each metric.
        tally: of all rows.
        dropped_records: rows that are missing in the history.
    """

    out_dir: Path
    model_name: str
    model_config: Mapping[str, object]
    training_config: Mapping[str, object]
    final_metrics: Mapping[str, object] | None
    summary: Mapping[str, Mapping[str, float | int | None]]
    tally: MetricsTally
    dropped_records: int


def write_poc_report(report: PocReport, history: Iterable[bytes]) -> Path:
    """Writes the table, and then the report, which names it.

    Args:
        report: what is said.
        history: the JSON text of the array of all records, in pieces.

    Returns:
        The path of the report.

    Raises:
        OSError: one of the files cannot be written; no part of it is there then.

    Cost: one pass over the history; memory for a piece of it.
    """
    folder = report.out_dir / "poc_reports"
    stamp = "".join(mark for mark in format_utc(time.time_ns()) if mark.isalnum())
    table = folder / f"poc_summary_{stamp}.csv"
    final = _final(report)
    write_atomically(table, "".join(line + "\n" for line in _table_lines(report, final)))
    path = folder / f"poc_report_{stamp}.json"
    write_blocks_atomically(path, _report_blocks(report, final, table, history))
    return path


def read_poc_report(
    path: str | os.PathLike[str], *, decode_nonfinite: bool = True
) -> dict[str, Any]:
    """Reads a `poc_report_{timestamp}.json`.

    Args:
        path: the file.
        decode_nonfinite: give the texts "NaN", "Infinity" and "-Infinity" back as floats.

    Returns:
        The report, its history included.

    Raises:
        FileNotFoundError: there is no such file.
        IsADirectoryError: the path is a directory.
        ValueError: the file is not strict JSON, or not one object.
    """
    return read_summary(path, decode_nonfinite=decode_nonfinite)


def read_poc_summary(path: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """Reads a `poc_summary_{timestamp}.csv`.

    Args:
        path: the file.

    Returns:
        By metric and statistic: a number, None for an empty cell, or a text.

    Raises:
        FileNotFoundError: there is no such file.
        IsADirectoryError: the path is a directory.
        ValueError: the file is no such table.
    """
    file = checked_path(path)
    found: dict[str, dict[str, Any]] = {}
    with open(file, encoding="utf-8", newline="") as lines:
        rows = csv.reader(lines, strict=True)
        if next(rows, None) != _COLUMNS:
            raise ValueError(f"path {str(file)!r} must have the columns {', '.join(_COLUMNS)}")
        for metric, statistic, cell in rows:
            found.setdefault(metric, {})[statistic] = _value(cell)
    return found


def _final(report: PocReport) -> dict[str, JsonValue]:
    if report.final_metrics is not None:
        return to_json_object(report.final_metrics)
    return to_json_object({name: found["final"] for name, found in report.summary.items()})


def _table_lines(report: PocReport, final: Mapping[str, JsonValue]) -> Iterator[str]:
    yield ",".join(_COLUMNS)
    for metric, found in report.summary.items():
        for statistic, value in found.items():
            yield ",".join(map(csv_cell, (metric, statistic, value)))
    if report.final_metrics is not None:
        for metric, reported in final.items():
            yield ",".join(map(csv_cell, (metric, "reported", reported)))


def _report_blocks(
    report: PocReport, final: Mapping[str, JsonValue], table: Path, history: Iterable[bytes]
) -> Iterator[bytes]:
    # Nobody can have written this into a configuration.
    place = secrets.token_hex(16)
    tally = report.tally
    now_ns = time.time_ns()
    document = {
        "model_info": {"model_name": report.model_name, "config": report.model_config},
        "training_info": {
            "start": format_utc(tally.first_ns or now_ns),
            "end": format_utc(tally.last_ns or now_ns),
            "total_time_seconds": tally.elapsed_s,
            "total_steps": tally.num_rows,
            "last_step": tally.last_step,
            "dropped_records": report.dropped_records,
            "config": report.training_config,
        },
        "metrics": {"history": place, "final": final, "summary": report.summary},
        "files": _files(report.out_dir, table),
    }
    before, after = dump_json(to_json_object(document), indent=2).split(f'"{place}"')
    yield before.encode()
    yield from history
    yield after.encode() + b"\n"


def _files(out_dir: Path, table: Path) -> dict[str, str]:
    """Relative to the directory of the run, which may be moved; only those that are there."""
    found = {name: path for name, path in _FILES.items() if (out_dir / path).is_file()}
    return {**found, "poc_summary_csv": f"{table.parent.name}/{table.name}"}


def _value(cell: str) -> Any:
    if not cell:
        return None
    try:
        return load_json(cell.encode())
    except ValueError:
        return decode_nonfinite_texts(cell)
