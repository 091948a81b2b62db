"""Whether the rotation gates of a model stay rotations, and open as planned, while it trains."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from foreshock.gates import GateEvent, GateMonitor, GateReading, OrthogonalityRose
from foreshock.guard import GateAtRisk

_log = logging.getLogger("foreshock")

SERIES = "gates"
_MOST_IN_A_ROW = 256
"""Gates whose numbers fit into a row of a series."""


class GateWatch:
    """Has the gates of a model looked at now and then.

    What is begun at one step is read at the next, so that no device is waited for.

    Args:
        monitor: of the gates.
        interval: judged steps between looks; the first step is looked at.
        tell: told of each risk.
        record: given the name of the series, the step, and the numbers of all gates.
    Cost:
        That of a look of `GateMonitor`, and a row of some microseconds.
    """

    def __init__(
        self,
        monitor: GateMonitor,
        interval: int,
        tell: Callable[[GateAtRisk], None],
        record: Callable[..., None],
    ) -> None:
        self._monitor = monitor
        self._interval = interval
        self._tell = tell
        self._record = record
        self._judged = 0
        self._told: dict[str, float | int | str] = {}

    def note_step(self, step: int) -> None:
        """A step was judged."""
        self._take_in()
        if self._judged % self._interval == 0:
            self._monitor.begin(step)
        self._judged += 1

    def telemetry(self) -> dict[str, float | int | str]:
        """The last look that has been read; `gate_step` says when that was."""
        return dict(self._told)

    def close(self) -> None:
        """Reads the last look."""
        self._take_in()

    def state_dict(self) -> dict[str, Any]:
        """What later events depend on; the last look is read first."""
        self._take_in()
        return {"monitor": self._monitor.state_dict(), "judged": self._judged}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on from a saved state; what was begun since is forgotten."""
        self._monitor.load_state_dict(state_dict["monitor"])
        self._judged = state_dict["judged"]

    def _take_in(self) -> None:
        reading = self._monitor.finish()
        if reading is None:
            return
        self._told = _summed_up(reading)
        said = " ".join(f"{name}={_short(value)}" for name, value in self._told.items())
        _log.info("%s", said, extra={"gates": self._told})
        shown = reading.gates[:_MOST_IN_A_ROW]
        self._record(
            SERIES,
            reading.step,
            orthogonality_max={gate.name: gate.orthogonality_max for gate in shown},
            orthogonality_mean={gate.name: gate.orthogonality_mean for gate in shown},
            det={gate.name: gate.det for gate in shown},
            mix={gate.name: gate.mix for gate in shown},
        )
        for event in reading.events:
            self._tell(_as_risk(event))


def _summed_up(reading: GateReading) -> dict[str, float | int | str]:
    # What is no number is worst of all, and max() would pass it by.
    worst = max(reading.gates, key=lambda gate: (gate.det != gate.det, gate.orthogonality_max))
    return {
        "gate_step": reading.step,
        "gate_orthogonality_max": worst.orthogonality_max,
        "gate_orthogonality_mean": sum(g.orthogonality_mean for g in reading.gates)
        / len(reading.gates),
        "gate_worst": worst.name,
        "gate_det": worst.det,
        "gate_mix_min": min(gate.mix for gate in reading.gates),
        "gate_mix_max": max(gate.mix for gate in reading.gates),
    }


def _as_risk(event: GateEvent) -> GateAtRisk:
    if isinstance(event, OrthogonalityRose):
        return GateAtRisk(event.step, event.gate, "orthogonality", event.error, event.limit)
    return GateAtRisk(event.step, event.gate, "alpha", event.mix, event.planned)


def _short(value: float | int | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
