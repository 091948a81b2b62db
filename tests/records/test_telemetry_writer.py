import logging
import math
import re
import threading
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from json_like import is_same, json_like

from foreshock.records import TelemetryWriter, read_telemetry
from foreshock.records.line_file import LineFile


@pytest.fixture
def path(tmp_path):
    return tmp_path / "telemetry.jsonl"


def steps(path):
    return [record["step"] for record in read_telemetry(path).records if "step" in record]


class StalledDisk:
    """Lets no line through until it is told to; `is_reached` once the thread hangs on a line."""

    def __init__(self, monkeypatch):
        self.is_reached = threading.Event()
        self.is_released = threading.Event()
        append = LineFile.append

        def stalled_append(file, line):
            self.is_reached.set()
            assert self.is_released.wait(20)
            append(file, line)

        monkeypatch.setattr(LineFile, "append", stalled_append)


@pytest.fixture
def stalled_disk(monkeypatch):
    disk = StalledDisk(monkeypatch)
    yield disk
    disk.is_released.set()


@pytest.fixture
def stalled_writer(path, stalled_disk):
    """A writer of capacity 4 whose queue is empty, its thread hanging on the start record."""
    with TelemetryWriter(path, capacity=4) as writer:
        assert stalled_disk.is_reached.wait(10)
        yield writer
        stalled_disk.is_released.set()


# What is written


def test_first_line_is_the_start_record(path):
    with TelemetryWriter(path, run_info={"torch": "2.13.0", "rank": 0}):
        pass
    (start,) = read_telemetry(path).records
    time_stamp = start.pop("time")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", time_stamp)
    assert start == {"event": "start", "schema_version": 1, "torch": "2.13.0", "rank": 0}


def test_records_are_written_in_the_order_of_the_calls(path):
    with TelemetryWriter(path) as writer:
        for step in range(500):
            writer.write("telemetry" if step % 7 else "update_skipped", step, loss=step / 2)
        assert writer.dropped_records == 0
    assert steps(path) == list(range(500))
    assert read_telemetry(path).records[-1]["loss"] == 249.5


def test_line_has_the_documented_shape(path):
    with TelemetryWriter(path) as writer:
        writer.write("rollback_success", 156, reason="NONFINITE_WEIGHTS", to_step=140)
    line = path.read_text().splitlines()[1]
    time_stamp = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"
    assert re.fullmatch(
        r'\{"event": "rollback_success", "step": 156, "time": "' + time_stamp + '", '
        r'"reason": "NONFINITE_WEIGHTS", "to_step": 140\}',
        line,
    )


def test_time_is_that_of_the_call_not_of_the_disk(path, stalled_writer, stalled_disk):
    stalled_writer.write("telemetry", 1)
    time.sleep(0.05)
    after_call = time.time()
    time.sleep(0.05)
    stalled_disk.is_released.set()
    stalled_writer.close()
    stamp = read_telemetry(path).records[1]["time"]
    seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(after_call))
    assert stamp < f"{seconds}.{int(after_call % 1 * 1000):03d}Z"


@pytest.mark.parametrize("value", [[1.0], {"a": [1.0]}])
def test_values_are_those_at_the_time_of_the_call(path, stalled_writer, stalled_disk, value):
    inner = value["a"] if isinstance(value, dict) else value
    stalled_writer.write("telemetry", 1, value=value)
    inner[0] = 2.0
    stalled_disk.is_released.set()
    stalled_writer.close()
    assert "[1.0]" in str(read_telemetry(path).records[1]["value"])


@pytest.mark.parametrize("redact", [True, False])
def test_secrets_never_and_long_texts_only_on_demand_reach_the_file(path, redact):
    with TelemetryWriter(path, redact=redact, run_info={"hf_token": "hunter2"}) as writer:
        writer.write("telemetry", 1, api_key="hunter2", text="x" * 300)
        writer.write("telemetry", 2, api_key="hunter2", text=["x" * 300])
    contents = path.read_text()
    assert "hunter2" not in contents
    assert contents.count("x" * 300) == (0 if redact else 2)
    assert contents.count('"length": 300') == (2 if redact else 0)


def test_field_may_be_called_self(path):
    with TelemetryWriter(path) as writer:
        writer.write("telemetry", 1, self=0.5)
    assert read_telemetry(path).records[1]["self"] == 0.5


def test_integers_of_other_libraries_are_steps(path):
    class Step:
        def __index__(self):
            return 3

    with TelemetryWriter(path) as writer:
        writer.write("telemetry", Step())
    assert steps(path) == [3]


@settings(
    deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.dictionaries(st.text("abc", min_size=1), json_like, max_size=4), max_size=5))
def test_whatever_is_written_is_read_back(tmp_path, fields_per_step):
    path = tmp_path / "telemetry.jsonl"
    path.unlink(missing_ok=True)
    with TelemetryWriter(path) as writer:
        for step, fields in enumerate(fields_per_step):
            writer.write("telemetry", step, **fields)
    telemetry = read_telemetry(path)
    assert telemetry.torn_lines == 0
    for record, fields in zip(telemetry.records[1:], fields_per_step, strict=True):
        assert is_same({key: record[key] for key in fields}, fields)


