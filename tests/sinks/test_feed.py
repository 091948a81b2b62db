"""No sink ever stops a training, or makes a step wait."""

from __future__ import annotations

import logging
import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import foreshock as fs
from foreshock import sinks
from foreshock.journal import Journal
from foreshock.records import read_summary, read_telemetry
from foreshock.records.line_file import LineFile
from tests.monitor import training as t
from tests.sinks import story


class Kept:
    """A sink that keeps what it is given."""

    def __init__(self) -> None:
        self.records: list[Any] = []
        self.num_closed = 0

    def write(self, record: Any) -> None:
        self.records.append(record)

    def close(self) -> None:
        self.num_closed += 1


class Broken(Kept):
    def write(self, record: Any) -> None:
        raise ConnectionError("nobody is there")


class Exiting(Kept):
    def write(self, record: Any) -> None:
        raise SystemExit(1)


class Hanging(Kept):
    def __init__(self) -> None:
        super().__init__()
        self.may_go_on = threading.Event()

    def write(self, record: Any) -> None:
        self.may_go_on.wait(60)


class Unclosable(Kept):
    def close(self) -> None:
        raise OSError("not now")


def test_a_sink_gets_what_a_reader_of_telemetry_gets(tmp_path: Path) -> None:
    kept = Kept()
    story.tell(tmp_path, kept)
    start, *read = read_telemetry(tmp_path / "telemetry.jsonl").records
    assert start["event"] == "start"
    assert str(kept.records) == str(read)
    assert math.isnan(kept.records[3]["train_loss"])
    assert kept.records[0]["api_key"] == {"redacted": True}
    assert kept.num_closed == 1


def test_what_one_sink_does_to_a_record_no_other_sees(tmp_path: Path) -> None:
    class Emptying(Kept):
        def write(self, record: Any) -> None:
            record.clear()

    kept = Kept()
    story.tell(tmp_path, Emptying(), kept)
    assert [r["step"] for r in kept.records] == [0, 1, 2, 3, 3, 3, 2, 3]


@pytest.mark.parametrize(
    ("sink", "error", "num_written"),
    [
        (Broken(), "ConnectionError: nobody is there", 0),
        (Exiting(), "SystemExit: 1", 0),
        (Unclosable(), "OSError: not now", story.NUM_RECORDS),
    ],
    ids=lambda case: type(case).__name__ if isinstance(case, Kept) else "",
)
def test_a_sink_that_fails_is_warned_of_once_and_its_losses_are_counted(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    sink: Kept,
    error: str,
    num_written: int,
) -> None:
    kept = Kept()
    with caplog.at_level(logging.WARNING, "foreshock"):
        counted = story.tell(tmp_path, sink, kept)
    assert counted[type(sink).__name__]["error"] == error
    assert counted[type(sink).__name__]["written"] == num_written
    assert counted["Kept"] == {"written": story.NUM_RECORDS, "dropped": 0, "error": None}
    assert sum(type(sink).__name__ in r.message for r in caplog.records) == 1
    assert read_summary(tmp_path / "summary.json")["sinks"] == counted
    assert counted[type(sink).__name__]["dropped"] == story.NUM_RECORDS - num_written


def test_a_sink_that_hangs_holds_up_neither_steps_nor_files_nor_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sinks.SinkFeeds.close, "__defaults__", (0.2,))
    hanging, kept = Hanging(), Kept()
    journal = Journal(tmp_path, {}, [hanging, kept])
    begun = time.monotonic()
    for step in range(10_000):
        journal.record_telemetry(step, train_loss=1.0)
        if step % 1000 == 0:
            journal.flush(10)
    journal.close()
    assert time.monotonic() - begun < 10
    counted = journal.write_summary(1, 1.0, "observe", None)["sinks"]
    hanging.may_go_on.set()
    assert counted["Hanging"]["written"] == 0
    assert counted["Hanging"]["dropped"] == 10_000 - 1  # one is in its hands
    assert "more than 4096 records wait" in counted["Hanging"]["error"]
    assert counted["Kept"]["written"] + counted["Kept"]["dropped"] == 10_000
    assert kept.num_closed == 1
    told = read_telemetry(tmp_path / "telemetry.jsonl").records
    assert len(told) + journal.write_summary(1, 1.0, "observe", None)["dropped_records"] == 10_001


