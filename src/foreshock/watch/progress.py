"""Where a run stands, from its records so far."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Mapping
from datetime import datetime
from itertools import pairwise
from typing import Any

from foreshock.records.event_sentence import event_sentence
from foreshock.records.telemetry_schema import START_EVENT, TELEMETRY_EVENT
from foreshock.report.telemetry import moment_of

_HISTORY = 512
_SPEED_RECORDS = 20
_LAST_EVENTS = 8


class Progress:
    """Takes in records in the order of the file.

    Attributes:
        latest: the last telemetry record.
        losses: the last 512 values of the loss; NaN where it was not finite.
        grad_norms: likewise.
        level: of the spectral risk.
        counts: how often each event happened.
        last_events: the last 8 of them, a line each.
        last_moment: the time of the last record, in UTC.
    """

    def __init__(self) -> None:
        self.latest: Mapping[str, Any] = {}
        self.losses: deque[float] = deque(maxlen=_HISTORY)
        self.grad_norms: deque[float] = deque(maxlen=_HISTORY)
        self.level: str | None = None
        self.counts: Counter[str] = Counter()
        self.last_events: deque[str] = deque(maxlen=_LAST_EVENTS)
        self.last_moment: datetime | None = None
        self._paces: deque[tuple[int, datetime]] = deque(maxlen=_SPEED_RECORDS)

    def add(self, record: Mapping[str, Any]) -> None:
        """Takes in a record, as `read_telemetry` gives it."""
        moment = moment_of(record.get("time"))
        self.last_moment = moment or self.last_moment
        event = record.get("event")
        if event == START_EVENT:
            self._paces.clear()
        elif event == TELEMETRY_EVENT:
            self._add_telemetry(record, moment)
        else:
            name = printable(event)
            self.counts[name.replace("_", " ")] += 1
            self.last_events.append(told(record))
            if isinstance(record.get("level"), str):
                self.level = record["level"]

    @property
    def steps_per_second(self) -> float | None:
        """Over the last telemetry records; None while there are too few."""
        if len(self._paces) < 2:
            return None
        steps = sum(max(0, after - before) for (before, _), (after, _) in pairwise(self._paces))
        seconds = (self._paces[-1][1] - self._paces[0][1]).total_seconds()
        return steps / seconds if seconds > 0 else None

    def _add_telemetry(self, record: Mapping[str, Any], moment: datetime | None) -> None:
        self.latest = record
        if isinstance(record.get("risk_level"), str):
            self.level = record["risk_level"]
        for name, history in (("train_loss", self.losses), ("grad_norm", self.grad_norms)):
            value = record.get(name)
            if isinstance(value, int | float):
                history.append(_as_float(value))
        step = record.get("step")
        if type(step) is int and moment is not None:
            self._paces.append((step, moment))


def told(record: Mapping[str, Any]) -> str:
    """An event in a line."""
    return f"step {record.get('step', '?')}: {event_sentence(record)}"


def printable(text: object) -> str:
    """A text of which a terminal makes nothing but letters, in one line."""
    return "".join(letter if letter.isprintable() else "?" for letter in str(text))


def _as_float(value: float) -> float:
    try:
        return float(value) if math.isfinite(value) else math.nan
    except OverflowError:
        return math.nan
