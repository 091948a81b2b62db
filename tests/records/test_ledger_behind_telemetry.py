"""The ledger written by the telemetry's thread: nothing waits for it, and nothing of it is lost."""

import os
import threading
import time

import pytest

from foreshock.records import Ledger, TelemetryWriter, read_ledger, read_telemetry, verify
from foreshock.records.locked_file import LockedFile
from foreshock.records.timestamp import format_utc


@pytest.fixture
def ledger(tmp_path):
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        yield ledger


class StalledDisk:
    """Holds up the ledger's writes; `is_reached` once one of them hangs."""

    def __init__(self, monkeypatch):
        self.is_reached, self.is_released = threading.Event(), threading.Event()
        write = LockedFile.write_synced

        def stalled(file, data, offset):
            self.is_reached.set()
            assert self.is_released.wait(20)
            write(file, data, offset)

        monkeypatch.setattr(LockedFile, "write_synced", stalled)


@pytest.fixture
def stalled_disk(monkeypatch):
    disk = StalledDisk(monkeypatch)
    yield disk
    disk.is_released.set()


def fail_to_write(monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", fail)


def test_both_files_are_written_in_the_order_of_the_calls(tmp_path, ledger):
    with TelemetryWriter(tmp_path / "telemetry.jsonl", ledger=ledger) as writer:
        for step in range(30):
            writer.write("telemetry", step)
            writer.write_to_ledger("update_skipped", step=step)
        assert writer.flush()
        assert verify(ledger.path, head=ledger.head).lines == 30
    assert [r["step"] for r in read_ledger(ledger.path)] == [*range(30)]
    assert len(read_telemetry(tmp_path / "telemetry.jsonl").records) == 31
    assert (writer.dropped_records, ledger.lost_records) == (0, 0)


def test_closing_the_writer_frees_the_ledger(tmp_path, ledger):
    TelemetryWriter(tmp_path / "telemetry.jsonl", ledger=ledger).close()
    with Ledger(ledger.path) as next_one:
        assert next_one.append("forget")["seq"] == 1


def test_a_stalled_disk_holds_up_nobody_and_time_and_values_are_those_of_the_call(
    tmp_path, ledger, stalled_disk
):
    values = [1.0]
    with TelemetryWriter(tmp_path / "telemetry.jsonl", capacity=4, ledger=ledger) as writer:
        begin = time.perf_counter()
        for step in range(100):
            writer.write_to_ledger("update_skipped", step=step, values=values)
            writer.write("telemetry", step)
        values[0] = 2.0
        assert time.perf_counter() - begin < 5  # the disk stalls for longer than that
        assert stalled_disk.is_reached.wait(10)
        time.sleep(0.02)
        after_calls = format_utc(time.time_ns())
        stalled_disk.is_released.set()
    records = read_ledger(ledger.path)
    assert [r["step"] for r in records] == [*range(100)]
    assert all(r["values"] == [1.0] and r["time"] < after_calls for r in records)
    assert ledger.lost_records == 0
    assert writer.dropped_records > 90  # telemetry gave way


def test_losses_of_the_ledger_are_its_own_and_are_warned_of(tmp_path, ledger, monkeypatch, caplog):
    with TelemetryWriter(tmp_path / "telemetry.jsonl", ledger=ledger) as writer:
        with monkeypatch.context() as patch:
            fail_to_write(patch)
            for step in range(3):
                writer.write_to_ledger("update_skipped", step=step)
            assert not writer.flush()
        writer.write_to_ledger("aborted", step=3)
        assert writer.flush()
    assert (writer.dropped_records, ledger.lost_records) == (0, 3)
    assert len(caplog.records) == 1
    assert str(ledger.path) in caplog.text
    assert verify(ledger.path).lines == 1


def test_what_is_given_up_when_closing_or_comes_after_is_counted(tmp_path, ledger, stalled_disk):
    writer = TelemetryWriter(tmp_path / "telemetry.jsonl", ledger=ledger)
    for step in range(3):
        writer.write_to_ledger("update_skipped", step=step)
    assert stalled_disk.is_reached.wait(10)
    writer.write("aborted", 3)
    writer.close(timeout=0.05)
    assert (writer.dropped_records, ledger.lost_records) == (1, 2)
    writer.write_to_ledger("aborted", step=4)
    assert (writer.dropped_records, ledger.lost_records) == (1, 3)


def test_wrong_arguments_are_errors_of_the_call(tmp_path, ledger):
    with TelemetryWriter(tmp_path / "telemetry.jsonl", ledger=ledger) as writer:
        with pytest.raises(ValueError, match=r"fields must not hold \['seq'\]"):
            writer.write_to_ledger("aborted", seq=3)
        with pytest.raises(TypeError, match="event must be text, not int"):
            writer.write_to_ledger(3)


def test_a_writer_without_a_ledger_says_so(tmp_path):
    with (
        TelemetryWriter(tmp_path / "telemetry.jsonl") as writer,
        pytest.raises(RuntimeError, match="a writer that was given a ledger"),
    ):
        writer.write_to_ledger("aborted")
