"""What happened in a run: marks on the axis of steps, and rows of a table."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from typing import Any

from foreshock.records.event_sentence import event_sentence, offender_sentence, reasons_of
from foreshock.report.curves import is_step

LANES = {
    "aborted": "aborts",
    "rollback_success": "rollbacks",
    "would_roll_back": "rollbacks not made",
    "update_skipped": "skipped updates",
    "anomaly_seen": "anomalies",
    "recovered": "recoveries",
    "risk_level_changed": "risk changes",
    "gate_at_risk": "gates at risk",
    "straggler_seen": "slow ranks",
    "snapshot_saved": "snapshots",
    "snapshot_not_saved": "snapshots",
    "snapshot_dropped": "snapshots",
    "snapshot_requested": "snapshots",
    "resumed": "resumptions",
    "autopsy": "autopsies",
}
"""The row of the time axis that an event is marked in; all others have one of their own."""
OTHER_LANE = "other events"

MAX_MARKS = 400
MAX_ROWS = 400
_RISK_FIELDS = ("step", "before", "level", "kappa", "slope", "volatility", "worst_layer")
_NO_ACTIONS = frozenset({"risk_level_changed", "autopsy", "snapshot_saved"})


class Events:
    """Takes in events in the order of the file; keeps the first and the last, and counts all."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        """How often each event happened."""
        self._lanes: dict[str, _Marks] = {}
        self._actions = Ends()
        self._risks = Ends()

    def add(self, record: Mapping[str, Any]) -> None:
        """Takes in an event, as `read_telemetry` gives it."""
        self._take_in(record, "", {})

    def _take_in(self, record: Mapping[str, Any], whose: str, more: dict[str, Any]) -> None:
        name = str(record.get("event"))
        self.counts[name] += 1
        sentence = event_sentence(record)
        if is_step(record.get("step")):
            lane = LANES.get(name, OTHER_LANE)
            self._lanes.setdefault(lane, _Marks()).add(record["step"], whose + sentence)
        if name == "risk_level_changed":
            self._risks.add({key: record.get(key) for key in _RISK_FIELDS} | more)
        elif name not in _NO_ACTIONS:
            self._actions.add(_row(record, name, sentence) | more)

    def marks(self) -> list[dict[str, Any]]:
        """For each lane that is not empty: its name, and its marks in the order of the steps."""
        order = [*dict.fromkeys(LANES.values()), OTHER_LANE]
        return [
            {"lane": lane, **self._lanes[lane].drawn()} for lane in order if lane in self._lanes
        ]

    def actions(self) -> dict[str, Any]:
        """What the guard did, and all else but changes of risk, autopsies and saved snapshots."""
        return self._actions.drawn()

    def risk_changes(self) -> dict[str, Any]:
        """The changes of the risk level."""
        return self._risks.drawn()


class Ends:
    """The first and the last of many rows."""

    def __init__(self) -> None:
        self._first: list[dict[str, Any]] = []
        self._last: deque[dict[str, Any]] = deque(maxlen=MAX_ROWS // 2)
        self._total = 0

    def add(self, row: dict[str, Any]) -> None:
        self._total += 1
        (self._first if len(self._first) < MAX_ROWS // 2 else self._last).append(row)

    def drawn(self) -> dict[str, Any]:
        left_out = self._total - len(self._first) - len(self._last)
        return {"first": self._first, "left_out": left_out, "last": list(self._last)}


class _Marks:
    """How often something happened in equal intervals of steps, and what it was first."""

    def __init__(self) -> None:
        self._width = 1
        self._marks: dict[int, tuple[int, str]] = {}

    def add(self, step: int, sentence: str) -> None:
        index = step // self._width
        count, first = self._marks.get(index, (0, sentence))
        self._marks[index] = count + 1, first
        while len(self._marks) > MAX_MARKS:
            self._coarsen()

    def drawn(self) -> dict[str, Any]:
        marks = sorted(self._marks.items())
        return {
            "width": self._width,
            "marks": [[index * self._width, count, first] for index, (count, first) in marks],
        }

    def _coarsen(self) -> None:
        self._width *= 2
        fine, self._marks = self._marks, {}
        for index, (count, first) in fine.items():
            before, earlier = self._marks.get(index // 2, (0, first))
            self._marks[index // 2] = before + count, earlier


def _row(record: Mapping[str, Any], name: str, sentence: str) -> dict[str, Any]:
    return {
        "step": record.get("step"),
        "time": record.get("time"),
        "event": name.replace("_", " "),
        "reasons": reasons_of(record),
        "offender": offender_sentence(record.get("offender")),
        "sentence": sentence,
    }
