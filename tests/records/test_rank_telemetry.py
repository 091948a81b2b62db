"""The telemetry of many ranks, read as one."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest

from foreshock.records import (
    TelemetryWriter,
    read_rank_telemetry,
    read_telemetry,
    telemetry_writer,
)
from foreshock.records.rank_telemetry import rank_folders


def write(path: Path, *steps: int, **fields: object) -> None:
    writer = TelemetryWriter(path / "telemetry.jsonl")
    for step in steps:
        writer.write("telemetry", step, **fields)
    writer.close()


def test_records_of_all_ranks_come_in_the_order_of_time_with_their_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_millisecond_each = itertools.count(10**18, 10**6)  # two may be written within one
    monkeypatch.setattr(telemetry_writer.time, "time_ns", lambda: next(a_millisecond_each))
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


def test_only_directories_that_a_rank_makes_are_taken_for_those_of_ranks(tmp_path: Path) -> None:
    for name in (
        "rank_00000",
        "rank_1",
        "rank_000001",
        "rank_00003x",
        "rank_\u0661\u0661\u0661\u0661\u0661",
    ):
        write(tmp_path / name, 0)
    for name in ("rank_00002", "rank_123456"):
        (tmp_path / name).mkdir()
    (tmp_path / "rank_00004").touch()
    assert list(rank_folders(tmp_path)) == [2, 123456]
    write(tmp_path, 5)
    assert [r["step"] for r in read_rank_telemetry(tmp_path).records if "step" in r] == [5]
