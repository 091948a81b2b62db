"""The levels of a tracker: each can be reached, and none flaps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foreshock.signals import (
    RiskLevel,
    RiskThresholds,
    SpectralReading,
    SpectralSettings,
)
from tests.signals.trackers import follow, observe, tracker_of

STABLE, LEARNING, WARNING, DANGER, INSTABILITY = RiskLevel


def test_the_default_settings_are_those_of_the_specification() -> None:
    chosen = SpectralSettings()
    assert (chosen.window, chosen.patience) == (50, 2)
    assert (chosen.scale, chosen.aggregate) == ("relative", "max")
    assert chosen.thresholds == RiskThresholds()


def trend(rate: float, count: int = 60) -> np.ndarray:
    return 10 * np.exp(rate * np.arange(count))[:, None]


@pytest.mark.parametrize(
    ("rate", "level"),
    [(0.0, STABLE), (0.0004, STABLE), (0.001, LEARNING), (0.003, WARNING), (0.005, DANGER)],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_steady_trend_reaches_its_level(rate: float, level: RiskLevel, sign: int) -> None:
    reading = follow(tracker_of(1), trend(sign * rate))[-1]
    assert reading.level is reading.raw_level is level
    assert reading.worst[0].level is level


def test_a_shaking_spectrum_is_an_instability() -> None:
    shaking = 10 * np.exp(0.01 * np.array([1, -1] * 30))[:, None]
    assert follow(tracker_of(1), shaking)[-1].level is INSTABILITY


def test_the_scale_of_the_observations_decides_the_level() -> None:
    rows = 100 * trend(0.001)
    assert follow(tracker_of(1), rows)[-1].level is LEARNING
    assert follow(tracker_of(1, scale="absolute"), rows)[-1].level is INSTABILITY


# Windows of 3 with a step between: the raw level is that of the last two moves.
SLOPES_ONLY = RiskThresholds(learning=1, warning=2, danger=3, instability=math.inf)


def kappas_of(rates: Sequence[float]) -> np.ndarray:
    """Two observations, and one more per rate, the slope of whose window is just that rate."""
    y = [0.0, rates[0]]
    for rate in rates:
        y.append(y[-2] + 2 * rate)
    return np.exp(y)[:, None]


def raw_sequence(rates: Sequence[float], **values: Any) -> list[SpectralReading]:
    tracker = tracker_of(1, window=3, thresholds=SLOPES_ONLY, **values)
    return follow(tracker, kappas_of(rates))[2:]


def levels(readings: list[SpectralReading]) -> list[int]:
    return [int(reading.level) for reading in readings]


def raw_levels(readings: list[SpectralReading]) -> list[int | None]:
    return [None if r.raw_level is None else int(r.raw_level) for r in readings]


def rates(*wanted: int) -> list[float]:
    return [0.5 + level for level in wanted]


@pytest.mark.parametrize(
    ("patience", "raw", "held"),
    [
        (1, [0, 3, 0, 2, 1], [0, 3, 0, 2, 1]),
        (2, [0, 3, 0, 3, 0, 3], [0, 0, 0, 0, 0, 0]),
        (2, [3, 3, 0, 3, 0, 3], [0, 3, 3, 3, 3, 3]),
        (2, [0, 2, 3, 3, 1, 0, 0], [0, 0, 2, 3, 3, 1, 0]),
        (2, [2, 3, 2, 3, 2, 3], [0, 2, 2, 2, 2, 2]),
        (3, [3, 3, 3, 0, 0, 3, 0, 0, 0], [0, 0, 3, 3, 3, 3, 3, 3, 0]),
        (4, [1, 2, 3, 3, 3, 3], [0, 0, 0, 1, 2, 3]),
    ],
)
def test_a_level_must_hold_before_it_changes_in_either_direction(
    patience: int, raw: list[int], held: list[int]
) -> None:
    readings = raw_sequence(rates(*raw), patience=patience)
    assert raw_levels(readings) == raw
    assert levels(readings) == held
    assert [int(r.worst[0].level) for r in readings] == held


@settings(deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.integers(1, 4))
def test_a_level_changes_only_to_what_all_of_the_last_observations_support(
    raw: list[int], patience: int
) -> None:
    readings = raw_sequence(rates(*raw), patience=patience)
    level = 0
    for i, reading in enumerate(readings):
        recent = raw[max(0, i - patience + 1) : i + 1]
        if len(recent) == patience and (min(recent) > level or max(recent) < level):
            level = min(recent) if min(recent) > level else max(recent)
        assert int(reading.level) == level


def test_what_is_not_finite_does_not_count_towards_patience() -> None:
    first, second, *rest = kappas_of([3.5, 30.0])
    tracker = tracker_of(1, window=3, thresholds=SLOPES_ONLY, patience=2)
    *_, once = follow(tracker, [first, second, rest[0]])
    assert (once.raw_level, once.level) == (DANGER, STABLE)
    for step in range(3, 6):
        reading = observe(tracker, step, [math.nan])
        assert (reading.level, reading.worst[0].level) == (STABLE, STABLE)
    assert observe(tracker, 6, rest[1]).level is DANGER
