"""The history of a run's metrics on disk, and what is said of it in the end."""

import atexit
import functools
import os
import threading
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from foreshock.records.curves_figure import draw_curves
from foreshock.records.losses import Losses
from foreshock.records.metrics_row import (
    Row,
    are_numbers,
    checked_number,
    checked_step,
    is_harmless,
    settled_values,
)
from foreshock.records.metrics_store import MetricsStore
from foreshock.records.metrics_tally import MetricsTally
from foreshock.records.poc_report import PocReport, write_poc_report
from foreshock.records.strict_json import JsonValue

MAX_METRICS = 256
# However long the interval, no more rows than these wait in memory.
_MAX_WAITING = 4096
_MAX_NAME_SETS = 1024


class MetricsRecorder:
    """Records the metrics of a run, row by row, into files that any program reads.

    `out_dir/metrics/training_metrics.json` is an array with one record a line,
    `training_metrics.csv` beside it the same as a table. Every `save_interval` records those that
    are new are appended to both; a kill loses what was not yet saved, and nothing else. Existing
    files are continued, and the seconds of training with them.

    Nothing is raised after construction but for wrong arguments. A disk that is full or read-only,
    a file held by another process: one warning in the logger "foreshock", rows that are missing in
    a file are counted in `dropped_records`, training goes on. For any number of threads. In a
    forked child nothing is recorded.

    >>> with MetricsRecorder("runs/first", "gpt-small") as recorder:
    ...     for step in range(100):
    ...         recorder.record(step, epoch=0, loss=1 / (1 + step), learning_rate=1e-3)
    ...     recorder.plot()

    Args:
        out_dir: directory of the run; it is created if missing.
        model_name: for the picture and the report.
        save_interval: records after which they are saved, at least 1; at most 4096 wait.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: save_interval is below 1, or out_dir or model_name is empty.

    Cost: memory for 256 metrics and 16 curves at most, a few MB, however long the run. Continuing
    a file reads it once, some 10 microseconds a row.
    """

    def __init__(
        self, out_dir: str | os.PathLike[str], model_name: str, save_interval: int = 10
    ) -> None:
        self._out_dir = _checked_out_dir(out_dir)
        self._model_name = _checked_model_name(model_name)
        self._save_interval = min(_checked_interval(save_interval), _MAX_WAITING)
        self._process_id = os.getpid()
        # Reentrant: a signal handler that records may interrupt a record.
        self._lock = threading.RLock()
        self._waiting: list[Row] = []
        self._is_saving = self._is_closed = False
        self._known_names: set[str] = set()
        self._harmless_names: set[tuple[str, ...]] = {()}
        self._losses = Losses("metrics", self._out_dir, "dropped_records")
        self._num_saved = self._num_dropped_values = 0
        self._tally = MetricsTally()
        self._store = MetricsStore(self._out_dir / "metrics", self._tally.take_in)
        if self._store.problem is not None:
            self._losses.tell("rows", self._store.problem)
        self._begun = time.perf_counter() - self._tally.elapsed_s
        # Not kept alive by it: who forgets one without closing it may open another.
        self._at_exit = functools.partial(_close_if_alive, weakref.ref(self))
        atexit.register(self._at_exit)

    @property
    def out_dir(self) -> Path:
        """The directory of the run."""
        return self._out_dir

    @property
    def json_path(self) -> Path:
        """The array of all records."""
        return self._out_dir / "metrics" / "training_metrics.json"

    @property
    def csv_path(self) -> Path:
        """The table of all records."""
        return self._out_dir / "metrics" / "training_metrics.csv"

    @property
    def saved_records(self) -> int:
        """How many records of this recorder are in both files, where a kill leaves them."""
        return self._num_saved

    @property
    def dropped_records(self) -> int:
        """How many are missing in one of the files or in both, for whatever reason."""
        return self._losses.num_rows

    @property
    def dropped_values(self) -> int:
        """How many values were left out because there were 256 other names before theirs."""
        return self._num_dropped_values

    def record(
        self,
        /,
        step: int,
        epoch: float,
        loss: float,
        learning_rate: float,
        **optional: object,
    ) -> None:
        """Records one step.

        Args:
            step: of the training, from 0; may come again after a rollback.
            epoch: a number, whole or not.
            loss: a number, which may be NaN or infinite.
            learning_rate: a number.
            **optional: any more: pet_loss, so8t_loss, accuracy, perplexity, grad_norm. Those that
                are numbers have statistics. Anything else is written as strict JSON; what stands
                under the name of a secret, and texts of more than 256 characters, are not.

        Raises:
            TypeError: step is no integer; epoch, loss or learning_rate is no number.
            ValueError: step is negative or beyond 63 bits; optional holds "timestamp" or
                "elapsed_time_seconds", which are added here.

        Cost: two microseconds for Python numbers, and every `save_interval` records some ten for
            each of them. A tensor costs its `.item()`, which waits for the device.
        """
        if os.getpid() != self._process_id:
            self._losses.add_in_forked_child()
            return
        names: tuple[str, ...] = (*optional,)
        values = (step, epoch, loss, learning_rate, *optional.values())
        is_plain = are_numbers(values) and 0 <= step < 2**63 and type(step) is int
        if not is_plain or names not in self._harmless_names:
            head = (
                checked_step(step),
                checked_number("epoch", epoch),
                checked_number("loss", loss),
                checked_number("learning_rate", learning_rate),
            )
            settled = self._settle(optional)
            names, values = (*settled,), (*head, *settled.values())
            is_plain = are_numbers(values)
        elapsed_s = round(time.perf_counter() - self._begun, 6)
        row = Row(names, cast("tuple[JsonValue, ...]", values), is_plain, time.time_ns(), elapsed_s)
        with self._lock:
            if self._is_closed:
                self._losses.add(1, "the recorder is closed")
                return
            self._waiting.append(row)
            if len(self._waiting) >= self._save_interval:
                self._save()

    def save(self) -> None:
        """Writes what waits to be saved, without waiting for the interval."""
        if os.getpid() == self._process_id:
            with self._lock:
                self._save()

    def summary(self) -> dict[str, dict[str, float | int | None]]:
        """The statistics of each metric, over all rows in the files and those not yet there.

        Returns:
            By name: "min", "max", "mean" and "std" (of the population) of the finite values, None
            where there are none; "final", the last value, finite or not; "count" of finite values,
            "nonfinite" of others.
        """
        with self._lock:
            self.save()
            return {name: found.summary() for name, found in self._tally.statistics.items()}

    def plot(self) -> Path | None:
        """Draws losses, learning rate, accuracy, perplexity: `plots/training_curves.png`, `.svg`.

        Beyond 2048 steps a curve is the mean over equal intervals of steps, in a band from the
        smallest to the largest value of each: no spike is lost.

        Returns:
            The PNG's path; None if it could not be made: without matplotlib (install
            `foreshock[plots]`) or room on the disk there is one warning and no picture.

        Cost: about a second, however many rows there are.
        """
        path = self._out_dir / "plots" / "training_curves.png"
        with self._lock:
            self.save()
            num_rows = self._tally.num_rows
            curves = {name: curve.copy() for name, curve in self._tally.curves.items()}
        return self._losses.attempt(
            "picture", lambda: draw_curves(path, self._model_name, num_rows, curves)
        )

    def poc_report(
        self,
        model_config: Mapping[str, object],
        training_config: Mapping[str, object],
        final_metrics: Mapping[str, object] | None = None,
    ) -> Path | None:
        """Writes a report of the whole run, with its history, and its summary as a table.

        `poc_reports/poc_report_{timestamp}.json` has `model_info`, `training_info` (with start,
        end, total_time_seconds, total_steps), `metrics` (history, final, summary) and `files`;
        `poc_summary_{timestamp}.csv` has the columns metric, statistic, value.

        Args:
            model_config: of the model; secrets and long texts are not written.
            training_config: of the training; likewise.
            final_metrics: what was measured in the end, such as a test's accuracy; None: the last
                value of each metric.

        Returns:
            The path of the JSON file; None if it could not be written, which is warned of once.

        Raises:
            TypeError: an argument is no mapping.

        Cost: copies the history from disk to disk; memory does not grow with it.
        """
        _check_mapping("model_config", model_config)
        _check_mapping("training_config", training_config)
        if final_metrics is not None:
            _check_mapping("final_metrics", final_metrics)
        with self._lock:
            report = PocReport(
                self._out_dir,
                self._model_name,
                model_config,
                training_config,
                final_metrics,
                summary=self.summary(),
                tally=self._tally,
                dropped_records=self._losses.num_rows,
            )
            return self._losses.attempt(
                "report", lambda: write_poc_report(report, self._store.history())
            )

    def close(self) -> None:
        """Saves and syncs what was recorded, and ends recording. Again is harmless."""
        if os.getpid() != self._process_id:
            return
        atexit.unregister(self._at_exit)
        with self._lock:
            if self._is_closed:
                return
            self._save()
            self._is_closed = True
            problem = self._store.close()
            if problem is not None:
                self._losses.tell("rows", problem)

    def __enter__(self) -> "MetricsRecorder":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_at_exit"):
            self.close()

    def _settle(self, optional: Mapping[str, object]) -> dict[str, JsonValue]:
        settled = settled_values(optional)
        with self._lock:
            for name in [*settled]:
                if name in self._known_names:
                    continue
                if len(self._known_names) < MAX_METRICS:
                    self._known_names.add(name)
                else:
                    del settled[name]
                    self._num_dropped_values += 1
                    self._losses.tell("values", f"there are more than {MAX_METRICS} names")
            names = (*optional,)
            if names == (*settled,) and all(map(is_harmless, names)):
                if len(self._harmless_names) >= _MAX_NAME_SETS:
                    self._harmless_names = set()
                self._harmless_names.add(names)
        return settled

    def _save(self) -> None:
        if self._is_saving:  # by whom a signal handler has interrupted
            return
        self._is_saving = True
        try:
            while self._waiting:
                rows, self._waiting = self._waiting, []
                try:
                    problem = self._store.append(rows)
                except BaseException:
                    self._waiting[:0] = rows
                    raise
                if problem is None:
                    self._num_saved += len(rows)
                else:
                    self._losses.add(len(rows), problem)
                self._tally.take_in(rows)
        finally:
            self._is_saving = False


