"""Between the thread that writes telemetry and a sink, which may be slow, broken or dead."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from foreshock.records.record_queue import RecordQueue
from foreshock.sinks.sink import Record, Sink, is_measurement

_log = logging.getLogger("foreshock")

CAPACITY = 4096
TIMEOUT_S = 10.0


class SinkFeed:
    """Hands records to one sink, on a thread of its own; nobody ever waits for it.

    Of a sink that is too slow, or hangs, the oldest measurements are lost first. What it raises
    costs the one record. Losses are counted, and the first is warned of.

    Args:
        name: of the sink, for the summary and the warning.
        sink: closed when the feed is.
    Cost:
        One thread, asleep while there is nothing to hand over.
    """

    def __init__(self, name: str, sink: Sink) -> None:
        self.name = name
        self._sink = sink
        self._queue: RecordQueue[Record] = RecordQueue(CAPACITY)
        self._num_written = 0
        self._num_dropped = 0
        self._error: str | None = None
        # Of two threads that lose something, one warns.
        self._count_lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name=f"foreshock-{name}", daemon=True)

    def start(self) -> None:
        """Begins to hand over."""
        try:
            self._thread.start()
        except RuntimeError as error:  # the system's limit of threads is no reason not to train
            self._give_up(f"its thread could not be started ({error})")

    def put(self, record: Record) -> None:
        """Queues one record, and returns at once."""
        loss = self._queue.put(dict(record), is_event=not is_measurement(record))
        if loss is not None:
            self._lose(1, loss.reason)

    def stop(self) -> None:
        """Takes no more; what waits is still handed over, and then the sink is closed."""
        self._queue.close()

    def close(self, timeout: float = TIMEOUT_S) -> None:
        """As `stop`, and waits for it.

        Args:
            timeout: seconds; what is not handed over by then is given up and counted.
        """
        self.stop()
        if self._thread.ident is not None:
            self._thread.join(max(0.0, timeout))
        if self._thread.is_alive():
            self._give_up("it was not done in time when the run ended")

    def report(self) -> dict[str, Any]:
        """For summary.json: `written`, `dropped`, and the first `error` or None."""
        return {"written": self._num_written, "dropped": self._num_dropped, "error": self._error}

    def _run(self) -> None:
        try:
            while (record := self._queue.take()) is not None:
                self._hand_over(record)
            self._sink.close()
        except BaseException as error:  # of a client that exits, or cannot be closed
            self._give_up(_spelt_out(error))

    def _hand_over(self, record: Record) -> None:
        try:
            self._sink.write(record)
            self._num_written += 1
        except BaseException as error:
            self._lose(1, _spelt_out(error))
            if not isinstance(error, Exception):  # else it must not end the thread
                raise

    def _give_up(self, reason: str) -> None:
        self._lose(len(self._queue.close_and_empty()), reason)

    def _lose(self, num_records: int, reason: str) -> None:
        with self._count_lock:
            self._num_dropped += num_records
            is_first = self._error is None
            self._error = self._error or reason
        if is_first:
            # A broken log handler is one more thing that must not stop training.
            with contextlib.suppress(Exception):
                _log.warning(
                    "sink %s is incomplete: %s. Training goes on; sinks in the summary counts what "
                    "is lost, and this is the only warning.",
                    self.name,
                    reason,
                )


class SinkFeeds:
    """Those of all sinks of a run.

    Args:
        sinks: of which each is given every record.
    Raises:
        TypeError: sinks is no sequence, or holds what is no sink.
    """

    def __init__(self, sinks: Sequence[Sink] = ()) -> None:
        self._feeds = [SinkFeed(name, sink) for name, sink in _named(sinks)]
        self._process_id = os.getpid()
        # Before that of the telemetry writer, and so called after it.
        if self._feeds:
            atexit.register(self.close)

    def start(self) -> None:
        """Begins to hand over."""
        for feed in self._feeds:
            feed.start()

    def put(self, record: Record) -> None:
        """Queues one record for each sink, and returns at once."""
        for feed in self._feeds:
            feed.put(record)

    def close(self, timeout: float = TIMEOUT_S) -> None:
        """Lets all of them finish, and closes the sinks. Again is harmless.

        Args:
            timeout: seconds for all together.
        """
        if os.getpid() != self._process_id:  # a forked child has the queues, and not the threads
            return
        atexit.unregister(self.close)
        deadline = time.monotonic() + timeout
        for feed in self._feeds:
            feed.stop()
        for feed in self._feeds:
            feed.close(deadline - time.monotonic())

    def report(self) -> dict[str, Any]:
        """What `SinkFeed.report` says of each, by name."""
        return {feed.name: feed.report() for feed in self._feeds}


def _named(sinks: Sequence[Sink]) -> list[tuple[str, Sink]]:
    if not isinstance(sinks, list | tuple):
        raise TypeError(f"sinks is a {type(sinks).__name__}; accepted: a list of sinks")
    seen: Counter[str] = Counter()
    named = []
    for i, sink in enumerate(sinks):
        kind = type(sink).__name__
        if isinstance(sink, type) or not isinstance(sink, Sink):
            given = sink.__name__ + " itself" if isinstance(sink, type) else kind
            raise TypeError(f"sinks[{i}] is a {given}; accepted: an object with write and close")
        seen[kind] += 1
        named.append((kind if seen[kind] == 1 else f"{kind}_{seen[kind]}", sink))
    return named


def _spelt_out(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else repr(error)
