"""Follows the gates of a model: are they rotations still, and do they open as planned?"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

from torch import nn

from foreshock.gates.attachment import gates_of
from foreshock.gates.configuration import GateSettings
from foreshock.gates.gate import SO8RotationGate
from foreshock.gates.orthogonality import measure, share
from foreshock.gates.schedule import AlphaSchedule
from foreshock.host_read import Later


@dataclasses.dataclass(frozen=True)
class OrthogonalityRose:
    """A gate's blocks are less orthogonal than they were, or than they may be."""

    step: int
    gate: str
    error: float
    """|R^T R - I|_F of the worst block."""
    limit: float


@dataclasses.dataclass(frozen=True)
class AlphaLeftSchedule:
    """A gate is more open or more closed than is planned."""

    step: int
    gate: str
    mix: float
    """sigmoid(alpha)."""
    planned: float | None
    """None: nothing is, but alpha is no number."""


GateEvent = OrthogonalityRose | AlphaLeftSchedule


@dataclasses.dataclass(frozen=True)
class GateState:
    """A gate in numbers."""

    name: str
    """Of the layer that it is behind."""
    orthogonality_max: float
    """|R^T R - I|_F of its worst block."""
    orthogonality_mean: float
    """Mean over its blocks."""
    det: float
    """det(R) of the block where it is furthest from 1."""
    mix: float
    """sigmoid(alpha)."""


@dataclasses.dataclass(frozen=True)
class GateReading:
    """All gates at a step."""

    step: int
    gates: tuple[GateState, ...]
    events: tuple[GateEvent, ...]
    """What is new and a risk."""


class GateMonitor:
    """Looks at all gates of a model in one computation, and says what is a risk.

    `look` is all there is to it; `begin` and `finish` are its two halves, for those who do not
    want to wait for a device.

    Args:
        model: with gates.
        schedule: that the gates' alphas are held against; None: they may be what they like.
        settings: when something is a risk; default `GateSettings()`.
    Raises:
        ValueError: the model has no gates.
    Cost:
        That of `measure` a look; the medians of `orthogonality_window` numbers for each gate.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: AlphaSchedule | None = None,
        settings: GateSettings | None = None,
    ) -> None:
        self._gates = gates_of(model)
        if not self._gates:
            raise ValueError("model has no gates; accepted: one after attach(model)")
        share(list(self._gates.values()))
        self._schedule = schedule
        self._settings = settings or GateSettings()
        window = self._settings.orthogonality_window
        self._errors: dict[str, deque[float]] = {n: deque(maxlen=window) for n in self._gates}
        self._told: set[tuple[str, str]] = set()
        self._begun: tuple[int, Later, dict[str, float | None]] | None = None

    @property
    def gates(self) -> dict[str, SO8RotationGate]:
        """Those that are followed, by name."""
        return dict(self._gates)

    def look(self, step: int) -> GateReading:
        """Measures the gates as they are now."""
        self.begin(step)
        reading = self.finish()
        assert reading is not None
        return reading

    def begin(self, step: int) -> None:
        """Has the gates measured, without waiting for it."""
        plan = None if self._schedule is None else self._schedule.planned
        planned = {n: None if plan is None else plan(gate) for n, gate in self._gates.items()}
        self._begun = step, Later(measure(list(self._gates.values()))), planned

    def finish(self) -> GateReading | None:
        """What was begun; None if nothing was."""
        begun, self._begun = self._begun, None
        if begun is None:
            return None
        step, numbers, planned = begun
        rows = numbers.get().tolist()
        states = tuple(GateState(n, *row) for n, row in zip(self._gates, rows, strict=True))
        events: list[GateEvent] = []
        for state in states:
            events += self._judge_orthogonality(step, state)
            events += self._judge_alpha(step, state, planned[state.name])
        return GateReading(step, states, tuple(events))

    def state_dict(self) -> dict[str, Any]:
        """What later events depend on; what was begun is not waited for."""
        return {
            "errors": {name: list(errors) for name, errors in self._errors.items()},
            "told": [list(one) for one in sorted(self._told)],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on from a saved state; what was begun since is forgotten."""
        self._begun = None
        for name, errors in self._errors.items():
            errors.clear()
            errors.extend(state_dict["errors"].get(name, ()))
        self._told = {(gate, kind) for gate, kind in state_dict["told"]}

    def _judge_orthogonality(self, step: int, state: GateState) -> list[GateEvent]:
        error, limit = state.orthogonality_max, self._limit(state.name)
        is_well = error <= limit  # NaN is not
        if is_well:
            self._errors[state.name].append(error)
        if not self._is_news(state.name, "orthogonality", is_well):
            return []
        return [OrthogonalityRose(step, state.name, error, limit)]

    def _limit(self, name: str) -> float:
        given, errors = self._settings, self._errors[name]
        if len(errors) < min(given.orthogonality_min_count, given.orthogonality_window):
            return given.orthogonality_threshold
        usual = given.orthogonality_rise * statistics.median(errors)
        return min(given.orthogonality_threshold, max(given.orthogonality_floor, usual))

    def _judge_alpha(self, step: int, state: GateState, planned: float | None) -> list[GateEvent]:
        is_well = (
            math.isfinite(state.mix)
            if planned is None
            else abs(state.mix - planned) <= self._settings.alpha_tolerance
        )
        if not self._is_news(state.name, "alpha", is_well):
            return []
        return [AlphaLeftSchedule(step, state.name, state.mix, planned)]

    def _is_news(self, gate: str, kind: str, is_well: bool) -> bool:
        """Whether it is the first time since it was well."""
        was_told = (gate, kind) in self._told
        (self._told.discard if is_well else self._told.add)((gate, kind))
        return not is_well and not was_told
