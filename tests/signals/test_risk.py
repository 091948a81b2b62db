"""Slope, volatility and level of a history, against NumPy's own fit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foreshock.signals import RiskLevel, RiskThresholds, risk_level, slope, volatility

# The fit by centred sums against that of numpy.polyfit (SVD), in units of the largest observation:
# measured 2e-15 over 4000 draws.
FIT_TOLERANCE = 1e-12

KAPPAS = st.floats(1e-3, 1e6)
HISTORIES = st.lists(st.tuples(KAPPAS, st.integers(1, 500)), min_size=3, max_size=80)


def polyfit(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Slope, and standard deviation of the residuals."""
    x = x - x.mean()
    coefficients = np.polyfit(x, y, 1)
    return float(coefficients[0]), float(np.std(y - np.polyval(coefficients, x)))


@settings(deadline=None)
@given(HISTORIES, st.integers(3, 60), st.integers(0, 10**9))
def test_slope_and_volatility_are_those_of_a_straight_line_fit(
    history: list[tuple[float, int]], window: int, first: int
) -> None:
    kappa = np.array([k for k, _ in history])
    steps = first + np.cumsum([gap for _, gap in history])
    last, at = kappa[-window:], steps[-window:].astype(float)
    span = at[-1] - at[0]

    expected, residual = polyfit(at, np.log(last))
    resolution = FIT_TOLERANCE * (1 + np.abs(np.log(last)).max())
    assert slope(kappa, steps, window=window) == pytest.approx(expected, abs=resolution / span)
    assert volatility(kappa, steps, window=window) == pytest.approx(residual, abs=resolution)

    expected, _ = polyfit(at, last)
    resolution = FIT_TOLERANCE * last.max()
    absolute = slope(kappa, steps, window=window, scale="absolute")
    assert absolute == pytest.approx(expected, abs=resolution / span)
    assert volatility(kappa, steps, window=window, scale="absolute") == pytest.approx(
        np.std(last), abs=resolution
    )


@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize("scale", ["relative", "absolute"])
def test_fewer_than_three_observations_say_nothing(count: int, scale: str) -> None:
    history = [10.0, 11.0][:count]
    assert slope(history, scale=scale) is None
    assert volatility(history, scale=scale) is None
    assert slope([*history, *[12.0] * (3 - count)], scale=scale) is not None


def test_without_steps_observations_are_a_step_apart() -> None:
    assert slope([10.0, 12.0, 14.0, 16.0], scale="absolute") == pytest.approx(2.0)


def test_the_slope_is_per_step_however_often_is_observed() -> None:
    steps = np.array([3, 4, 50, 51, 200, 700])
    kappa = 10 * np.exp(0.001 * steps)
    assert slope(kappa, steps) == pytest.approx(0.001, rel=1e-12)
    assert slope(kappa) != pytest.approx(0.001, rel=0.1)


def test_what_left_the_window_counts_no_more() -> None:
    calm = [10.0] * 50
    assert slope([1e6, 3.0, 1e5, *calm]) == volatility([1e6, 3.0, 1e5, *calm]) == 0.0
    assert slope([1e6, 3.0, 1e5, *calm], window=51) != 0.0


@settings(deadline=None)
@given(HISTORIES, st.floats(1e-3, 1e3))
def test_relative_slope_and_volatility_do_not_depend_on_the_scale_of_kappa(
    history: list[tuple[float, int]], factor: float
) -> None:
    kappa = np.array([k for k, _ in history])
    steps = np.cumsum([gap for _, gap in history])
    assert slope(factor * kappa, steps) == pytest.approx(slope(kappa, steps), abs=1e-12)
    assert volatility(factor * kappa, steps) == pytest.approx(volatility(kappa, steps), abs=1e-12)


@settings(deadline=None)
@given(HISTORIES, st.floats(1e-3, 1e3))
def test_absolute_slope_and_volatility_scale_with_kappa_and_ignore_an_offset(
    history: list[tuple[float, int]], factor: float
) -> None:
    kappa = np.array([k for k, _ in history])
    for measure in (slope, volatility):
        plain = measure(kappa, scale="absolute")
        tolerance = 1e-12 * kappa.max()
        scaled = measure(factor * kappa, scale="absolute")
        assert scaled == pytest.approx(factor * plain, abs=factor * tolerance)
        moved = measure(kappa + kappa.max(), scale="absolute")
        assert moved == pytest.approx(plain, abs=4 * tolerance)


