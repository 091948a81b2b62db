"""The risk that the spectra of the weights told of, and the layers that told it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from foreshock.records.curves_envelope import Envelope
from foreshock.report.curves import is_step, short

LEVELS = ("STABLE", "LEARNING", "WARNING", "DANGER", "INSTABILITY")
"""From calm to restless; a level that is not among them is not drawn."""
_AT_ONCE = 1024
_MAX_LAYERS = 10_000
_SHOWN_LAYERS = 12


class RiskBands:
    """The level over the steps; where there are too many, the highest of an interval."""

    def __init__(self) -> None:
        self._levels = Envelope()
        self._pending: tuple[list[int], list[float]] = [], []

    def add(self, step: object, level: object) -> None:
        """Takes in that the level was this at a step."""
        if level is not None and level in LEVELS and is_step(step):
            assert isinstance(step, int)
            assert isinstance(level, str)
            steps, levels = self._pending
            steps.append(step)
            levels.append(LEVELS.index(level))
            if len(steps) >= _AT_ONCE:
                self._flush()

    def bands(self) -> list[dict[str, Any]]:
        """The steps from which another level holds, and its name."""
        self._flush()
        bands: list[dict[str, Any]] = []
        for bucket in self._levels.buckets():
            level = LEVELS[int(bucket.high)]
            if not bands or bands[-1]["level"] != level:
                bands.append({"step": bucket.step, "level": level})
        return bands

    def _flush(self) -> None:
        self._levels.add(*self._pending)
        self._pending = [], []


class WorstLayers:
    """How often, and how badly, each layer was the worst."""

    def __init__(self) -> None:
        self._spectral: dict[str, list[float]] = {}
        self._gradients: dict[str, list[float]] = {}

    def add(self, record: Mapping[str, Any]) -> None:
        """Takes in a telemetry record."""
        worst = record.get("worst_layer")
        if isinstance(worst, str):
            _count(self._spectral, worst, record.get("spectral_kappa"))
        largest = record.get("largest_gradients")
        for name, norm in largest.items() if isinstance(largest, dict) else ():
            _count(self._gradients, name, norm)

    def spectral(self) -> list[dict[str, Any]]:
        """Layers that had the worst kappa, the most frequent first."""
        return _ranked(self._spectral)

    def gradients(self) -> list[dict[str, Any]]:
        """Layers that were among those of the largest gradients, the most frequent first."""
        return _ranked(self._gradients)


def _count(layers: dict[str, list[float]], name: str, value: object) -> None:
    """Keeps [how often, largest finite value, how often the value was not finite]."""
    if name not in layers and len(layers) >= _MAX_LAYERS:
        return
    seen = layers.setdefault(name, [0, -math.inf, 0])
    seen[0] += 1
    if isinstance(value, float) and not math.isfinite(value):
        seen[2] += 1
    elif isinstance(value, float | int):
        seen[1] = max(seen[1], value)


def _ranked(layers: dict[str, list[float]]) -> list[dict[str, Any]]:
    ranked = sorted(layers.items(), key=lambda item: (-item[1][2], -item[1][0], -item[1][1]))
    return [
        {"name": name, "times": int(times), "largest": short(largest), "nonfinite": int(others)}
        for name, (times, largest, others) in ranked[:_SHOWN_LAYERS]
    ]
