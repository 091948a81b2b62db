"""The streams of the fingerprint: the functions, over windows that forget."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foreshock.signals import (
    EntropyRateStream,
    NoiseReference,
    NoiseSeries,
    ProcessivityStream,
    ThetaStream,
    entropy_rate,
    processivity,
    theta_consistency,
)

NAN, INF = math.nan, math.inf

STREAMS: dict[str, Callable[[], Any]] = {
    "theta": lambda: ThetaStream(window=20, reference_steps=12),
    "entropy_rate": lambda: EntropyRateStream(window=10),
    "processivity": lambda: ProcessivityStream(window=15),
}


def fill(stream: Any, values: Any) -> None:
    for value in values:
        if isinstance(stream, ProcessivityStream):
            stream.update(abs(value), abs(value) + 0.1, math.tanh(value))
        else:
            stream.update(value)


# ---- each is its function


@given(st.integers(0, 10**6), st.integers(2, 30), st.integers(2, 30), st.integers(0, 90))
@settings(deadline=None)
def test_theta_of_the_last_window_against_the_first_values(
    seed: int, window: int, steps: int, observed: int
) -> None:
    values = np.random.default_rng(seed).normal(size=observed)
    stream = ThetaStream(window, steps, beta=2.0)
    fill(stream, values)
    assert stream.reference.values == tuple(values[:steps])
    assert stream.reference.is_complete == (observed >= steps)
    if observed < steps + window:
        assert stream.read() is None
    else:
        assert stream.read() == theta_consistency(values[-window:], values[:steps], 2.0)


@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(0, 90), st.booleans())
@settings(deadline=None)
def test_entropy_rate_of_the_last_two_windows(
    seed: int, window: int, observed: int, shared: bool
) -> None:
    values = np.random.default_rng(seed).normal(size=observed)
    stream = EntropyRateStream(window, shared_range=shared)
    fill(stream, values)
    if observed < 2 * window:
        assert stream.read() is None
    else:
        assert stream.read() == entropy_rate(values, window, shared_range=shared)


@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(0, 90))
@settings(deadline=None)
def test_processivity_and_alignment_of_the_last_window(
    seed: int, window: int, observed: int
) -> None:
    g, s = np.random.default_rng(seed).uniform(size=(2, observed))
    stream = ProcessivityStream(window)
    for norms in zip(g, s, strict=True):
        stream.update(*norms, alignment=norms[0])
    if observed < window:
        assert stream.read() is None
    else:
        assert stream.read() == processivity(g[-window:], s[-window:])
    if observed:
        assert stream.alignment == pytest.approx(statistics.fmean(g[-window:]))
    else:
        assert stream.alignment is None


def test_norms_enter_in_pairs_and_alignments_alone() -> None:
    stream = ProcessivityStream(2)
    stream.update(1.0, None, 0.5)
    stream.update(None, 1.0)
    stream.update(alignment=1.0 + 1e-6)
    assert stream.read() is None
    assert stream.alignment == 0.75
    stream.update(3.0, 4.0)
    stream.update(4.0, 3.0)
    assert stream.read() == pytest.approx(24 / 25)


# ---- one bad value does not blind


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("kind", ["theta", "entropy_rate"])
def test_a_value_that_is_not_finite_leaves_no_trace(kind: str, bad: float) -> None:
    values = np.random.default_rng(0).normal(size=60)
    clean, spoilt = STREAMS[kind](), STREAMS[kind]()
    fill(clean, values)
    fill(spoilt, np.insert(values, [0, 5, 30, 60], bad))
    assert spoilt.read() == clean.read() is not None
    assert spoilt.state_dict() == clean.state_dict()


@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_norm_that_is_not_finite_leaves_no_trace(bad: float) -> None:
    stream = ProcessivityStream(3)
    for norms in [(1.0, 2.0), (bad, 1.0), (2.0, 1.0), (1.0, bad), (3.0, 1.0)]:
        stream.update(*norms, alignment=NAN)
    assert stream.read() == processivity([1.0, 2.0, 3.0], [2.0, 1.0, 1.0])
    assert stream.alignment is None


# ---- noise


def test_noise_is_the_distance_from_the_running_median() -> None:
    values = np.random.default_rng(0).uniform(size=100)  # nothing of which lies beyond the fences
    noise = NoiseSeries(21)
    for i, value in enumerate(values):
        found = noise.update(value)
        if i < 8:
            assert found is None
        else:
            last = sorted(values[max(0, i - 21) : i])
            assert found == value - last[len(last) // 2]


def test_logarithmic_noise_is_relative() -> None:
    values = np.random.default_rng(0).uniform(1, 2, size=100)
    small, large, plain = (NoiseSeries(is_logarithmic=flag) for flag in (True, True, False))
    for value in values:
        found = small.update(value)
        expected = plain.update(math.log(value))
        scaled = large.update(1e6 * value)
        assert found == expected
        assert scaled == (expected if expected is None else pytest.approx(expected, abs=1e-12))


@pytest.mark.parametrize("bad", [NAN, INF, -INF, 0.0, -1.0])
def test_what_has_no_logarithm_is_no_noise(bad: float) -> None:
    values = np.random.default_rng(0).uniform(1, 2, size=50)
    clean, spoilt = (NoiseSeries(is_logarithmic=True) for _ in range(2))
    for value in values:
        assert spoilt.update(bad) is None
        assert spoilt.update(value) == clean.update(value)


def test_an_outlier_comes_out_winsorised_and_does_not_hang_in_the_median() -> None:
    values = np.random.default_rng(0).normal(size=200)
    calm, struck = NoiseSeries(), NoiseSeries()
    for i, value in enumerate(values):
        before, after = calm.update(value), struck.update(1e9 if i == 100 else value)
        if i == 100:
            assert after is not None
            assert 3 < after < 10  # Tukey's fence of normal noise lies at 4.7
        elif before is not None and after is not None:
            assert abs(after - before) < 1.0


def test_a_series_that_starts_to_vary_is_not_winsorised_to_nothing() -> None:
    noise = NoiseSeries(8)
    assert [noise.update(5.0) for _ in range(9)] == [None] * 8 + [0.0]
    assert noise.update(7.0) == 2.0


def test_noise_too_large_for_a_float_is_left_out() -> None:
    noise = NoiseSeries(8)
    for value in [1.7e308, -1.7e308] * 10:
        found = noise.update(value)
        assert found is None or math.isfinite(found)


# ---- the reference


def test_a_reference_is_recorded_once_and_knows_what_healthy_is() -> None:
    values = np.random.default_rng(0).normal(size=40)
    reference = NoiseReference(31)
    for value in [NAN, *values[:30]]:
        reference.update(value)
    assert not reference.is_complete
    assert reference.self_consistency() is None
    for value in values[30:]:
        reference.update(value)
    assert reference.values == tuple(values[:31])
    assert reference.self_consistency(2.0) == theta_consistency(values[16:31], values[:15], 2.0)


def test_a_reference_of_an_earlier_run_takes_the_place_of_ones_own() -> None:
    rng = np.random.default_rng(0)
    earlier, stream = (ThetaStream(20, 12) for _ in range(2))
    healthy, values = rng.normal(size=12), rng.normal(size=50)
    fill(earlier, healthy[:11])
    with pytest.raises(ValueError, match="holds 11 values; accepted: 12"):
        stream.load_reference(earlier.reference.state_dict())
    fill(earlier, healthy[11:])
    fill(stream, values)
    stream.load_reference(json.loads(json.dumps(earlier.reference.state_dict())))
    assert stream.read() is None  # nothing of before counts
    fill(stream, values[:20])
    assert stream.read() == theta_consistency(values[:20], healthy)


# ---- state


@pytest.mark.parametrize("kind", STREAMS)
@pytest.mark.parametrize("cut", [0, 5, 13, 50])
def test_a_restored_stream_goes_on_as_the_saved_one(kind: str, cut: int) -> None:
    values = np.random.default_rng(cut).normal(size=100)
    one, other = STREAMS[kind](), STREAMS[kind]()
    fill(one, values[:cut])
    fill(other, values[50:77])
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    for value in values[cut:]:
        fill(one, [value])
        fill(other, [value])
        assert one.read() == other.read()
    assert one.read() is not None
    assert one.state_dict() == other.state_dict()


@pytest.mark.parametrize("cut", [3, 20, 60])
def test_restored_noise_goes_on_as_the_saved_one(cut: int) -> None:
    values = np.random.default_rng(cut).normal(size=100).tolist()
    one, other = NoiseSeries(21), NoiseSeries(21)
    for value in values[:cut]:
        one.update(value)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert [one.update(v) for v in values[cut:]] == [other.update(v) for v in values[cut:]]


@pytest.mark.parametrize("kind", STREAMS)
def test_state_does_not_grow(kind: str) -> None:
    stream = STREAMS[kind]()
    values = np.random.default_rng(0).normal(size=500)
    fill(stream, values[:100])

    def held(state: Any) -> int:
        if isinstance(state, dict):
            return sum(held(value) for value in state.values())
        return len(state) if isinstance(state, list) else 1

    before = held(stream.state_dict())
    fill(stream, values)
    assert held(stream.state_dict()) == before


@pytest.mark.parametrize(
    ("make", "other"),
    [
        (lambda: NoiseSeries(9), lambda: NoiseSeries(9, is_logarithmic=True)),
        (lambda: NoiseReference(9), lambda: NoiseReference(8)),
        (lambda: ThetaStream(9), lambda: ThetaStream(9, beta=1.0)),
        (lambda: ThetaStream(9, 9), lambda: ThetaStream(9, 8)),
        (lambda: EntropyRateStream(9), lambda: EntropyRateStream(9, shared_range=False)),
        (lambda: ProcessivityStream(9), lambda: ProcessivityStream(8)),
    ],
)
def test_the_state_of_another_stream_is_refused(make: Any, other: Any) -> None:
    with pytest.raises(ValueError, match=r"state_dict\['settings'\] is .*; accepted"):
        make().load_state_dict(other().state_dict())


def test_a_state_with_holes_is_refused_and_nothing_is_loaded() -> None:
    stream = ThetaStream(4, 2)
    fill(stream, [1.0, 2.0, 3.0])
    good = stream.state_dict()
    for bad, error in [
        ({**good, "window": [1.0] * 5}, ValueError),
        ({**good, "window": [NAN]}, ValueError),
        ({**good, "window": "abc"}, TypeError),
        ({**good, "window": [9.0], "reference": {}}, KeyError),
    ]:
        with pytest.raises(error):
            stream.load_state_dict(bad)
        assert stream.state_dict() == good


# ---- what is accepted


def test_tensors_are_accepted_as_numbers() -> None:
    stream = EntropyRateStream(1)
    stream.update(torch.tensor(1.0, requires_grad=True))  # type: ignore[arg-type]
    stream.update(torch.tensor([2.0], dtype=torch.bfloat16))  # type: ignore[arg-type]
    assert stream.state_dict()["values"] == [1.0, 2.0]


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: NoiseSeries(7), ValueError, "median_of is 7; accepted: an integer of at least 8"),
        (lambda: NoiseSeries().update("x"), TypeError, "value is 'x'; accepted: a number"),
        (lambda: NoiseReference(1), ValueError, "steps is 1; accepted"),
        (lambda: ThetaStream(True), TypeError, "window is True; accepted"),
        (lambda: ThetaStream(beta=NAN), ValueError, "beta is nan"),
        (lambda: ThetaStream(beta=-1), ValueError, "beta is -1.0; accepted"),
        (lambda: ThetaStream().update(None), TypeError, "value is None"),
        (lambda: EntropyRateStream(0), ValueError, "window is 0"),
        (lambda: ProcessivityStream(0), ValueError, "window is 0"),
        (lambda: ProcessivityStream().update(-1.0, 1.0), ValueError, "grad_norm is -1.0; accepted"),
        (lambda: ProcessivityStream().update(1.0, -INF), ValueError, "step_norm is -inf; accepted"),
        (lambda: ProcessivityStream().update(alignment=1.1), ValueError, "alignment is 1.1"),
        (lambda: ProcessivityStream().update(torch.ones(2)), TypeError, "grad_norm is tensor"),
    ],
)
def test_bad_input_is_named(call: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()