@pytest.mark.parametrize("rate", [-0.05, 1e-4, 0.05])
def test_a_steady_exponential_trend_is_not_volatile_in_the_relative_scale(rate: float) -> None:
    kappa = 30 * np.exp(rate * np.arange(50))
    assert slope(kappa) == pytest.approx(rate, rel=1e-11)
    assert volatility(kappa) == pytest.approx(0.0, abs=1e-14)
    assert volatility(kappa, scale="absolute") > 1e-3


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 0.0])
def test_what_is_no_condition_number_is_left_out_with_its_step(bad: float) -> None:
    steps = np.arange(0, 40, 2)
    kappa = 10 * np.exp(0.01 * steps)
    spoilt, at = np.insert(kappa, 7, bad), np.insert(steps, 7, 13)
    for scale in ("relative", "absolute"):
        for measure in (slope, volatility):
            assert measure(spoilt, at, scale=scale) == measure(kappa, steps, scale=scale)


def test_a_tensor_is_as_good_as_a_list() -> None:
    kappa = [10.0, 11.0, 13.0, 12.0]
    assert slope(torch.tensor(kappa, dtype=torch.float64)) == slope(kappa) == slope(tuple(kappa))


T = RiskThresholds()
JUST_OVER = math.nextafter
LADDER = [
    (0.0, 0.0, RiskLevel.STABLE),
    (T.learning, 0.0, RiskLevel.STABLE),
    (JUST_OVER(T.learning, 1), 0.0, RiskLevel.LEARNING),
    (T.warning, 0.0, RiskLevel.LEARNING),
    (JUST_OVER(T.warning, 1), 0.0, RiskLevel.WARNING),
    (T.danger, 0.0, RiskLevel.WARNING),
    (JUST_OVER(T.danger, 1), 0.0, RiskLevel.DANGER),
    (math.inf, 0.0, RiskLevel.DANGER),
    (0.0, T.instability, RiskLevel.STABLE),
    (1.0, T.instability, RiskLevel.DANGER),
    (0.0, JUST_OVER(T.instability, 1), RiskLevel.INSTABILITY),
    (1.0, math.inf, RiskLevel.INSTABILITY),
]


@pytest.mark.parametrize(("size", "spread", "level"), LADDER)
def test_a_boundary_belongs_to_the_lower_level(
    size: float, spread: float, level: RiskLevel
) -> None:
    assert risk_level(size, spread) is level
    assert risk_level(-size, spread) is level


def test_the_default_thresholds_are_those_of_the_specification() -> None:
    assert (T.learning, T.warning, T.danger, T.instability) == (0.0005, 0.002, 0.004, 0.003)


def test_thresholds_are_configuration() -> None:
    lenient = RiskThresholds(learning=1, warning=2, danger=3, instability=math.inf)
    levels = [risk_level(s, 1e9, lenient) for s in (1, 1.5, 2.5, 3.5)]
    assert levels == sorted(levels) == list(RiskLevel)[:4]


def test_levels_are_ordered() -> None:
    names = ["STABLE", "LEARNING", "WARNING", "DANGER", "INSTABILITY"]
    assert [level.name for level in sorted(RiskLevel)] == names


def test_no_level_without_a_slope_or_a_volatility() -> None:
    assert risk_level(None, 0.0) is None
    assert risk_level(0.0, None) is None


def test_a_nan_is_never_calm() -> None:
    assert risk_level(0.0, math.nan) is RiskLevel.INSTABILITY
    assert risk_level(math.nan, 0.0) is RiskLevel.DANGER


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"history": "abc"}, TypeError, "history is a str"),
        ({"history": [[1.0]]}, ValueError, r"history has shape \(1, 1\)"),
        ({"history": [1.0, 2.0], "steps": [1]}, ValueError, "steps holds 1 values; accepted: 2"),
        ({"history": [1.0, 2.0], "steps": [3, 3]}, ValueError, "steps do not rise"),
        ({"history": [1.0], "window": 2}, ValueError, "window is 2; accepted: .* at least 3"),
        ({"history": [1.0], "scale": "log"}, ValueError, "scale is 'log'; accepted: 'relative'"),
    ],
)
@pytest.mark.parametrize("measure", [slope, volatility])
def test_bad_input_is_named(measure, arguments, error, words) -> None:
    with pytest.raises(error, match=words):
        measure(**arguments)


@pytest.mark.parametrize(
    ("field", "value"), [("learning", 0.0), ("warning", 0.1), ("danger", 1e-4), ("instability", -1)]
)
def test_thresholds_must_be_positive_and_rise(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        RiskThresholds(**{field: value})


def test_a_misspelt_threshold_is_answered_with_the_right_one() -> None:
    with pytest.raises(ValueError, match="did you mean 'danger'"):
        RiskThresholds(dangr=1.0)
