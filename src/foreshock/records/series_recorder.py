"""Named series of numbers over the steps, written by a thread of their own."""

import atexit
import os
import re
import threading
import time
from collections import deque
from pathlib import Path
from types import TracebackType

from foreshock.records.losses import Losses
from foreshock.records.record_queue import RecordQueue
from foreshock.records.series_file import SeriesFile
from foreshock.records.series_row import SeriesRow, make_row

_SERIES_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}")
_MAX_SERIES = 64
_FIRST_ARRAYS, _LAST_ARRAYS = 1000, 65_536
_PAUSE_S = 0.005
_TIMEOUT_S = 60.0


class SeriesRecorder:
    """Records named series, whose rows are numbers by name, into `out_dir/monitoring`.

    `NAME.jsonl` has a row a line, appended as they come. `NAME.npz` has the same as arrays, and is
    written anew when the series is twice as long as when it was last (from 1000 rows to 65536),
    and by `close`; which also draws `NAME.png`. The most recent rows are in memory too.

    `record` never waits for the disk: a bounded queue, and one thread, which begins with the first
    row. Nothing is raised after construction but for wrong arguments. What cannot be written is
    counted in `dropped_rows` and warned of once in the logger "foreshock", and training goes on.
    Existing files are continued. In a forked child nothing is recorded.

    >>> with SeriesRecorder("runs/first") as series:
    ...     for step in range(100):
    ...         rms = {"layers.0": 1.0, "layers.1": 2.0}
    ...         series.record("activations", step, rms=rms, rms_max=2.0)

    Args:
        out_dir: directory of the run; nothing is created before the first row.
        num_recent: rows of each series that are kept in memory, at least 1.
        capacity: rows of all series together that may wait to be written, at least 1; beyond it
            the oldest give way.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: out_dir is empty, or a number below 1.

    Cost: memory for `num_recent` rows of each series, 8 bytes a number, and curves of at most 16
        names each, whatever the length of the run.
    """

    def __init__(
        self, out_dir: str | os.PathLike[str], *, num_recent: int = 1000, capacity: int = 4096
    ) -> None:
        if not isinstance(out_dir, str | os.PathLike) or isinstance(os.fspath(out_dir), bytes):
            raise TypeError(f"out_dir is a {type(out_dir).__name__}; accepted: a path")
        if not os.fspath(out_dir):
            raise ValueError("out_dir is empty; accepted: the path of a directory")
        self._directory = Path(out_dir) / "monitoring"
        self._num_recent = _checked_count("num_recent", num_recent)
        self._queue: RecordQueue[tuple[str, SeriesRow]] = RecordQueue(
            _checked_count("capacity", capacity)
        )
        self._recent: dict[str, deque[SeriesRow]] = {}
        self._files: dict[str, SeriesFile] = {}
        self._process_id = os.getpid()
        # Reentrant: a signal handler that records may interrupt a record.
        self._lock = threading.RLock()
        self._thread: threading.Thread | None = None
        self._losses = Losses("series", self._directory, "dropped_rows")
        self._is_closed = False

    @property
    def directory(self) -> Path:
        """Where the files are."""
        return self._directory

    @property
    def dropped_rows(self) -> int:
        """How many rows are missing in the files, for whatever reason."""
        return self._losses.num_rows

    def record(self, series: str, step: int, /, **values: object) -> None:
        """Queues one row, stamped with the present time, and returns at once.

        Args:
            series: its name, which is that of its files.
            step: of the training, from 0; may come again after a rollback.
            **values: each a number, finite or not, or a mapping from labels (layers, gates) to
                numbers; up to 1024 numbers in all. They may come and go.

        Raises:
            TypeError: step is no integer, or a value no number.
            ValueError: naming the argument, what came and what is accepted.

        Cost: some three microseconds, and less than one for each number. A tensor costs its
            `.item()`, which waits for the device.
        """
        recent = self._recent.get(series)
        if recent is None:
            recent = self._begin(series)
        row = make_row(step, values)
        if os.getpid() != self._process_id:
            self._losses.add_in_forked_child()
            return
        recent.append(row)
        with self._lock:
            if self._thread is None and not self._is_closed:
                self._start_thread()
            loss = self._queue.put((series, row), is_event=False)
        if loss is not None:
            self._losses.add(1, loss.reason)

    def recent(self, series: str) -> list[dict[str, object]]:
        """The most recent rows of a series, oldest first, each with step, time and its values.

        Args:
            series: its name; of one that has no rows there are none.
        """
        return [row.record() for row in [*self._recent.get(series, ())]]

    def close(self, timeout: float | None = _TIMEOUT_S) -> None:
        """Writes what waits, and the arrays and pictures of all series. Again is harmless.

        Args:
            timeout: how many seconds to wait for the disk at most, None for as long as it takes.
                What is not written by then is given up and counted.

        Cost: one pass over the lines, and some tenths of a second for each panel of a picture.
        """
        if os.getpid() != self._process_id:
            return
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            self._queue.close()
            thread = self._thread
        atexit.unregister(self.close)
        if thread is None:
            return
        if thread.ident is not None:
            thread.join(timeout)
        if thread.is_alive():
            self._give_up(f"the disk did not take the rest within {timeout} s of closing")
            return
        # Not by the thread: to draw, matplotlib changes what all threads share.
        for name, file in self._files.items():
            self._losses.attempt("picture", file.draw, f"{name}: ")

    def __enter__(self) -> "SeriesRecorder":
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _begin(self, series: str) -> deque[SeriesRow]:
        if not isinstance(series, str) or not _SERIES_NAME.fullmatch(series):
            raise ValueError(
                f"series is {series!r}; accepted: up to 64 letters, digits, underscores and "
                "hyphens, no hyphen first"
            )
        if len(self._recent) >= _MAX_SERIES:
            raise ValueError(f"series is {series!r}, one more than {_MAX_SERIES}; accepted: those")
        return self._recent.setdefault(series, deque(maxlen=self._num_recent))

    def _start_thread(self) -> None:
        self._thread = threading.Thread(target=self._run, name="foreshock-series", daemon=True)
        atexit.register(self.close)
        try:
            self._thread.start()
        except RuntimeError as error:  # the system's limit of threads is no reason not to train
            self._give_up(f"its thread could not be started ({error})")

    def _run(self) -> None:
        try:
            while (item := self._queue.take()) is not None:
                self._append(*item)
            for name, file in self._files.items():
                self._losses.attempt("rows", file.sync, f"{name}: ")
                self._losses.attempt("arrays", file.write_arrays, f"{name}: ")
        except BaseException as error:  # whatever ended the thread, nobody may rely on it
            self._give_up(f"its thread died of {error!r}")
        finally:
            for file in self._files.values():
                file.close()

    def _append(self, series: str, row: SeriesRow) -> None:
        try:
            file = self._files.get(series)
            if file is None:
                file = self._files[series] = SeriesFile(self._directory, series)
            file.append(row)
        except Exception as error:  # one row that fails must not end the thread
            self._losses.add(1, f"{series}: {error}")
            return
        if max(_FIRST_ARRAYS, 2 * file.num_in_arrays) <= file.num_rows <= _LAST_ARRAYS:
            # Slept between, so as to leave the interpreter to the training.
            self._losses.attempt(
                "arrays", lambda: file.write_arrays(lambda: time.sleep(_PAUSE_S)), f"{series}: "
            )

    def _give_up(self, reason: str) -> None:
        num_rows = len(self._queue.close_and_empty())
        if num_rows:
            self._losses.add(num_rows, reason)
        else:
            self._losses.tell("arrays and pictures", reason)


def _checked_count(name: str, count: int) -> int:
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(f"{name} is a {type(count).__name__}; accepted: an integer of at least 1")
    if count < 1:
        raise ValueError(f"{name} is {count}; accepted: an integer of at least 1")
    return count
