"""One pass over telemetry.jsonl, for all that the report says of it."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from foreshock.records.telemetry_schema import START_EVENT, TELEMETRY_EVENT
from foreshock.report.curves import Curves, is_step
from foreshock.report.events import Events
from foreshock.report.risk import RiskBands, WorstLayers

SOURCE = "telemetry.jsonl"
_SHORTEST_SECONDS = 0.005  # times are written in milliseconds


class RunSeen:
    """What is known of a run from its telemetry.

    Args:
        curves: gets the numbers, and the steps per second between one record and the next.
        events: gets the events; default: ones of its own.
    """

    def __init__(self, curves: Curves, events: Events | None = None) -> None:
        self.events = Events() if events is None else events
        self.bands = RiskBands()
        self.layers = WorstLayers()
        self.records = 0
        """Telemetry records."""
        self.starts = 0
        self.torn_lines = 0
        self.stepless = 0
        """Telemetry records without the number of a step."""
        self.trouble = ""
        """Why there is no more, if that is because the file is missing, or damaged."""
        self.first_time: str | None = None
        self.last_time: str | None = None
        self.last_step: int | None = None
        self._curves = curves
        self._before: tuple[int, datetime] | None = None

    def add(self, record: Mapping[str, Any] | None) -> None:
        """Takes in a record; None for a torn line."""
        if record is None:
            self.torn_lines += 1
            return
        time = record.get("time")
        if isinstance(time, str):
            self.first_time = self.first_time or time
            self.last_time = time
        event = record.get("event")
        if event == TELEMETRY_EVENT:
            self._add_telemetry(record)
        elif event == START_EVENT:
            self.starts += 1
            self._before = None
        else:
            self.bands.add(record.get("step"), record.get("level"))
            self.events.add(record)

    def _add_telemetry(self, record: Mapping[str, Any]) -> None:
        self.records += 1
        step = record.get("step")
        if not is_step(step):
            self.stepless += 1
            return
        assert isinstance(step, int)
        self.last_step = step
        self._curves.add(SOURCE, step, {**record, "steps_per_second": self._speed(step, record)})
        self.bands.add(step, record.get("risk_level"))
        self.layers.add(record)

    def _speed(self, step: int, record: Mapping[str, Any]) -> float | None:
        """Steps a second since the record before, where that can be told."""
        moment = moment_of(record.get("time"))
        if moment is None:
            return None
        before, self._before = self._before, (step, moment)
        if before is None or step <= before[0]:
            return None
        seconds = (moment - before[1]).total_seconds()
        return (step - before[0]) / seconds if seconds >= _SHORTEST_SECONDS else None


def moment_of(time: object) -> datetime | None:
    """The time that a record states, which is UTC; None if it states none."""
    if not isinstance(time, str) or not time.endswith("Z"):
        return None
    try:
        return datetime.fromisoformat(time[:-1])  # Python 3.10 reads no Z
    except ValueError:
        return None
