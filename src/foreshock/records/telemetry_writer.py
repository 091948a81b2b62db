"""Writes telemetry.jsonl from a thread of its own, so that no disk ever holds up a step."""

import atexit
import contextlib
import logging
import operator
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from foreshock.records.event_name import check_event_name
from foreshock.records.ledger import Ledger, LedgerEntry
from foreshock.records.line_file import LineFile
from foreshock.records.posix_file import checked_path
from foreshock.records.record_queue import RecordQueue
from foreshock.records.strict_json import (
    JsonValue,
    decode_nonfinite_texts,
    dump_json,
    holds_only_scalars,
    to_json_object,
)
from foreshock.records.telemetry_schema import (
    SCHEMA_VERSION,
    START_EVENT,
    TELEMETRY_EVENT,
    TEXT_FIELDS,
)
from foreshock.records.timestamp import format_utc

_logger = logging.getLogger("foreshock")

_MAX_STEP = 2**63 - 1
_TIMEOUT_S = 10.0


class _Record(NamedTuple):
    time_ns: int
    head: dict[str, JsonValue]
    fields: Mapping[str, object]
    is_encoded: bool


class _FlushMark:
    """Travels through the queue behind the records that a flush waits for."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.is_on_disk = False


_Item: TypeAlias = _Record | LedgerEntry | _FlushMark


class TelemetryWriter:
    """Appends events to a telemetry file without ever making the training loop wait.

    `write` puts a record into a bounded queue; one daemon thread appends it, a single system call
    per line, so that a kill leaves at most one torn line. What cannot be written (queue full, disk
    full, thread dead, writer closed, process forked) is counted in `dropped_records`, and the first
    loss logs one warning to the logger "foreshock"; nothing is raised after construction but for
    arguments that are wrong.

    When `capacity` records wait, the oldest telemetry gives way to what is new. Records of any
    other event are not lost for want of room (only beyond 65536 of them waiting), and are handed to
    the system at once; telemetry may wait for a fifth of a second.

    An existing file is continued. What waits is written when the interpreter exits, if not before.
    In a forked child the writer writes nothing; open another one there.

    Args:
        path: the file; missing parent directories are created.
        capacity: how many records may wait, at least 1.
        redact: replace texts of more than 256 characters by their length and digest. Values under
            keys that name secrets are redacted whatever this says.
        run_info: fields of the start record, such as versions and ranks.
        ledger: what `write_to_ledger` appends to; the writer closes it when it is closed itself.
        tell: called on the thread with each record but the start record, as `read_telemetry` will
            give it, whether or not the disk takes it. It must neither wait nor raise.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: capacity is below 1, path is empty, or run_info holds a reserved name.
        IsADirectoryError: path is a directory.
        OSError: path cannot be opened for appending; the error names it.

    Cost: one thread, which looks for telemetry five times a second.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        capacity: int = 4096,
        redact: bool = True,
        run_info: Mapping[str, object] | None = None,
        ledger: Ledger | None = None,
        tell: Callable[[dict[str, Any]], object] | None = None,
    ) -> None:
        self._path = checked_path(path)
        self._redact = redact
        self._ledger = ledger
        self._tell = tell
        self._queue: RecordQueue[_Item] = RecordQueue(_checked_capacity(capacity))
        start = _start_record(run_info, redact)
        self._file = LineFile(self._path)
        self._process_id = os.getpid()
        self._count_lock = threading.RLock()
        self._num_dropped = 0
        self._has_warned = False
        self._queue.put(start, is_event=True)
        self._thread = threading.Thread(target=self._run, name="foreshock-telemetry", daemon=True)
        self._start_thread()
        atexit.register(self.close)

    @property
    def path(self) -> Path:
        """The file."""
        return self._path

    @property
    def dropped_records(self) -> int:
        """How many records this writer has lost so far, for whatever reason."""
        return self._num_dropped

    def write(self, /, event: str, step: int, **fields: object) -> None:
        """Queues one record, stamped with the present time, and returns at once.

        Args:
            event: "telemetry" for what may be lost when the disk falls behind, any other name
                ("rollback_success") for what should not be.
            step: the training step, from 0.
            **fields: what to record. Values are copied now; how each kind is written is told in
                `foreshock.records.strict_json`.

        Raises:
            TypeError: event is not text, or step not an integer.
            ValueError: event is empty, longer than 256 characters, not printable or "start"; step
                is negative or beyond 63 bits; a field is called "time".

        Cost: some microseconds for a dozen numbers. A tensor on a device costs its `.item()`, which
            waits for the device: pass Python numbers from a training loop.
        """
        _check_event(event)
        head: dict[str, JsonValue] = {"event": event, "step": _checked_step(step)}
        if "time" in fields:
            raise ValueError('fields must not hold "time", which is the time of the call')
        if os.getpid() != self._process_id:
            self._lose_in_forked_child()
            return
        record = _stamp(head, fields, self._redact)
        loss = self._queue.put(record, is_event=event != TELEMETRY_EVENT)
        if loss is not None:
            self._lose(1, loss.reason)

    def write_to_ledger(self, /, event: str, **fields: object) -> None:
        """Queues one record for the ledger, stamped with the present time, and returns at once.

        The thread appends it and syncs it. It waits like an event, and so is not lost for want of
        room; what is lost all the same, the ledger counts (`lost_records`) and warns of.

        Args:
            event: as for `Ledger.append`.
            **fields: as for `Ledger.append`. Values are copied now.

        Raises:
            RuntimeError: the writer was given no ledger.
            TypeError, ValueError: as `Ledger.append` for wrong arguments.

        Cost: as `write`.
        """
        if self._ledger is None:
            raise RuntimeError("write_to_ledger needs a writer that was given a ledger")
        entry = self._ledger.prepare(event, fields)
        if os.getpid() != self._process_id:
            self._lose_in_forked_child()
            return
        loss = self._queue.put(entry, is_event=True)
        if loss is not None:
            (self._ledger.lose if loss.is_item else self._lose)(1, loss.reason)

    def flush(self, timeout: float | None = _TIMEOUT_S) -> bool:
        """Waits until what has been queued is on disk, synced.

        Args:
            timeout: how many seconds to wait at most; None for as long as it takes.

        Returns:
            True if everything queued before the call is on disk; False if the time ran out, a
            record was lost meanwhile, the writer is closed, or this is a forked child.

        Cost: a sync of the file, milliseconds on a real disk. Not for every step.
        """
        if os.getpid() != self._process_id:
            return False
        num_lost_before = self._num_lost()
        mark = _FlushMark()
        if not self._queue.put_mark(mark) or not mark.reached.wait(timeout):
            return False
        return mark.is_on_disk and self._num_lost() == num_lost_before

    def close(self, timeout: float | None = _TIMEOUT_S) -> None:
        """Writes and syncs what is queued, then ends the thread. Again is harmless.

        Args:
            timeout: how many seconds to wait for the disk at most, None for as long as it takes.
                What is not written by then is given up and counted.
        """
        if os.getpid() != self._process_id:
            return
        atexit.unregister(self.close)
        self._queue.close()
        if self._thread.ident is not None:
            self._thread.join(timeout)
        if self._thread.is_alive():
            self._give_up(f"the disk did not take the rest within {timeout} s of closing")

    def __enter__(self) -> "TelemetryWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _start_thread(self) -> None:
        try:
            self._thread.start()
        except RuntimeError as error:  # the system's limit of threads is no reason not to train
            self._give_up(f"its thread could not be started ({error})")
            self._close_files()

    def _run(self) -> None:
        item: _Item | None = None
        try:
            while (item := self._queue.take()) is not None:
                if isinstance(item, _FlushMark):
                    item.is_on_disk = self._sync()
                    item.reached.set()
                elif isinstance(item, LedgerEntry):
                    assert self._ledger is not None
                    self._ledger.write(item)
                else:
                    self._append(item)
            self._sync()
        except BaseException as error:  # whatever ended the thread, nobody may wait for it for ever
            self._give_up(f"its thread died of {error!r}", in_hand=item)
        finally:
            # By the thread itself: nobody else knows when it has stopped using the descriptors.
            self._close_files()

    def _close_files(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()
        if self._ledger is not None:
            self._ledger.close()

    def _append(self, record: _Record) -> None:
        try:
            spelt_out = _spelt_out(record, self._redact)
            if self._tell is not None and record.head["event"] != START_EVENT:
                self._tell(_as_read(spelt_out))
            self._file.append(dump_json(spelt_out).encode())
        except Exception as error:  # one record that fails must not end the thread
            self._lose(1, str(error))

    def _sync(self) -> bool:
        try:
            self._file.sync()
        except OSError as error:
            self._lose(0, str(error))
            return False
        return True

    def _num_lost(self) -> int:
        return self._num_dropped + (0 if self._ledger is None else self._ledger.lost_records)

    def _give_up(self, reason: str, in_hand: _Item | None = None) -> None:
        given_up = self._queue.close_and_empty()
        if in_hand is not None:
            given_up.append(in_hand)
        marks = [item for item in given_up if isinstance(item, _FlushMark)]
        num_entries = sum(isinstance(item, LedgerEntry) for item in given_up)
        self._lose(len(given_up) - len(marks) - num_entries, reason)
        if self._ledger is not None and num_entries:
            self._ledger.lose(num_entries, reason)
        for mark in marks:
            mark.reached.set()

    def _lose(self, num_records: int, reason: str) -> None:
        with self._count_lock:
            self._num_dropped += num_records
            is_first = not self._has_warned
            self._has_warned = True
        if is_first:
            self._warn(reason)

    def _lose_in_forked_child(self) -> None:
        # The lock may have been held by a thread that the fork did not copy: it is never released.
        self._num_dropped += 1
        if not self._has_warned:
            self._has_warned = True
            self._warn("it was opened before a fork, and only the parent may write to it")

    def _warn(self, reason: str) -> None:
        # A broken log handler is one more thing that must not stop training.
        with contextlib.suppress(Exception):
            _logger.warning(
                "telemetry in %s is incomplete: %s. Training goes on; dropped_records counts what "
                "is lost, and this is the only warning.",
                self._path,
                reason,
            )


def _checked_capacity(capacity: int) -> int:
    if isinstance(capacity, bool) or not isinstance(capacity, int):
        raise TypeError(f"capacity must be an integer, not {type(capacity).__name__}")
    if capacity < 1:
        raise ValueError(f"capacity must be at least 1, not {capacity}")
    return capacity


def _check_event(event: str) -> None:
    check_event_name(event)
    if event == START_EVENT:
        raise ValueError(f'event must not be "{START_EVENT}", which the writer itself writes')


def _checked_step(step: int) -> int:
    try:
        number = operator.index(step)
    except TypeError:
        number = None
    if number is None or isinstance(step, bool):
        raise TypeError(f"step must be an integer, not {type(step).__name__}")
    if not 0 <= number <= _MAX_STEP:
        raise ValueError(f"step must be 0 to 2**63 - 1, not {number}")
    return number


def _stamp(head: dict[str, JsonValue], fields: dict[str, object], redact: bool) -> _Record:
    time_ns = time.time_ns()
    # Encoding is left to the thread, except that of what could change before the thread sees it.
    if holds_only_scalars(fields):
        return _Record(time_ns, head, fields, is_encoded=False)
    return _Record(time_ns, head, to_json_object(fields, redact=redact), is_encoded=True)


def _spelt_out(record: _Record, redact: bool) -> dict[str, Any]:
    fields = record.fields
    if not record.is_encoded:
        fields = to_json_object(fields, redact=redact)
    return {**record.head, "time": format_utc(record.time_ns), **fields}


def _as_read(record: dict[str, Any]) -> dict[str, Any]:
    return {k: v if k in TEXT_FIELDS else decode_nonfinite_texts(v) for k, v in record.items()}


def _start_record(run_info: Mapping[str, object] | None, redact: bool) -> _Record:
    head: dict[str, JsonValue] = {"event": START_EVENT, "schema_version": SCHEMA_VERSION}
    if run_info is None:
        run_info = {}
    if not isinstance(run_info, Mapping):
        raise TypeError(f"run_info must be a mapping or None, not {type(run_info).__name__}")
    fields = to_json_object(run_info, redact=redact)
    reserved = sorted({*head, "time"} & fields.keys())
    if reserved:
        raise ValueError(f"run_info must not hold {reserved}, which the writer itself writes")
    return _Record(time.time_ns(), head, fields, is_encoded=True)
