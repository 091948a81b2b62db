"""The tracker: every matrix and the aggregate, over windows that forget."""

from __future__ import annotations

import dataclasses
import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foreshock.signals import (
    RiskLevel,
    SpectralSettings,
    SpectralTracker,
    slope,
    volatility,
)
from tests.signals.trackers import follow, observe, same, tracker_of, walks

STABLE, LEARNING, WARNING, DANGER, INSTABILITY = RiskLevel

# The tracker's windows lie in the order of a ring: the same sums in another order. Measured 4e-15
# on condition numbers up to 100.
ORDER_TOLERANCE = 1e-13


# ---- what is measured


@settings(deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from(["relative", "absolute"]),
    st.integers(3, 12),
    st.one_of(st.none(), st.integers(1, 600)),
    st.integers(1, 40),
)
def test_every_matrix_and_the_aggregate_are_measured_as_by_the_functions(
    seed: int, scale: Any, window: int, span: int | None, observations: int
) -> None:
    rng = np.random.default_rng(seed)
    kappa = rng.uniform(1, 100, size=(observations, 3))
    steps = np.cumsum(rng.integers(1, 100, size=observations))
    tracker = tracker_of(3, scale=scale, window=window, span=span)
    for step, row in zip(steps, kappa, strict=True):
        reading = observe(tracker, int(step), row)
    if span is not None:
        window = min(window, max(3, int((steps > steps[-1] - span).sum())))
    largest = kappa.max(axis=1)
    measured = {"": (reading.slope, reading.volatility)}
    measured |= {m.name: (m.slope, m.volatility) for m in tracker.worst(3)}
    histories = {"": largest, **{f"m{i}": kappa[:, i] for i in range(3)}}
    for name, history in histories.items():
        for found, measure in zip(measured[name], (slope, volatility), strict=True):
            expected = measure(history, steps, window=window, scale=scale)
            assert (found is None) == (expected is None)
            if expected is not None:
                assert found == pytest.approx(expected, rel=1e-12, abs=ORDER_TOLERANCE)
    assert reading.kappa == largest[-1]


@pytest.mark.parametrize(("aggregate", "expected"), [("max", 9.0), ("mean", 5.0), ("median", 4.0)])
def test_the_aggregate_is_the_configured_one(aggregate: str, expected: float) -> None:
    tracker = tracker_of(3, aggregate=aggregate)
    assert observe(tracker, 0, [2.0, 9.0, 4.0]).kappa == expected


def test_growth_of_sigma_and_fall_of_stable_rank_are_relative_and_named() -> None:
    tracker = tracker_of(3)
    for step in range(0, 200, 10):
        sigma = [2.0, 5.0 * math.exp(0.003 * step), math.exp(-0.01 * step)]
        rank = [30 * math.exp(-0.002 * step), 60.0, 7.0 * math.exp(0.004 * step)]
        reading = tracker.update(step, [10.0, 10.0, 10.0], sigma, rank)
    assert reading.sigma_growth == pytest.approx(0.003)
    assert reading.sigma_growth_matrix == "m1"
    assert reading.stable_rank_fall == pytest.approx(0.002)
    assert reading.stable_rank_fall_matrix == "m0"
    by_name = {m.name: m for m in tracker.worst(3)}
    assert by_name["m2"].sigma_growth == pytest.approx(-0.01)
    assert by_name["m2"].stable_rank_fall == pytest.approx(-0.004)
    assert by_name["m1"].sigma_max == sigma[1]
    assert by_name["m0"].stable_rank == rank[0]


@pytest.mark.parametrize("every", [1, 10, 50])
def test_the_curve_of_a_healthy_run_is_no_volatility_however_rarely_it_is_looked_at(
    every: int,
) -> None:
    """ln kappa as it was measured of the drill's GPT after its first steps: a slow saturation."""
    steps = np.arange(300, 3000, every)
    kappa = np.exp(3 + 0.3 * (1 - np.exp(-steps / 400)))
    readings = follow(tracker_of(1), kappa[:, None], first=300, every=every)
    assert {r.raw_level for r in readings[2:]} <= {STABLE, LEARNING}
    unbounded = follow(tracker_of(1, span=None), kappa[:, None], first=300, every=every)
    assert (INSTABILITY in {r.level for r in unbounded}) == (every > 1)


def test_nothing_is_said_before_the_third_observation() -> None:
    tracker = tracker_of(2)
    assert tracker.worst(5) == ()
    first, second, third = follow(tracker, walks(3, 2))
    for reading in (first, second):
        said = dataclasses.replace(reading, step=0, kappa=0.0, worst=(), level=STABLE)
        assert set(dataclasses.astuple(said)[2:]) == {None, STABLE, ()}
        assert reading.worst[0].slope is reading.worst[0].raw_level is None
    assert None not in dataclasses.astuple(third)