def test_lines_of_many_threads_are_whole(path):
    with TelemetryWriter(path, capacity=100_000) as writer:
        threads = [
            threading.Thread(target=lambda: [writer.write("telemetry", n) for n in range(300)])
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(steps(path)) == sorted([*range(300)] * 8)
    assert read_telemetry(path).torn_lines == 0


# Resuming


def test_resumed_file_is_continued_with_another_start_record(path):
    for run in range(2):
        with TelemetryWriter(path, run_info={"run": run}) as writer:
            writer.write("telemetry", run)
    events = [(record["event"], record.get("run")) for record in read_telemetry(path).records]
    assert events == [("start", 0), ("telemetry", None), ("start", 1), ("telemetry", None)]


def test_resuming_after_a_torn_line_loses_that_line_only(path):
    with TelemetryWriter(path) as writer:
        writer.write("telemetry", 1)
        writer.write("telemetry", 2)
    contents = path.read_bytes()
    path.write_bytes(contents[:-10])
    with TelemetryWriter(path) as writer:
        writer.write("telemetry", 3)
    assert steps(path) == [1, 3]
    assert read_telemetry(path).torn_lines == 1


def test_resuming_after_a_missing_line_break_loses_nothing(path):
    with TelemetryWriter(path) as writer:
        writer.write("telemetry", 1)
    path.write_bytes(path.read_bytes()[:-1])
    with TelemetryWriter(path) as writer:
        writer.write("telemetry", 2)
    assert steps(path) == [1, 2]
    assert read_telemetry(path).torn_lines == 0


# Overflow


def test_write_does_not_wait_for_a_stalled_disk(stalled_writer):
    begin = time.perf_counter()
    for step in range(1000):
        stalled_writer.write("telemetry", step)
        stalled_writer.write("update_skipped", step)
    assert time.perf_counter() - begin < 5  # the disk stalls for longer than that


def test_overflow_drops_the_oldest_telemetry_and_counts_it(
    path, stalled_writer, stalled_disk, caplog
):
    for step in range(10):
        stalled_writer.write("telemetry", step)
    assert stalled_writer.dropped_records == 6
    stalled_disk.is_released.set()
    stalled_writer.close()
    assert steps(path) == [6, 7, 8, 9]
    assert len(caplog.records) == 1


def test_events_are_kept_when_the_queue_is_full(path, stalled_writer, stalled_disk):
    for step in range(4):
        stalled_writer.write("telemetry", step)
    for step in range(10, 13):
        stalled_writer.write("rollback_success", step)
    assert stalled_writer.dropped_records == 3
    for step in range(13, 20):
        stalled_writer.write("aborted", step)
    stalled_writer.write("telemetry", 20)
    assert stalled_writer.dropped_records == 5
    stalled_disk.is_released.set()
    stalled_writer.close()
    assert steps(path) == list(range(10, 20))


# Trouble


def test_full_disk_is_counted_and_warned_of_once(tmp_path, caplog):
    path = tmp_path / "telemetry.jsonl"
    path.symlink_to("/dev/full")
    with TelemetryWriter(path) as writer:
        for step in range(20):
            writer.write("telemetry", step)
        assert not writer.flush()
        writer.write("aborted", 20)
    assert writer.dropped_records == 22  # the start record is one of them
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert caplog.records[0].name == "foreshock"
    assert "No space left on device" in caplog.text
    assert str(path) in caplog.text


def test_disk_that_recovers_is_written_to_again(path, monkeypatch, caplog):
    append = LineFile.append

    def fail(file, line):
        raise OSError(5, "Input/output error")

    with TelemetryWriter(path) as writer:
        assert writer.flush()
        monkeypatch.setattr(LineFile, "append", fail)
        writer.write("telemetry", 1)
        assert not writer.flush()
        monkeypatch.setattr(LineFile, "append", append)
        writer.write("telemetry", 2)
        assert writer.flush()
    assert steps(path) == [2]
    assert writer.dropped_records == 1


def test_failed_sync_is_no_flush_and_is_warned_of(path, monkeypatch, caplog):
    def fail(file):
        raise OSError(5, "Input/output error")

    with TelemetryWriter(path) as writer:
        monkeypatch.setattr(LineFile, "sync", fail)
        assert not writer.flush()
    assert len(caplog.records) == 1


def test_dead_thread_loses_records_but_holds_up_nobody(path, monkeypatch, caplog):
    def die(file, line):
        raise SystemExit

    with TelemetryWriter(path) as writer:
        assert writer.flush()
        monkeypatch.setattr(LineFile, "append", die)
        writer.write("telemetry", 1)
        begin = time.perf_counter()
        assert not writer.flush()
        assert time.perf_counter() - begin < 5
        writer.write("telemetry", 2)
        assert writer.dropped_records == 2
    assert len(caplog.records) == 1
    assert "SystemExit" in caplog.text


def test_thread_that_cannot_start_loses_records_but_raises_nothing(path, monkeypatch, caplog):
    def fail(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)
    with TelemetryWriter(path) as writer:
        writer.write("telemetry", 1)
        assert not writer.flush()
    assert writer.dropped_records == 2
    assert len(caplog.records) == 1


def test_broken_log_handler_raises_nothing(tmp_path):
    class BrokenHandler(logging.Handler):
        def emit(self, record):
            raise RuntimeError("broken")

    path = tmp_path / "telemetry.jsonl"
    path.symlink_to("/dev/full")
    handler = BrokenHandler()
    logging.getLogger("foreshock").addHandler(handler)
    try:
        with TelemetryWriter(path) as writer:
            writer.write("telemetry", 1)
        writer.write("telemetry", 2)
    finally:
        logging.getLogger("foreshock").removeHandler(handler)
    assert writer.dropped_records == 3


# Flushing and closing


def test_flushed_records_are_in_the_file(path):
    with TelemetryWriter(path) as writer:
        for step in range(50):
            writer.write("telemetry", step)
            if step % 10 == 9:
                assert writer.flush()
                assert steps(path) == list(range(step + 1))


def test_flush_gives_up_after_its_timeout(stalled_writer):
    begin = time.perf_counter()
    assert not stalled_writer.flush(timeout=0.05)
    assert time.perf_counter() - begin < 5


def test_write_after_close_is_counted_and_raises_nothing(path, caplog):
    writer = TelemetryWriter(path)
    writer.close()
    writer.close()
    writer.write("aborted", 1)
    assert writer.dropped_records == 1
    assert not writer.flush()
    assert "the writer is closed" in caplog.text


def test_close_gives_up_a_stalled_disk_and_counts_what_waited(
    path, stalled_writer, stalled_disk, caplog
):
    stalled_writer.write("telemetry", 1)
    stalled_writer.write("aborted", 2)
    stalled_writer.close(timeout=0.05)
    assert stalled_writer.dropped_records == 2
    assert len(caplog.records) == 1


def test_no_thread_is_left_after_close(path):
    before = set(threading.enumerate())
    with TelemetryWriter(path) as writer:
        writer.write("telemetry", 1)
        assert set(threading.enumerate()) > before
    assert set(threading.enumerate()) == before


# Arguments


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"capacity": 0}, ValueError, "capacity must be at least 1, not 0"),
        ({"capacity": 1.5}, TypeError, "capacity must be an integer, not float"),
        ({"capacity": True}, TypeError, "capacity must be an integer, not bool"),
        ({"path": ""}, ValueError, "path must name a file, it is empty"),
        ({"path": 3}, TypeError, r"path must be str or os\.PathLike\[str\], not int"),
        ({"path": "."}, IsADirectoryError, "path must name a file, it is a directory"),
        ({"run_info": [1]}, TypeError, "run_info must be a mapping or None, not list"),
        ({"run_info": {"event": 1}}, ValueError, r"run_info must not hold \['event'\]"),
        ({"run_info": {"schema_version": 2}}, ValueError, "schema_version"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_of_the_writer_are_named(tmp_path, arguments, error, message):
    arguments = {"path": tmp_path / "telemetry.jsonl", **arguments}
    with pytest.raises(error, match=message):
        TelemetryWriter(**arguments)
    assert not (tmp_path / "telemetry.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"event": ""}, ValueError, "event must be 1 to 256 printable characters, not ''"),
        ({"event": "a\nb"}, ValueError, "event must be 1 to 256 printable characters"),
        ({"event": "\udc80"}, ValueError, "event must be 1 to 256 printable characters"),
        ({"event": "x" * 257}, ValueError, "event must be 1 to 256 printable characters"),
        ({"event": "start"}, ValueError, 'event must not be "start"'),
        ({"event": 3}, TypeError, "event must be text, not int"),
        ({"step": -1}, ValueError, r"step must be 0 to 2\*\*63 - 1, not -1"),
        ({"step": 2**63}, ValueError, r"step must be 0 to 2\*\*63 - 1"),
        ({"step": 1.0}, TypeError, "step must be an integer, not float"),
        ({"step": True}, TypeError, "step must be an integer, not bool"),
        ({"time": 1.0}, ValueError, 'fields must not hold "time"'),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_of_write_are_named(path, arguments, error, message):
    with TelemetryWriter(path) as writer, pytest.raises(error, match=message):
        writer.write(**{"event": "telemetry", "step": 0, **arguments})


@pytest.mark.parametrize("unusable", ["{tmp_path}/file", "/proc/foreshock"])
def test_path_that_cannot_be_opened_is_an_os_error_that_names_it(tmp_path, unusable):
    (tmp_path / "file").write_text("")
    directory = unusable.format(tmp_path=tmp_path)
    with pytest.raises(OSError, match=directory):
        TelemetryWriter(directory + "/telemetry.jsonl")


def test_largest_and_smallest_floats_survive(path):
    numbers = [math.ulp(0.0), -0.0, 1.7976931348623157e308]
    with TelemetryWriter(path) as writer:
        writer.write("telemetry", 2**63 - 1, numbers=numbers)
    assert str(read_telemetry(path).records[1]["numbers"]) == str(numbers)
