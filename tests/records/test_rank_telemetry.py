"""The telemetry of many ranks, read as one."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from foreshock.records import TelemetryWriter, read_rank_telemetry, read_telemetry


def write(path: Path, *steps: int, **fields: object) -> None:
    writer = TelemetryWriter(path / "telemetry.jsonl")
    for step in steps:
        writer.write("telemetry", step, **fields)
    writer.close()


def test_records_of_all_ranks_come_in_the_order_of_time_with_their_rank(tmp_path: Path) -> None:
    write(tmp_path, 0)
    write(tmp_path / "rank_00001", 1, train_loss=math.nan)
    write(tmp_path / "rank_00012", 2)
    write(tmp_path, 3)
    (tmp_path / "rank_00002").mkdir()  # keeps none
    read = read_rank_telemetry(tmp_path)
    told = [(r["rank"], r["step"]) for r in read.records if r["event"] == "telemetry"]
    assert told == [(0, 0), (1, 1), (12, 2), (0, 3)]
    (loss,) = [r["train_loss"] for r in read.records if "train_loss" in r]
    assert math.isnan(loss)


def test_of_one_rank_it_is_what_read_telemetry_reads(tmp_path: Path) -> None:
    write(tmp_path, 0, 10)
    alone = read_telemetry(tmp_path / "telemetry.jsonl")
    read = read_rank_telemetry(tmp_path)
    assert [{k: v for k, v in r.items() if k != "rank"} for r in read.records] == alone.records
    assert (read.schema_version, read.torn_lines) == (alone.schema_version, 0)


def test_torn_lines_of_all_files_are_counted(tmp_path: Path) -> None:
    write(tmp_path, 0)
    write(tmp_path / "rank_00001", 0)
    for folder in (tmp_path, tmp_path / "rank_00001"):
        with (folder / "telemetry.jsonl").open("a") as file:
            file.write('{"event": "tele')
    assert read_rank_telemetry(tmp_path).torn_lines == 2


def test_a_directory_without_telemetry_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_rank_telemetry(tmp_path)