def test_a_model_without_matrices_can_be_followed() -> None:
    readings = follow(tracker_of(0), [[]] * 5)
    assert math.isnan(readings[-1].kappa)
    assert readings[-1].level is STABLE
    assert readings[-1].worst == ()


def test_after_a_million_observations_nothing_has_drifted() -> None:
    # The ring is what a million updates of it leave: only its last window is entered here, at the
    # steps and places of the end, on top of values of another magnitude.
    tracker = tracker_of(1, scale="absolute", window=50, span=None)
    follow(tracker, np.full((60, 1), 1e15))
    state = tracker.state_dict()
    state["pushed"] += 10**6 + 13  # the next place is not the first
    state["step"] = 10**12
    tracker.load_state_dict(state)
    rng = np.random.default_rng(0)
    last = 1e6 + rng.normal(size=50)
    reading = follow(tracker, last[:, None], first=10**12 + 1, every=7)[-1]
    exact = slope(last, np.arange(50) * 7, scale="absolute")
    assert reading.slope == pytest.approx(exact, abs=1e-10)
    assert reading.volatility == pytest.approx(np.std(last), rel=1e-10)


@pytest.mark.parametrize("window", [3, 50])
def test_memory_is_bounded_by_the_window(window: int) -> None:
    tracker = tracker_of(7, window=window)

    def held() -> int:
        tensors = [v for v in tracker.state_dict().values() if isinstance(v, torch.Tensor)]
        return sum(t.nbytes for t in tensors) + sys.getsizeof(vars(tracker))

    before, attributes = held(), sorted(vars(tracker))
    follow(tracker, walks(4 * window, 7))
    assert held() == before
    assert sorted(vars(tracker)) == attributes
    assert tracker.nbytes == 40 * 8 * window + 8 * 8


# ---- who is worst


def test_the_worst_matrices_come_first_and_are_named() -> None:
    rng = np.random.default_rng(0)
    steps = np.arange(60)
    log_kappa = np.stack(
        [
            0.0 * steps,
            0.0045 * steps,  # DANGER
            rng.normal(scale=0.01, size=60),  # INSTABILITY
            0.0600 * steps,  # DANGER, and further beyond it than any other beyond its own
            0.0010 * steps,  # LEARNING
        ],
        axis=1,
    )
    names = ["calm", "runs", "shakes", "races", "learns"]
    tracker = SpectralTracker(names, SpectralSettings(worst=2))
    reading = follow(tracker, 10 * np.exp(log_kappa))[-1]
    order = ["shakes", "races", "runs", "learns", "calm"]
    assert [m.name for m in tracker.worst(5)] == [m.name for m in tracker.worst(99)] == order
    assert [m.name for m in reading.worst] == order[:2]
    assert [m.name for m in tracker.worst()] == order[:1]
    assert [m.level for m in tracker.worst(5)] == [INSTABILITY, DANGER, DANGER, LEARNING, STABLE]


def test_before_anything_is_judged_the_largest_kappa_comes_first() -> None:
    tracker = tracker_of(4)
    observe(tracker, 0, [2.0, math.nan, 9.0, 4.0])
    assert [m.name for m in tracker.worst(4)] == ["m2", "m3", "m0", "m1"]


# ---- what is not finite, and what is not there


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("column", ["kappa", "sigma_max", "stable_rank"])
def test_one_observation_that_is_not_finite_changes_no_later_reading(
    bad: float, column: str
) -> None:
    rows = walks(80, 3, size=0.001)
    clean, spoilt = tracker_of(3), tracker_of(3)
    level = STABLE
    for step, row in enumerate(rows):
        if step != 40:
            reading = observe(spoilt, step, row)
            assert same(reading, observe(clean, step, row))
            assert reading.nonfinite == ()
            level = reading.level
            continue
        columns = {name: row.copy() for name in ("kappa", "sigma_max", "stable_rank")}
        columns[column][1] = bad
        reading = spoilt.update(step, **columns)
        assert reading.nonfinite == ("m1",)
        assert math.isnan(reading.kappa)
        assert reading.level is level
        # The two others were sound: the clean tracker sees them, and nothing of the third.
        without = np.where([False, True, False], math.nan, row)
        observe(clean, step, without)