def test_a_full_disk_keeps_nothing_from_the_sinks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LineFile, "append", refuse)
    kept = Kept()
    story.tell(tmp_path, kept)
    assert len(kept.records) == story.NUM_RECORDS


def test_a_training_with_broken_sinks_ends_with_the_same_bits(tmp_path: Path) -> None:
    run = t.make_run(strikes=[t.Strike(6, t.nan_in_weight)])
    guard = fs.Guard(mode="recover", snapshot_interval=4, lr_backoff=1.0)
    given = [Broken(), Exiting(), Kept(), Kept()]
    before = {*threading.enumerate()}
    monitor = fs.Monitor(run.model, run.optimizer, tmp_path, guard, state=run.state, sinks=given)
    t.train(run, monitor)
    summary = monitor.finalize()
    t.assert_same_bits(run, t.train(t.make_run()))
    assert list(summary["sinks"]) == ["Broken", "Exiting", "Kept", "Kept_2"]
    told = [r["event"] for r in given[2].records]
    assert told.count("rollback_success") == 1
    assert summary["sinks"]["Kept_2"]["written"] == len(told)
    assert not [x for x in {*threading.enumerate()} - before if x.name.startswith("foreshock")]


def run_without_torch(script: str, *arguments: object) -> str:
    """In an interpreter of its own; the package's own __init__ would import torch for seconds."""
    prelude = f"""
import os, sys, types
package = types.ModuleType("foreshock")
package.__path__ = [{str(Path(sinks.__file__).parents[1])!r}]
sys.modules["foreshock"] = package
"""
    command = [sys.executable, "-c", prelude + script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_rest_is_handed_over_when_the_interpreter_exits_and_no_child_does_it(
    tmp_path: Path,
) -> None:
    script = """
import threading
from foreshock.records import TelemetryWriter
from foreshock.sinks import SinkFeeds
class Printing:
    def write(self, record): print(record["step"])
    def close(self): print("closed")
feeds = SinkFeeds([Printing()])
writer = TelemetryWriter(sys.argv[1], tell=feeds.put)
feeds.start()

# At the moment of the fork another thread holds the lock of a queue, and will not be copied.
is_held, may_release = threading.Event(), threading.Event()
def hold():
    with feeds._feeds[0]._queue._changed:
        is_held.set()
        may_release.wait()
holder = threading.Thread(target=hold)
holder.start()
is_held.wait()
if os.fork() == 0:
    sys.exit(0)  # an ordinary exit, with all its exit handlers
_, status = os.wait()
assert status == 0, status
may_release.set()
holder.join()
for step in range(3):
    writer.write("telemetry", step)
"""
    told = run_without_torch(script, tmp_path / "telemetry.jsonl")
    assert told.split() == ["0", "1", "2", "closed"]


def test_sinks_import_neither_torch_nor_a_client_until_one_is_made() -> None:
    heavy = ("torch", "tensorboard", "wandb", "mlflow", "prometheus_client", "opentelemetry")
    told = run_without_torch(f"import foreshock.sinks; print({{*{heavy}}} & {{*sys.modules}})")
    assert told == "set()\n"


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (Kept(), "sinks is a Kept; accepted: a list of sinks"),
        ("runs/tb", "sinks is a str; accepted: a list of sinks"),
        ([Kept(), "runs/tb"], r"sinks\[1\] is a str; accepted: an object with write and close"),
        ([Kept], r"sinks\[0\] is a Kept itself; accepted: an object"),
    ],
)
def test_what_is_no_sink_is_named(tmp_path: Path, given: Any, problem: str) -> None:
    run = t.make_run()
    with pytest.raises(TypeError, match=problem):
        fs.Monitor(run.model, run.optimizer, tmp_path, sinks=given)


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [
        ("TensorBoard", "torch.utils.tensorboard", "tensorboard"),
        ("WandB", "wandb", "wandb"),
        ("MLflow", "mlflow", "mlflow"),
        ("Prometheus", "prometheus_client", "prometheus"),
        (
            "OpenTelemetry",
            "opentelemetry.exporter.otlp.proto.http.metric_exporter",
            "opentelemetry",
        ),
    ],
)
def test_a_missing_client_is_answered_with_the_extra_that_brings_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, package: str, extra: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    arguments = ("tb",) if name == "TensorBoard" else ()
    with pytest.raises(ModuleNotFoundError, match=rf"pip install 'foreshock\[{extra}\]'"):
        getattr(sinks, name)(*arguments)
    assert not os.listdir(tmp_path)
