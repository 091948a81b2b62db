"""What happens to a run, written down as it happens, in the files of its directory."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from foreshock.guard import (
    Aborted,
    AnomalySeen,
    Cause,
    Event,
    GateAtRisk,
    Offender,
    Reason,
    Recovered,
    Response,
    Resumed,
    RiskAnswered,
    RiskLevelChanged,
    RolledBack,
    SnapshotDropped,
    SnapshotNotSaved,
    SnapshotSaved,
    StepExamined,
    StragglerSeen,
    UpdateSkipped,
)
from foreshock.records import (
    Ledger,
    SeriesRecorder,
    TelemetryWriter,
    write_atomically,
    write_autopsy,
    write_summary,
)
from foreshock.records.strict_json import dump_json, to_json_object
from foreshock.sinks import Sink, SinkFeeds

_log = logging.getLogger("foreshock")

_EVENT_NAMES: dict[type, str] = {
    UpdateSkipped: "update_skipped",
    AnomalySeen: "anomaly_seen",
    RolledBack: "rollback_success",
    Recovered: "recovered",
    SnapshotDropped: "snapshot_dropped",
    SnapshotSaved: "snapshot_saved",
    SnapshotNotSaved: "snapshot_not_saved",
    Resumed: "resumed",
    Aborted: "aborted",
    RiskLevelChanged: "risk_level_changed",
    StepExamined: "autopsy",
    GateAtRisk: "gate_at_risk",
    StragglerSeen: "straggler_seen",
}
_RESPONSE_NAMES = {
    (Response.TAKE_SNAPSHOT, True): "snapshot_requested",
    (Response.LOWER_LEARNING_RATE, True): "learning_rate_lowered",
    (Response.TAKE_SNAPSHOT, False): "would_take_snapshot",
    (Response.LOWER_LEARNING_RATE, False): "would_lower_learning_rate",
    (Response.ROLL_BACK, False): "would_roll_back",
}
_MAX_WARNINGS: dict[type, int] = {SnapshotNotSaved: 1}
_MAX_WARNINGS_OF_A_KIND = 10
_OF_ONE_RANK = (SnapshotDropped, SnapshotNotSaved)


class Journal:
    """Keeps count of events and of the monitor's own time, and writes them to a run's directory.

    Args:
        out_dir: the run's directory; made if it is not there.
        config: the resolved configuration, for config.json.
        sinks: which are given what telemetry.jsonl is given; closed with the journal.
        is_written: whether anything is written to files, or told to sinks.
        rank: of many, in whose process this is; but for the first they say on the console only what
            no other rank knows.
    Raises:
        TypeError: out_dir is no path; sinks holds what is no sink.
        OSError: out_dir cannot be written to; says so.
    Cost:
        A thread, one more for each sink, and another one once there is a series, asleep while
        there is nothing to write. Nothing after construction waits for the disk but `close` and
        `write_summary`, or for a sink but `close`, and nothing raises because of them.
    """

    def __init__(
        self,
        out_dir: str | os.PathLike[str],
        config: Mapping[str, Any],
        sinks: Sequence[Sink] = (),
        *,
        is_written: bool = True,
        rank: int = 0,
    ) -> None:
        if not isinstance(out_dir, str | os.PathLike) or not os.fspath(out_dir):
            raise TypeError(f"out_dir is {out_dir!r}; accepted: the path of a directory")
        self.out_dir = Path(out_dir)
        """The run's directory."""
        self._rank = rank
        self._sinks = SinkFeeds(sinks)
        self._ledger: Ledger | None = None
        self._telemetry: TelemetryWriter | None = None
        self._series: SeriesRecorder | None = None
        if is_written:
            self._open_files(config)
        self._counts: Counter[type] = Counter()
        self._num_unledgered = 0
        self._abort: dict[str, Any] | None = None
        self._autopsies: Counter[Cause] = Counter()
        self._resumed_from_step: int | None = None
        self._started: float | None = None
        self._own_seconds = 0.0
        self.steps_run = 0
        """Steps judged, those run again counted again."""
        self.latest: dict[str, object] = {}
        """What `record_telemetry` has written last."""

    def _open_files(self, config: Mapping[str, Any]) -> None:
        try:
            self.out_dir.mkdir(parents=True, exist_ok=True)
            write_atomically(self.out_dir / "config.json", dump_json(to_json_object(config)))
            self._ledger = self._open_ledger()
            path = self.out_dir / "telemetry.jsonl"
            self._telemetry = TelemetryWriter(path, ledger=self._ledger, tell=self._sinks.put)
        except OSError as error:
            # The class of the error follows from its number.
            why = f"out_dir cannot be written to ({error.strerror}); accepted: a directory that can"
            raise OSError(error.errno, why, str(self.out_dir)) from error
        self._series = SeriesRecorder(self.out_dir)
        self._sinks.start()

    @property
    def _dropped_records(self) -> int:
        telemetry = 0 if self._telemetry is None else self._telemetry.dropped_records
        return telemetry + (0 if self._series is None else self._series.dropped_rows)

    # ---- time

    def begin(self) -> float:
        """Starts to count time as the monitor's own; give what comes to `end`."""
        now = time.perf_counter()
        if self._started is None:
            self._started = now
        return now

    def end(self, begun: float) -> None:
        """Stops to count it."""
        self._own_seconds += time.perf_counter() - begun

    @property
    def mean_overhead_ms(self) -> float:
        """The monitor's own time per step."""
        return 1e3 * self._own_seconds / max(1, self.steps_run)

    # ---- events

    def record(self, event: Event) -> None:
        """Counts an event, writes it down, and says it on the console."""
        kind = type(event)
        self._counts[kind] += 1
        said = self._autopsied(event) if isinstance(event, StepExamined) else _spelt_out(event)
        if isinstance(event, Aborted):
            self._abort = {"step": event.step, **said}
        name = _name(event)
        if self._telemetry is not None:
            self._telemetry.write(name, event.step, **said)
        if _belongs_in_ledger(event):
            self._write_to_ledger(name, event.step, said)
        if isinstance(event, RolledBack) and event.lr_factor != 1:
            self._write_to_ledger("lr_changed", event.step, {"lr_factor": event.lr_factor})
        if isinstance(event, Resumed):
            self._resumed_from_step = event.step
        if self._rank == 0 or isinstance(event, _OF_ONE_RANK):
            self._say(event)

    def _say(self, event: Event) -> None:
        kind = type(event)
        where = f"rank {self._rank}, " if self._rank else ""
        limit = _MAX_WARNINGS.get(kind, _MAX_WARNINGS_OF_A_KIND)
        if isinstance(event, SnapshotSaved):
            _log.debug("step %d: %s", event.step, _sentence(event))
        elif isinstance(event, Recovered | RiskLevelChanged | Resumed):
            _log.info("step %d: %s", event.step, _sentence(event))
        elif self._counts[kind] <= limit:
            is_last = self._counts[kind] == limit
            more = "; further ones only in telemetry.jsonl" if is_last else ""
            _log.warning("%sstep %d: %s%s", where, event.step, _sentence(event), more)

    def _autopsied(self, event: StepExamined) -> dict[str, Any]:
        """Writes all of an autopsy to its file; what of it goes to telemetry."""
        self._autopsies[event.cause] += 1
        file: str | None = None
        try:
            if self._telemetry is not None or self._knows_best(event):
                file = str(write_autopsy(self.out_dir, event.step, str(event), event))
        except OSError as error:
            _log.warning("the autopsy of step %d could not be written: %s", event.step, error)
        return {
            "cause": event.cause.value,
            "sentence": str(event),
            "place": None if event.place is None else event.place.kind,
            "name": None if event.place is None else event.place.name,
            "batch": None if event.batch is None else event.batch.index,
            "batch_hash": None if event.batch is None else event.batch.hash,
            "file": file,
        }

    def _knows_best(self, event: StepExamined) -> bool:
        """Whether it was on this rank, of those that keep no records, that the step went bad."""
        offender = None if event.again is None else event.again.offender
        return self._rank > 0 and offender is not None and offender.ranks == (self._rank,)

    def record_telemetry(self, step: int, **measured: object) -> None:
        """Writes down what was measured at a step."""
        measured["overhead_ms"] = self.mean_overhead_ms
        self.latest = {"step": step, **measured}
        if self._telemetry is not None:
            self._telemetry.write("telemetry", step, **measured)

    def record_series(self, series: str, step: int, /, **values: object) -> None:
        """Writes down a row of a series; see `foreshock.records.SeriesRecorder`."""
        if self._series is not None:
            self._series.record(series, step, **values)

    def flush(self, timeout: float) -> None:
        """Waits until what was recorded is on disk, but no longer than this many seconds."""
        if self._telemetry is not None:
            self._telemetry.flush(timeout)

    def _open_ledger(self) -> Ledger | None:
        try:
            return Ledger(self.out_dir / "ledger.jsonl")
        except (OSError, ValueError) as error:  # held by another run, or broken: to be left alone
            _log.warning(
                "ledger.jsonl is not written: %s. Training goes on; lost_ledger_records in the "
                "summary counts what is missing.",
                error,
            )
            return None

    def _write_to_ledger(self, event: str, step: int, evidence: dict[str, Any]) -> None:
        if self._telemetry is None:
            return
        if self._ledger is None:
            self._num_unledgered += 1
            return
        self._telemetry.write_to_ledger(
            event, policy="guard", operator="auto", scope={"step": step}, evidence=evidence
        )

    # ---- the end

    def close(self) -> None:
        """Ends telemetry.jsonl, ledger.jsonl and the series, and closes the sinks."""
        if self._telemetry is not None:
            self._telemetry.close()
        if self._series is not None:
            self._series.close()
        self._sinks.close()

    def write_summary(
        self,
        total_steps: int,
        final_loss: float | None,
        mode: str,
        spectral: Mapping[str, Any] | None,
    ) -> dict[str, Any]:
        """Writes summary.json; a disk that does not take it is only warned of.

        Returns:
            What it says.
        """
        summary = {
            "total_steps": total_steps,
            "final_loss": final_loss,
            "guard": self._guard_summary(mode),
            "spectral": None if spectral is None else dict(spectral),
            "overhead": self._overhead(),
            "ledger_head": None if self._ledger is None else self._ledger.head,
            "dropped_records": self._dropped_records,
            "lost_ledger_records": (
                self._num_unledgered if self._ledger is None else self._ledger.lost_records
            ),
            "sinks": self._sinks.report(),
        }
        try:
            if self._telemetry is not None:
                write_summary(self.out_dir / "summary.json", summary)
        except OSError as error:
            _log.warning("summary.json could not be written: %s", error)
        return summary

    @property
    def counts(self) -> dict[str, int]:
        """How often what has happened so far, as `guard` in summary.json names it."""
        return {
            "total_rollbacks": self._counts[RolledBack],
            "total_recoveries": self._counts[Recovered],
            "skipped_steps": self._counts[UpdateSkipped],
            "anomalies_seen": self._counts[AnomalySeen],
        }

    def _guard_summary(self, mode: str) -> dict[str, Any]:
        counts = self._counts
        integrity = "RECOVERED" if counts[RolledBack] or counts[UpdateSkipped] else "OK"
        return {
            "mode": mode,
            **self.counts,
            "dropped_snapshots": counts[SnapshotDropped],
            "saved_snapshots": counts[SnapshotSaved],
            "unsaved_snapshots": counts[SnapshotNotSaved],
            "resumed_from_step": self._resumed_from_step,
            "integrity_status": "ABORTED" if counts[Aborted] else integrity,
            "abort": self._abort,
            "autopsies": {cause.value: self._autopsies[cause] for cause in Cause},
        }

    def _overhead(self) -> dict[str, float]:
        total = 0.0 if self._started is None else time.perf_counter() - self._started
        theirs = total - self._own_seconds
        percent = 100 * self._own_seconds / theirs if theirs > 0 else 0.0
        return {"mean_ms": self.mean_overhead_ms, "percent": percent}