def test_an_observation_in_which_nothing_is_finite_is_as_if_it_had_not_been() -> None:
    rows = walks(80, 3, size=0.002)
    clean, spoilt = tracker_of(3), tracker_of(3)
    for step, row in enumerate(rows):
        if step == 40:
            reading = observe(spoilt, step, [math.nan, math.inf, math.nan])
            assert reading.nonfinite == ("m0", "m1", "m2")
        else:
            assert same(observe(spoilt, step, row), observe(clean, step, row))


def test_a_nan_does_not_blind_the_other_matrices() -> None:
    rows = 10 * np.exp(0.005 * np.arange(60))[:, None] * np.ones(2)
    rows[:, 0] = math.nan
    tracker = tracker_of(2)
    reading = follow(tracker, rows)[-1]
    assert reading.worst[0].name == "m1"
    assert reading.worst[0].level is DANGER
    assert reading.level is DANGER  # a matrix that never was finite is no part of the aggregate
    assert reading.nonfinite == ("m0",)


def test_matrices_of_zeros_are_left_out_until_they_are_not() -> None:
    tracker = tracker_of(2)
    calm = follow(tracker, [[10.0, 0.0]] * 10)[-1]
    assert calm.kappa == 10.0
    assert calm.nonfinite == ()
    both = follow(tracker, [[10.0, 80.0]] * 10, first=10)
    # Another set of matrices is another quantity: no jump is seen where there was none.
    assert [r.slope for r in both[:3]] == [None, None, 0.0]
    assert {r.level for r in both} == {STABLE}
    assert both[-1].kappa == 80.0


def test_kappa_beyond_what_can_be_squared_is_not_taken_for_calm() -> None:
    tracker = tracker_of(1, scale="absolute", patience=1)
    reading = follow(tracker, [[1e300], [1e-300], [1.7e308]])[-1]
    assert reading.level is reading.worst[0].level is INSTABILITY


def test_a_mean_that_overflows_is_no_observation() -> None:
    readings = follow(tracker_of(2, aggregate="mean"), [[1e308, 1e308], *[[10.0, 10.0]] * 3])
    assert readings[0].kappa == math.inf
    assert readings[-1].slope == 0.0


# ---- input


def test_sequences_arrays_and_tensors_are_accepted() -> None:
    rows = walks(10, 2)
    kinds = [list, tuple, np.asarray, torch.tensor, lambda row: np.float64(row)]
    last = [follow(tracker_of(2), [kind(row) for row in rows])[-1] for kind in kinds]
    assert all(same(reading, last[0]) for reading in last)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"step": 2.5}, TypeError, "step is 2.5; accepted: an integer"),
        ({"step": 7}, ValueError, "step is 7; accepted: more than 7"),
        ({"kappa": [1.0]}, ValueError, "kappa holds 1 values; accepted: 2, one per matrix"),
        ({"sigma_max": [[1.0, 2.0]]}, ValueError, r"sigma_max has shape \(1, 2\)"),
        ({"stable_rank": [1.0, -2.0]}, ValueError, r"stable_rank\[1\] \(m1\) is -2.0; accepted"),
        ({"kappa": "ab"}, TypeError, "kappa is a str"),
        ({"kappa": None}, (TypeError, ValueError), "kappa"),
        ({"kappa": torch.ones(2, requires_grad=True)}, TypeError, "kappa is a Tensor"),
    ],
)
def test_bad_observations_are_named_and_not_taken_in(
    arguments: Any, error: Any, words: str
) -> None:
    tracker = tracker_of(2)
    observe(tracker, 7, [1.0, 2.0])
    before = repr(tracker.state_dict())
    good = {"step": 8, "kappa": [1.0, 1.0], "sigma_max": [1.0, 1.0], "stable_rank": [1.0, 1.0]}
    with pytest.raises(error, match=words):
        tracker.update(**{**good, **arguments})
    assert repr(tracker.state_dict()) == before


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: SpectralTracker("ab"), TypeError, "names is 'ab'; accepted: a sequence"),
        (lambda: SpectralTracker([1]), TypeError, "names is"),
        (lambda: SpectralTracker(["a", "b", "a"]), ValueError, "names holds 'a' more than once"),
        (lambda: SpectralTracker(["a"], {"window": 5}), TypeError, "settings is a dict; accepted"),
        (lambda: tracker_of(1).worst(0), ValueError, "k is 0; accepted: a positive integer"),
        (lambda: tracker_of(1, windw=5), ValueError, "did you mean 'window'"),
        (lambda: tracker_of(1, window=2), ValueError, "window"),
        (lambda: tracker_of(1, patience=0), ValueError, "patience"),
        (lambda: tracker_of(1, scale="log"), ValueError, "scale"),
        (lambda: tracker_of(1, aggregate="min"), ValueError, "aggregate"),
    ],
)
def test_bad_configuration_is_named(call: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()
