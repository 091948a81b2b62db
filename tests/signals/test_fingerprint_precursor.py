"""The precursor by the clock: two seconds are two seconds at any rate of steps."""

from __future__ import annotations

import json
import math
import statistics
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foreshock.signals import TwoSecondPrecursor, two_second_precursor

NAN, INF = math.nan, math.inf


def every_value(**settings: Any) -> TwoSecondPrecursor:
    """One that holds all it is given, as the function does."""
    return TwoSecondPrecursor(baseline_sec=1e9, min_count=1, **settings)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.sampled_from([0.25, 1.0, 8.0, 64.0]), st.floats(-1e6, 1e9))
def test_at_a_steady_rate_it_is_the_function(seed: int, rate_hz: float, start: float) -> None:
    values = np.random.default_rng(seed).normal(size=300).tolist()
    start = math.floor(start)
    precursor = every_value()
    for i, value in enumerate(values):
        found = precursor.update(start + i / rate_hz, value)
        if i % 50 == 49:
            assert found == two_second_precursor(values[: i + 1], rate_hz)


@pytest.mark.parametrize("rate_hz", [0.2, 3.0, 100.0])
def test_two_seconds_are_two_seconds_at_any_rate(rate_hz: float) -> None:
    rng = np.random.default_rng(0)
    times = np.cumsum(rng.exponential(1 / rate_hz, size=400))
    values = rng.normal(size=400)
    precursor = TwoSecondPrecursor(baseline_sec=10.0, min_count=5)
    for i, (now, value) in enumerate(zip(times, values, strict=True)):
        alert, score = precursor.update(now, value)
        is_recent = times[: i + 1] > now - 2.0
        recent, rest = values[: i + 1][is_recent], values[: i + 1][~is_recent]
        young = int((times[: i + 1][~is_recent] > now - 12.0).sum())
        rest = rest[-max(young, 5) :]
        if len(rest) < max(len(recent), 5):
            assert (alert, score) == (False, 0.0)
            assert not precursor.has_history
            continue
        assert precursor.has_history
        expected = (statistics.fmean(recent) - statistics.fmean(rest)) / statistics.pstdev(rest)
        assert score == pytest.approx(expected, rel=1e-6)


def test_slow_steps_are_held_against_more_than_two_values() -> None:
    precursor = TwoSecondPrecursor()
    rng = np.random.default_rng(0)
    for i in range(33):
        alert, _ = precursor.update(30.0 * i, rng.normal())
        assert not alert
        assert precursor.has_history == (i == 32)
    assert precursor.update(1000.0, 20.0).alert


def test_a_step_change_alerts_within_two_seconds_and_at_first_only_where_it_is_large() -> None:
    rng = np.random.default_rng(0)
    precursor = TwoSecondPrecursor()
    alerts = []
    for i in range(400):
        level = 4.0 if i >= 300 else 0.0
        alerts.append(precursor.update(0.1 * i, level + rng.normal()).alert)
    assert not any(alerts[:300])
    assert any(alerts[300:320])


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_one_value_that_is_not_finite_alerts_once_and_does_not_blind(bad: float) -> None:
    values = np.random.default_rng(0).normal(size=200).tolist()
    clean, spoilt = TwoSecondPrecursor(), TwoSecondPrecursor()
    for i, value in enumerate(values):
        assert spoilt.update(0.1 * i, value) == clean.update(0.1 * i, value)
        if i in (0, 3, 150):
            assert spoilt.update(0.1 * i + 0.01, bad) == (True, INF)


def test_a_clock_that_is_set_back_stands_still() -> None:
    values = np.random.default_rng(0).normal(size=100).tolist()
    ahead, back = TwoSecondPrecursor(), TwoSecondPrecursor()
    for i, value in enumerate(values):
        # From the 60th on, an hour earlier; that step itself takes no time.
        later = 0.25 * (i if i < 60 else i - 1)
        jump = 3600.0 if i >= 60 else 0.0
        found = ahead.update(later, value)
        assert back.update(0.25 * i - jump, value) == found
    assert ahead.has_history


def test_memory_does_not_grow_and_the_oldest_give_way() -> None:
    values = np.random.default_rng(0).normal(size=1000)
    precursor = TwoSecondPrecursor(min_count=10, max_values=64)
    before = precursor.nbytes
    for i, value in enumerate(values):
        found = precursor.update(i / 8, value)
    assert precursor.nbytes == before == 32 * 64
    assert len(precursor.state_dict()["values"]) == 64
    assert found == two_second_precursor(values[-64:], rate_hz=8)
    for i, value in enumerate(values):  # more in two seconds than there is room for
        assert precursor.update(1000 + i / 1000, value) == (False, 0.0) or i < 64
    assert not precursor.has_history


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 250), st.integers(20, 60))
def test_a_restored_one_goes_on_as_the_saved_one(cut: int, room: int) -> None:
    rng = np.random.default_rng(cut)
    times, values = np.cumsum(rng.exponential(0.2, size=300)), rng.normal(size=300)
    values[::17] = NAN
    one, other = (TwoSecondPrecursor(min_count=5, max_values=room) for _ in range(2))
    for now, value in zip(times[:cut] - 1e4 * (times[:cut] > 9), values[:cut], strict=True):
        one.update(now, value)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    for now, value in zip(times[cut:], values[cut:], strict=True):
        assert one.update(now, value) == other.update(now, value)
    assert one.state_dict() == other.state_dict()


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda p: p.update(NAN, 1.0), ValueError, "timestamp_s is nan; accepted"),
        (lambda p: p.update("now", 1.0), TypeError, "timestamp_s is 'now'; accepted"),
        (lambda p: p.update(2.0, None), TypeError, "value is None; accepted"),
        (lambda p: TwoSecondPrecursor(0.0), ValueError, "window_sec is 0.0"),
        (lambda p: TwoSecondPrecursor(z=NAN), ValueError, "z is nan"),
        (lambda p: TwoSecondPrecursor(baseline_sec=-1), ValueError, "baseline_sec is -1.0"),
        (lambda p: TwoSecondPrecursor(min_count=0), ValueError, "min_count is 0"),
        (lambda p: TwoSecondPrecursor(max_values=32), ValueError, "max_values is 32; .* least 33"),
        (lambda p: p.load_state_dict({}), KeyError, "settings"),
        (
            lambda p: p.load_state_dict(TwoSecondPrecursor(z=3.0).state_dict()),
            ValueError,
            r"state_dict\['settings'\]",
        ),
        (
            lambda p: p.load_state_dict({**p.state_dict(), "values": [1.0, 2.0]}),
            ValueError,
            "holds 2 values; accepted: 1",
        ),
        (
            lambda p: p.load_state_dict({**p.state_dict(), "values": [NAN]}),
            ValueError,
            "not finite",
        ),
        (lambda p: p.load_state_dict({**p.state_dict(), "recent": 2}), ValueError, "recent"),
    ],
)
def test_bad_input_is_named_and_changes_nothing(call: Any, error: Any, words: str) -> None:
    precursor = TwoSecondPrecursor()
    precursor.update(1.0, 5.0)
    before = precursor.state_dict()
    with pytest.raises(error, match=words):
        call(precursor)
    assert precursor.state_dict() == before