def _close_if_alive(recorder: "weakref.ref[MetricsRecorder]") -> None:
    alive = recorder()
    if alive is not None:
        alive.close()


def _checked_out_dir(out_dir: str | os.PathLike[str]) -> Path:
    if not isinstance(out_dir, str | os.PathLike) or isinstance(os.fspath(out_dir), bytes):
        kind = type(out_dir).__name__
        raise TypeError(f"out_dir must be str or os.PathLike[str], not {kind}")
    if not os.fspath(out_dir):
        raise ValueError("out_dir must name a directory, it is empty")
    return Path(out_dir)


def _checked_model_name(model_name: str) -> str:
    if not isinstance(model_name, str):
        raise TypeError(f"model_name must be text, not {type(model_name).__name__}")
    if not model_name:
        raise ValueError("model_name must name the model, it is empty")
    return model_name


def _checked_interval(save_interval: int) -> int:
    if isinstance(save_interval, bool) or not isinstance(save_interval, int):
        raise TypeError(f"save_interval must be an integer, not {type(save_interval).__name__}")
    if save_interval < 1:
        raise ValueError(f"save_interval must be at least 1, not {save_interval}")
    return save_interval


def _check_mapping(name: str, given: object) -> None:
    if not isinstance(given, Mapping):
        raise TypeError(f"{name} must be a mapping, not {type(given).__name__}")
