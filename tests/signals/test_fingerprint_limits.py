"""What the page on the fingerprint says of when each statistic works, and when it does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from foreshock.signals import (
    NoiseSeries,
    TwoSecondPrecursor,
    entropy_rate,
    processivity,
    theta_consistency,
    two_second_precursor,
)

Kind = Callable[[int, np.random.Generator], np.ndarray]


def white(size: int, rng: np.random.Generator) -> np.ndarray:
    return rng.normal(size=size)


def oscillating(size: int, rng: np.random.Generator) -> np.ndarray:
    return rng.normal(size=size) + 2 * np.sin(2 * np.pi * np.arange(size) / 12)


def alternating(size: int, rng: np.random.Generator) -> np.ndarray:
    return rng.normal(size=size) + np.where(np.arange(size) % 2, 1.0, -1.0)


def slow(size: int, rng: np.random.Generator) -> np.ndarray:
    values = rng.normal(size=size)
    for i in range(1, size):
        values[i] += 0.9 * values[i - 1]
    return values


def louder(size: int, rng: np.random.Generator) -> np.ndarray:
    return 10 * rng.normal(size=size)


def noise_of(values: np.ndarray) -> np.ndarray:
    noise = NoiseSeries()
    return np.array([r for r in map(noise.update, values.tolist()) if r is not None])


def median_theta(kind: Kind, noise: Callable[..., Any] = noise_of, size: int = 128) -> float:
    rng = np.random.default_rng(0)
    pairs = ((kind(size + 150, rng), white(size + 150, rng)) for _ in range(40))
    return float(
        np.median([theta_consistency(noise(x)[-size:], noise(y)[-size:]) for x, y in pairs])
    )


@pytest.mark.parametrize("size", [64, 1024])
def test_theta_of_healthy_noise_is_about_0_56_however_long_it_is_watched(size: int) -> None:
    assert median_theta(white, np.asarray, size) == pytest.approx(0.56, abs=0.03)


@pytest.mark.parametrize("kind", [oscillating, alternating, slow])
def test_theta_sees_a_change_of_rhythm(kind: Kind) -> None:
    assert median_theta(kind) < 0.4 < 0.5 < median_theta(white)


def test_theta_does_not_see_a_change_of_size() -> None:
    assert median_theta(louder) == pytest.approx(median_theta(white), abs=0.03)


@pytest.mark.parametrize("kind", [oscillating, slow])
def test_of_successive_differences_theta_would_hardly_move(kind: Kind) -> None:
    assert median_theta(white, np.diff) - median_theta(kind, np.diff) < 0.1
    assert median_theta(white) - median_theta(kind) > 0.15


def test_entropy_rate_sees_three_times_the_spread_and_is_else_within_0_4() -> None:
    rng = np.random.default_rng(0)
    calm = [entropy_rate(rng.normal(size=64)) for _ in range(500)]
    wider = [entropy_rate(rng.normal(size=64) * np.repeat([1, 3], 32)) for _ in range(500)]
    assert np.mean(np.abs(calm) < 0.4) == pytest.approx(0.98, abs=0.015)
    assert np.mean(wider) == pytest.approx(0.87, abs=0.05)


def test_processivity_of_independent_norms_is_near_one() -> None:
    g, s = np.exp(0.2 * np.random.default_rng(0).normal(size=(2, 10_000)))
    assert processivity(g, s) == pytest.approx(0.96, abs=0.01)


@pytest.mark.parametrize(("rate_hz", "low", "high"), [(8.0, 0, 0), (0.5, 0.005, 0.02)])
def test_false_alarms_of_the_precursor_depend_on_the_rate(
    rate_hz: float, low: float, high: float
) -> None:
    precursor, rng = TwoSecondPrecursor(), np.random.default_rng(0)
    alerts = [precursor.update(i / rate_hz, v).alert for i, v in enumerate(rng.normal(size=5000))]
    assert low <= np.mean(alerts) <= high


@pytest.mark.parametrize(("rise", "low", "high"), [(2.0, 0.0, 0.1), (4.0, 0.98, 1.0)])
def test_what_rise_the_precursor_sees_within_two_seconds(
    rise: float, low: float, high: float
) -> None:
    rng = np.random.default_rng(0)
    step = np.repeat([0.0, rise], [200, 20])
    assert low <= np.mean([two_second_precursor(white(220, rng) + step).alert for _ in range(100)])
    assert high >= np.mean([two_second_precursor(white(220, rng) + step).alert for _ in range(100)])


def test_a_falling_series_hides_a_rise_from_the_precursor() -> None:
    noise = white(620, np.random.default_rng(0))
    step = np.repeat([0.0, 6.0], [600, 20])
    assert two_second_precursor(noise + step).alert
    assert not two_second_precursor(noise + step - 0.01 * np.arange(620)).alert
