"""`foreshock bench`: the bundled benchmarks, from the sources or from an installed copy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from foreshock import bench, cli

MEASURED = '''"""What nothing costs; see nowhere."""

from benchmarks import rows
from benchmarks.interleave import time_in_turn


def test_nothing(benchmark):
    assert {answer}
    timing = time_in_turn(benchmark, {{"nothing": lambda: None}}, rounds=3)["nothing"]
    rows.store("recorder", "nothing", "cpu", {{"nothing": {{**timing.row(), "median_us": 7.25}}}})
'''


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy as installing makes it, in which a quick benchmark stands for a slow one."""
    copy = tmp_path / "bundled" / "benchmarks"
    shutil.copytree(bench.folder(), copy, ignore=shutil.ignore_patterns("results", "__pycache__"))
    monkeypatch.setattr(bench, "folder", lambda: copy)
    return copy


def typed(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, ["bench", *arguments], env={"COLUMNS": "200"})
    return result.exit_code, result.output


def test_a_copy_runs_by_itself_and_prints_what_it_has_measured(
    installed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (installed / "recorder.py").write_text(MEASURED.format(answer=True))
    status, _ = typed("recorder", "--out-dir", str(tmp_path / "out"))
    assert status == 0
    assert "| nothing | 7.2 |" in capfd.readouterr().out
    (row,) = map(json.loads, (tmp_path / "out/results/recorder.jsonl").read_text().splitlines())
    assert row["variant"] == "nothing"
    assert row["git"].startswith("of version ")


def test_a_benchmark_with_a_wrong_answer_fails(installed: Path, tmp_path: Path) -> None:
    (installed / "recorder.py").write_text(MEASURED.format(answer=False))
    status, _ = typed("recorder", "--out-dir", str(tmp_path / "out"))
    assert status == 1
    assert not (tmp_path / "out/results/recorder.jsonl").exists()


def test_the_list_says_what_each_is_for() -> None:
    status, said = typed("--list")
    assert status == 0
    for name in ("health_scan", "power_iteration", "soft_assign", "rolling_zscore", "overhead"):
        assert name in said
    assert "What watching costs: whole training loops" in said


def test_an_unknown_name_is_answered_with_those_that_are_known() -> None:
    status, said = typed("overhaed")
    assert status == 2
    assert "overhaed" in said
    assert "overhead" in said