def _name(event: Event) -> str:
    if isinstance(event, RiskAnswered):
        return _RESPONSE_NAMES[event.response, event.is_done]
    return _EVENT_NAMES[type(event)]


def _belongs_in_ledger(event: Event) -> bool:
    """What was done to the run, or lost of it; not what was only seen."""
    if isinstance(event, RiskAnswered):
        return event.is_done
    return isinstance(event, UpdateSkipped | RolledBack | SnapshotDropped | Resumed | Aborted)


def _spelt_out(event: Event) -> dict[str, Any]:
    """An event's fields, but for its step, as they are written to telemetry."""
    said: dict[str, Any] = {}
    for name, value in vars(event).items():
        if name == "reasons":
            said["reason"] = value[0].value
            said["reasons"] = [reason.value for reason in value]
        elif name == "offender":
            ranks = [] if value is None else list(value.ranks)
            said["offender"] = None if value is None else {**vars(value), "ranks": ranks}
        elif name in ("would", "response"):
            said[name] = value.value
        elif name in ("level", "before"):
            said[name] = value.name
        elif name != "step":
            said[name] = value
    return said


def _because(reasons: tuple[Reason, ...], offender: Offender | None) -> str:
    names = ", ".join(reason.value for reason in reasons)
    return names if offender is None else f"{names} ({offender})"


