"""A disk that fills up, a directory that turns read-only: the training ends as if nothing was."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from foreshock.records import read_ledger, read_metrics, read_telemetry

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("starved")
    yield folder
    for directory in [d for d in folder.rglob("*") if d.is_dir()]:
        directory.chmod(0o755)


@pytest.fixture(scope="module")
def found(where: Path) -> Any:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.monitor.starved_run", str(where)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (
        done.stderr.count("Traceback") <= 2
    )  # in either run TensorBoard's own thread says what ended it
    return json.loads(done.stdout)


@pytest.mark.parametrize("how", ["full", "read_only"])
def test_a_training_whose_disk_gives_out_ends_with_the_same_bits(found: Any, how: str) -> None:
    assert found[how]["differing"] == []
    summary = found[how]["summary"]
    assert (summary["total_steps"], summary["guard"]["total_rollbacks"]) == (18, 1)
    assert summary["sinks"]["Prometheus"]["dropped"] == 0


@pytest.mark.parametrize("how", ["full", "read_only"])
def test_of_each_thing_that_is_lost_there_is_one_warning(found: Any, how: str) -> None:
    lost = ["sink TensorBoard", "snapshot not saved", "autopsy", "report missing", "summary.json"]
    if how == "full":
        lost += ["telemetry.jsonl is", "the ledger", "rows missing"]
    for what in lost:
        assert sum(what in warning for warning in found[how]["warnings"]) == 1, what
    assert not found[how]["has_report"]
    assert not found[how]["has_summary"]


def test_what_a_full_disk_did_not_take_is_counted_and_what_it_took_can_be_read(
    found: Any, where: Path
) -> None:
    summary, run = found["full"]["summary"], where / "full"
    telemetry = read_telemetry(run / "telemetry.jsonl")
    num_told = summary["sinks"]["Prometheus"]["written"]
    assert len(telemetry.records) + summary["dropped_records"] == num_told + 1  # the start record
    assert summary["dropped_records"] > 10
    assert telemetry.torn_lines <= 1
    assert len(read_ledger(run / "ledger.jsonl")) + summary["lost_ledger_records"] == 1
    assert summary["sinks"]["TensorBoard"]["dropped"] > 10
    assert summary["guard"]["unsaved_snapshots"] > 0
    assert found["full"]["dropped_metrics"] == 18
    assert read_metrics(run / "metrics" / "training_metrics.json").records == []


def test_files_that_are_open_when_the_directory_turns_read_only_are_written_on(
    found: Any, where: Path
) -> None:
    summary, run = found["read_only"]["summary"], where / "read_only"
    assert (summary["dropped_records"], summary["lost_ledger_records"]) == (0, 0)
    assert len(read_ledger(run / "ledger.jsonl")) == 1
    assert len(read_metrics(run / "metrics" / "training_metrics.json").records) == 18
    assert summary["sinks"]["TensorBoard"]["dropped"] == 1  # that which begins another file
