"""What recording metrics costs: a record, a save, a picture; see docs/metrics.md.

Beside ours, what is written by hand: the whole history dumped at every save, and a CSV row flushed
at every record.
"""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import pytest

from benchmarks import rows
from benchmarks.interleave import time_in_turn
from foreshock.records import MetricsRecorder, read_metrics

NUMBERS = {"pet_loss": 0.125, "grad_norm": 1.0 / 3.0, "accuracy": 0.75, "perplexity": 12.182493}
CALLS = 1000
SAVE_INTERVAL = 10
FILLED = [0, 100_000]
PICTURED = [100, 1_000_000]


def record(recorder: MetricsRecorder, step: int) -> None:
    recorder.record(step, step // 1000, 2.5 / (1 + step), 1e-3, **NUMBERS)


def filled(folder: Path, num_rows: int, save_interval: int) -> MetricsRecorder:
    recorder = MetricsRecorder(folder, "benchmark", save_interval)
    for step in range(num_rows):
        record(recorder, step)
    recorder.save()
    assert recorder.saved_records == num_rows
    return recorder


def many_records(recorder: MetricsRecorder, steps: Iterator[int]) -> Callable[[], None]:
    def call() -> None:
        for step in itertools.islice(steps, CALLS):
            record(recorder, step)

    return call


def rows_flushed_one_by_one(file: TextIO, steps: Iterator[int]) -> Callable[[], None]:
    writer = csv.writer(file)

    def call() -> None:
        for step in itertools.islice(steps, CALLS):
            writer.writerow([step, step // 1000, 2.5 / (1 + step), 1e-3, *NUMBERS.values()])
            file.flush()

    return call


@pytest.mark.parametrize("num_rows", FILLED)
def test_record(benchmark: Any, tmp_path: Path, num_rows: int) -> None:
    steps = itertools.count(num_rows)
    recorders = {
        f"record, saved every {interval}": filled(tmp_path / str(interval), num_rows, interval)
        for interval in (SAVE_INTERVAL, 100)
    }
    variants = {name: many_records(recorder, steps) for name, recorder in recorders.items()}
    with open(tmp_path / "rows.csv", "w", newline="") as file:
        variants["csv row and flush"] = rows_flushed_one_by_one(file, steps)
        timings = time_in_turn(benchmark, variants, rounds=15)
    for recorder in recorders.values():
        recorder.close()
        assert recorder.dropped_records == 0
        assert len(read_metrics(recorder.json_path).records) == recorder.saved_records
    case = f"one record of 8 numbers behind {num_rows} others"
    store_per(case, timings, 1e3 / CALLS)


@pytest.mark.parametrize("num_rows", FILLED)
def test_save(benchmark: Any, tmp_path: Path, num_rows: int) -> None:
    steps = itertools.count(num_rows)
    recorder = filled(tmp_path / "ours", num_rows, 1000)
    history = [{"step": step, "loss": 2.5 / (1 + step), **NUMBERS} for step in range(num_rows)]
    path = tmp_path / "whole.json"

    def save() -> None:
        for step in itertools.islice(steps, SAVE_INTERVAL):
            record(recorder, step)
        recorder.save()

    def dump_history() -> None:
        new = itertools.islice(steps, SAVE_INTERVAL)
        history.extend({"step": step, "loss": 2.5 / (1 + step), **NUMBERS} for step in new)
        path.write_text(json.dumps(history))

    variants = {"save": save, "json.dumps of the history": dump_history}
    timings = time_in_turn(benchmark, variants, rounds=31, slow={"json.dumps of the history": 5})
    recorder.close()
    assert recorder.dropped_records == 0
    store_per(f"{SAVE_INTERVAL} records and a save behind {num_rows} others", timings, 1e3)


@pytest.mark.parametrize("num_rows", PICTURED)
def test_picture(benchmark: Any, tmp_path: Path, num_rows: int) -> None:
    recorder = filled(tmp_path, num_rows, 4096)
    assert recorder.plot() is not None
    timings = time_in_turn(benchmark, {"PNG and SVG": recorder.plot}, rounds=5)
    recorder.close()
    store_per(f"picture of {num_rows} records", timings, 1e3)


def store_per(case: str, timings: dict[str, Any], us_per_ms: float) -> None:
    """Stores microseconds, of one record or of one call."""
    found = {
        name: {**timing.row(), "median_us": us_per_ms * timing.median_ms}
        for name, timing in timings.items()
    }
    rows.store("recorder", case, "cpu", found)