def _sentence(event: Event) -> str:
    if isinstance(event, SnapshotDropped):
        return f"snapshot dropped: {event.why}"
    if isinstance(event, SnapshotSaved):
        return f"snapshot saved in {event.path}"
    if isinstance(event, SnapshotNotSaved):
        return f"snapshot not saved to disk, training goes on: {event.why}"
    if isinstance(event, Resumed):
        return f"the run goes on from {event.path}"
    if isinstance(event, Recovered):
        return "passed"
    if isinstance(event, StragglerSeen):
        return f"rank {event.rank} takes {event.ratio:.1f} times as long as the others do"
    if isinstance(event, StepExamined):
        return str(event)
    if isinstance(event, RiskLevelChanged):
        return f"spectral risk {event.before.name} -> {event.level.name} ({event.worst_layer})"
    if isinstance(event, RiskAnswered):
        done = _RESPONSE_NAMES[event.response, event.is_done].replace("_", " ")
        return f"spectral risk {event.level.name}: {done}"
    if isinstance(event, GateAtRisk):
        return _sentence_on_gate(event)
    why = _because(event.reasons, event.offender)
    if isinstance(event, UpdateSkipped):
        return f"update withheld: {why}"
    if isinstance(event, RolledBack):
        factor = f", learning rate times {event.lr_factor:g}" if event.lr_factor != 1 else ""
        return f"rolled back to step {event.to_step}{factor}: {why}"
    if isinstance(event, Aborted):
        return f"training is told to stop: {why}"
    return f"anomaly, nothing done ({event.would.value} would have been): {why}"


def _sentence_on_gate(event: GateAtRisk) -> str:
    is_alpha = event.what == "alpha"
    what = "sigmoid(alpha)" if is_alpha else "|R^T R - I|"
    said = f"gate {event.gate}: {what} is {event.value:.3g}"
    if event.expected is None:
        return said
    return f"{said}, {'planned' if is_alpha else 'accepted'} is {event.expected:.3g}"
