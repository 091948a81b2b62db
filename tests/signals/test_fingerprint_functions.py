"""The functions of the fingerprint, each against its formula written out another way."""

from __future__ import annotations

import cmath
import dataclasses
import math
import statistics
from collections import deque
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import foreshock as fs
from foreshock.signals import Precursor

NAN, INF = math.nan, math.inf

# Rounding of sums of up to a hundred terms in another order: measured up to 4e-15.
TOLERANCE = 1e-12

# Spread by far fewer digits than a double has, so that a scale or an offset loses none.
numbers = st.integers(-1000, 1000).map(float)
series = st.lists(numbers, max_size=40)
varying = st.lists(numbers, min_size=2, max_size=40).filter(lambda x: len(set(x)) > 1)
scales = st.sampled_from([2.0**-900, 1e-3, 1.0, 3.7, 1e9, 2.0**900])
norms = st.lists(st.floats(0, 1e6), min_size=1, max_size=40)
anything = st.lists(st.floats(width=64), max_size=80)


def spectrum_by_sums(x: list[float], n: int) -> list[float]:
    off = [v - math.fsum(x) / len(x) for v in x]
    power = [
        abs(sum(v * cmath.exp(-2j * math.pi * k * t / n) for t, v in enumerate(off))) ** 2
        for k in range(n // 2 + 1)
    ]
    return [p / math.fsum(power) for p in power]


def theta_by_sums(x: list[float], y: list[float], beta: float) -> float:
    n = 2
    while n < max(len(x), len(y)):
        n *= 2
    p, q = spectrum_by_sums(x, n), spectrum_by_sums(y, n)
    jsd = 0.0
    for a, b in zip(p, q, strict=True):
        jsd += sum(0.5 * v * math.log(v / ((a + b) / 2)) for v in (a, b) if v > 0)
    return math.exp(-beta * jsd)


def entropy_by_histogram(values: Any, bins: int, span: tuple[float, float]) -> float:
    counts, _ = np.histogram(values, bins=bins, range=span)
    return -sum(c / len(values) * math.log(c / len(values)) for c in counts if c)


# ---- theta


@settings(deadline=None, max_examples=60)
@given(varying, varying, st.sampled_from([0.5, 3.0, 10.0]))
def test_theta_is_its_formula(x: list[float], y: list[float], beta: float) -> None:
    expected = theta_by_sums(x, y, beta)
    assert fs.theta_consistency(x, y, beta) == pytest.approx(expected, rel=1e-9)


@settings(deadline=None)
@given(anything, anything)
def test_theta_lies_between_its_bounds_and_is_symmetric(x: list[float], y: list[float]) -> None:
    theta = fs.theta_consistency(x, y)
    assert math.exp(-3 * math.log(2)) <= theta <= 1.0
    assert theta == fs.theta_consistency(y, x)
    assert fs.theta_consistency(x, x) == fs.theta_consistency(y, y) == 1.0


@settings(deadline=None)
@given(varying, varying, scales, st.integers(-1000, 1000))
def test_theta_is_free_of_scale_and_offset(
    x: list[float], y: list[float], scale: float, offset: int
) -> None:
    moved = [(v + offset) * scale for v in x]
    assert fs.theta_consistency(moved, y) == pytest.approx(fs.theta_consistency(x, y), rel=1e-6)


def test_theta_of_two_lengths_uses_the_transform_of_the_longer() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=10).tolist(), rng.normal(size=33).tolist()
    expected = theta_by_sums(x, y, 3.0)  # over 64 frequencies
    assert fs.theta_consistency(x, y) == pytest.approx(expected, rel=TOLERANCE)
    assert fs.theta_consistency(y, x) == pytest.approx(expected, rel=TOLERANCE)


def test_two_tones_that_share_no_frequency_have_nothing_in_common() -> None:
    t = np.arange(64)
    low, high = np.sin(2 * np.pi * 4 * t / 64), np.sin(2 * np.pi * 16 * t / 64)
    assert fs.theta_consistency(low, high) == pytest.approx(0.125)
    assert fs.theta_consistency(low, 5 * np.cos(2 * np.pi * 4 * t / 64)) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        ([], [], 1.0),
        ([], [1.0, 2.0, 1.0], 1.0),
        ([5.0], [1.0, 2.0, 1.0], 1.0),
        ([5.0], [7.0], 1.0),
        ([5.0, 5.0, 5.0], [0.1] * 9, 1.0),
        ([5.0, 5.0, 5.0], [1.0, 2.0, 1.0], 0.125),
        ([NAN, INF, NAN], [1.0, 2.0, 1.0], 0.125),
        ([NAN, 4.0, NAN], [1.0, 2.0, 1.0], 0.125),
    ],
    ids=str,
)
def test_theta_of_what_has_no_spectrum(x: list[float], y: list[float], expected: float) -> None:
    assert fs.theta_consistency(x, y) == pytest.approx(expected)
    assert fs.theta_consistency(y, x) == pytest.approx(expected)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_value_that_is_not_finite_is_left_out_of_theta(bad: float) -> None:
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=40), rng.normal(size=40)
    clean = fs.theta_consistency(x, y)
    assert fs.theta_consistency(np.insert(x, 17, bad), y) == clean
    assert fs.theta_consistency(x, np.insert(y, 0, bad)) == clean


def test_theta_of_extreme_magnitudes_is_that_of_ordinary_ones() -> None:
    x, y = [1.0, -1.0, 0.5, 0.25], [1.0, 1.0, -1.0, 0.5]
    clean = fs.theta_consistency(x, y)
    top = np.array(x) * 1.7e308
    assert fs.theta_consistency(top, y) == pytest.approx(clean, rel=TOLERANCE)
    assert fs.theta_consistency(np.array(x) * 2.0**-1070, y) == pytest.approx(clean, rel=TOLERANCE)


# ---- entropy rate


@settings(deadline=None)
@given(st.lists(numbers, max_size=90), st.sampled_from([1, 2, 7, 32]), st.booleans())
def test_entropy_rate_is_its_formula(values: list[float], window: int, shared: bool) -> None:
    found = fs.entropy_rate(values, window, shared_range=shared)
    if len(values) < 2 * window:
        assert found == 0.0
        return
    before, last = values[-2 * window : -window], values[-window:]
    both = (min(before + last), max(before + last))
    spans = [both if shared else (min(half), max(half)) for half in (before, last)]
    h_before = entropy_by_histogram(before, 8, spans[0])
    assert found == pytest.approx(entropy_by_histogram(last, 8, spans[1]) - h_before, abs=1e-12)


def test_bins_grow_with_the_root_of_the_window() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=288)
    expected = entropy_by_histogram(values[-144:], 12, (values.min(), values.max()))
    expected -= entropy_by_histogram(values[:144], 12, (values.min(), values.max()))
    assert fs.entropy_rate(values, 144) == pytest.approx(expected, abs=TOLERANCE)


def test_a_value_on_an_edge_belongs_to_the_bin_above_it_and_the_last_edge_to_the_last() -> None:
    before, last = [0.0, 8.0, 1.0, 1.5], [2.0, 2.5, 7.0, 8.0]
    expected = entropy_by_histogram(last, 8, (0, 8)) - entropy_by_histogram(before, 8, (0, 8))
    assert fs.entropy_rate(before + last, 4) == pytest.approx(expected, abs=TOLERANCE)
    assert expected == pytest.approx(-math.log(2) / 2)  # two and two, after one, one and two


def test_a_change_of_spread_is_seen_only_in_a_shared_range() -> None:
    shape = np.random.default_rng(0).uniform(-1, 1, size=32)
    wider = np.concatenate([shape, 16 * shape])
    assert fs.entropy_rate(wider) > 1.0
    assert fs.entropy_rate(wider[::-1]) < -1.0
    assert fs.entropy_rate(wider, shared_range=False) == pytest.approx(0.0, abs=TOLERANCE)


@settings(deadline=None)
@given(anything, st.sampled_from([1, 4, 32]))
def test_entropy_rate_is_bounded_by_the_bins(values: list[float], window: int) -> None:
    for shared in (True, False):
        rate = fs.entropy_rate(values, window, shared_range=shared)
        assert abs(rate) <= math.log(8) + TOLERANCE


@pytest.mark.parametrize("values", [[], [1.0], [3.0] * 64, [NAN] * 64, [1.0] * 63], ids=len)
def test_entropy_rate_of_too_little_or_constant_is_zero(values: list[float]) -> None:
    assert fs.entropy_rate(values) == 0.0


def test_a_value_that_is_not_finite_is_left_out_of_the_entropy() -> None:
    values = np.random.default_rng(0).normal(size=70)
    spoilt = np.insert(values, [3, 40, 70], [NAN, INF, -INF])
    assert fs.entropy_rate(spoilt) == fs.entropy_rate(values)


def test_entropy_of_values_as_far_apart_as_floats_go() -> None:
    values = [1.7e308, -1.7e308] * 32
    assert fs.entropy_rate(values) == 0.0
    assert fs.entropy_rate([0.0] * 32 + values[:32]) == pytest.approx(math.log(2))
    assert fs.entropy_rate([5e-324, 0.0] * 32) == 0.0


# ---- processivity


@settings(deadline=None)
@given(st.data(), st.integers(1, 40))
def test_processivity_is_its_formula(data: st.DataObject, size: int) -> None:
    g, s = (
        data.draw(st.lists(st.floats(-1e6, 1e6), min_size=size, max_size=size)) for _ in range(2)
    )
    lengths = [math.sqrt(math.fsum(v * v for v in x)) for x in (g, s)]
    assume(min(lengths) > 1e-100)
    expected = math.fsum(a * b for a, b in zip(g, s, strict=True)) / lengths[0] / lengths[1]
    assert fs.processivity(g, s) == pytest.approx(expected, abs=TOLERANCE)


@settings(deadline=None)
@given(anything, st.randoms(use_true_random=False), scales)
def test_processivity_lies_between_minus_one_and_one(
    x: list[float], rng: Any, scale: float
) -> None:
    shuffled = rng.sample(x, len(x))
    cosine = fs.processivity(x, shuffled)
    assert -1.0 <= cosine <= 1.0
    assert cosine == fs.processivity(shuffled, x)


@settings(deadline=None)
@given(norms, scales)
def test_processivity_is_free_of_scale(x: list[float], scale: float) -> None:
    y = x[::-1]
    assume(max(x) > 1e-3)
    scaled = [v * scale for v in x]
    assert fs.processivity(scaled, y) == pytest.approx(fs.processivity(x, y), abs=1e-9)
    assert fs.processivity([-v for v in x], y) == -fs.processivity(x, y)


@pytest.mark.parametrize(
    ("g", "s"), [([], []), ([], [1.0]), ([1.0, 2.0], []), ([0.0], [1.0]), ([NAN, 1.0], [1.0, NAN])]
)
def test_processivity_of_nothing_is_zero(g: list[float], s: list[float]) -> None:
    assert fs.processivity(g, s) == 0.0


def test_a_pair_that_is_not_finite_is_left_out_of_the_processivity() -> None:
    g, s = [1.0, NAN, 3.0, 4.0], [2.0, 1.0, INF, 1.0]
    assert fs.processivity(g, s) == fs.processivity([1.0, 4.0], [2.0, 1.0]) > 0


# ---- f_total


@given(*[st.floats(-1e6, 1e6)] * 4)
def test_f_total_is_its_formula(s_dot: float, p: float, w_s: float, w_p: float) -> None:
    assert fs.f_total(s_dot, p, w_s, w_p) == w_s * s_dot + w_p * p
    assert fs.f_total(s_dot, p) == s_dot + p


# ---- the precursor


@settings(deadline=None)
@given(series, st.sampled_from([(10, 2.0), (1, 2.0), (2.9, 1.0), (0.1, 2.0)]))
def test_precursor_is_its_formula(values: list[float], shape: tuple[float, float]) -> None:
    rate_hz, window_sec = shape
    found = fs.two_second_precursor(values, rate_hz, window_sec)
    w = max(1, int(rate_hz * window_sec))
    if len(values) < 2 * w:
        assert found == (False, 0.0)
        return
    last, rest = values[-w:], values[:-w]
    rise = statistics.fmean(last) - statistics.fmean(rest)
    expected = rise / (statistics.pstdev(rest) + 1e-12)
    # The sums' own rounding, over the smallest divisor there is.
    assert found.score == pytest.approx(expected, rel=1e-9, abs=1.0 if len(set(rest)) == 1 else 0)
    assert found.alert == (found.score > 2.5)


@given(st.integers(1, 1000))
def test_precursor_alerts_on_a_step_up_and_not_on_one_down(seed: int) -> None:
    noise = np.random.default_rng(seed).normal(size=200)
    step = np.where(np.arange(200) >= 180, 4.0, 0.0)
    assert fs.two_second_precursor(noise + step).alert
    assert not fs.two_second_precursor(noise).alert
    assert fs.two_second_precursor(noise - step) == (False, pytest.approx(-4.0, abs=2.0))


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("others", [0, 3, 100])
def test_a_value_that_is_not_finite_is_an_alert_however_few_there_are(
    bad: float, others: int
) -> None:
    assert fs.two_second_precursor([*[1.0] * others, bad]) == (True, INF)


def test_precursor_of_too_little_or_constant_is_silent() -> None:
    for values in ([], [1.0], list(range(39)), [7.0] * 100):
        assert fs.two_second_precursor(values) == (False, 0.0)


def test_the_score_must_exceed_the_threshold() -> None:
    values = [-1.0, 1.0] * 20 + [2.0] * 20
    score = fs.two_second_precursor(values).score
    assert score == pytest.approx(2.0)
    assert not fs.two_second_precursor(values, z=score).alert
    assert fs.two_second_precursor(values, z=score - 1e-9).alert
    assert not fs.two_second_precursor(values, z=INF).alert


def test_precursor_of_values_too_large_to_square() -> None:
    noise = np.random.default_rng(0).normal(size=100)
    expected = fs.two_second_precursor(noise).score
    assert fs.two_second_precursor(noise * 2.0**1020).score == pytest.approx(expected, rel=1e-9)


# ---- all of them


def test_snapshot_has_what_the_six_functions_say() -> None:
    rng = np.random.default_rng(0)
    noise, ref, values, watched = rng.normal(size=(4, 100))
    g, s = rng.uniform(size=(2, 50))
    whole = fs.signals.snapshot(noise, ref, g, s, values=values, series=watched, w_s=2.0, w_p=0.5)
    s_dot, p = fs.entropy_rate(values), fs.processivity(g, s)
    alert, score = fs.two_second_precursor(watched)
    expected = (fs.theta_consistency(noise, ref), s_dot, p, 2 * s_dot + 0.5 * p, alert, score)
    assert dataclasses.astuple(whole) == expected
    one = fs.signals.snapshot(noise, ref, g, s, window=16, beta=1.0, rate_hz=4, z=0.0)
    assert one.entropy_rate == fs.entropy_rate(noise, 16)
    assert one.theta == fs.theta_consistency(noise, ref, 1.0)
    alert, score = fs.two_second_precursor(noise, rate_hz=4, z=0.0)
    assert (one.precursor_alert, one.precursor_score) == (alert, score)


def test_snapshot_at_the_start_of_a_run() -> None:
    empty = fs.signals.snapshot([], [], [], [])
    assert dataclasses.astuple(empty) == (1.0, 0.0, 0.0, 0.0, False, 0.0)


# ---- what is accepted


def test_public_names_are_where_they_belong() -> None:
    for name in ("theta_consistency", "entropy_rate", "processivity", "f_total"):
        assert getattr(fs, name) is getattr(fs.signals, name)
        assert name in dir(fs)
    assert fs.two_second_precursor is fs.signals.two_second_precursor


def test_sequences_arrays_and_tensors_give_the_same_floats() -> None:
    values = np.random.default_rng(0).normal(size=80).astype(np.float32)
    other = values[::-1].copy()
    kinds: list[Any] = [
        lambda x: x,
        lambda x: x.tolist(),
        lambda x: tuple(x),
        lambda x: deque(x.tolist()),
        lambda x: (v for v in x),
        torch.from_numpy,
        lambda x: torch.from_numpy(x).double(),
        lambda x: torch.nn.Parameter(torch.from_numpy(x)),
        lambda x: list(torch.from_numpy(x).requires_grad_().unbind()),
    ]
    found = []
    for kind in kinds:
        x, y = lambda kind=kind: kind(values), lambda kind=kind: kind(other)
        alert, score = fs.two_second_precursor(x())
        answers = (
            fs.theta_consistency(x(), y()),
            fs.entropy_rate(x()),
            fs.processivity(x(), y()),
            score,
        )
        assert all(type(answer) is float for answer in answers)
        assert type(alert) is bool
        found.append(answers)
    assert all(answers == found[0] for answers in found)
    assert isinstance(fs.two_second_precursor([]), Precursor)


def test_half_precision_and_integers_are_accepted() -> None:
    x = torch.tensor([1.0, 2.0, 4.0, 1.0])
    expected = fs.theta_consistency(x, [1, 2, 3, 5])
    for dtype in (torch.bfloat16, torch.float16, torch.int64):
        assert fs.theta_consistency(x.to(dtype), torch.tensor([1, 2, 3, 5])) == expected
    assert fs.f_total(torch.tensor(1.5, requires_grad=True), 1) == 2.5


@pytest.mark.gpu
def test_series_on_a_device_are_accepted() -> None:
    x = torch.randn(80, device="cuda")
    assert fs.entropy_rate(x) == fs.entropy_rate(list(x.unbind())) == fs.entropy_rate(x.cpu())


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: fs.theta_consistency("ab", [1.0]), TypeError, "noise_seq is a str"),
        (lambda: fs.theta_consistency([1.0], ["1", "2"]), TypeError, "ref_seq is a list"),
        (lambda: fs.theta_consistency([1j, 2j], [1.0]), TypeError, "noise_seq .* complex128"),
        (lambda: fs.theta_consistency(3.0, [1.0]), TypeError, "noise_seq is a float"),
        (lambda: fs.theta_consistency(None, [1.0]), TypeError, "noise_seq is a NoneType"),
        (lambda: fs.theta_consistency([[1.0]], [1.0]), ValueError, r"noise_seq has shape \(1, 1\)"),
        (
            lambda: fs.theta_consistency([1.0], torch.ones(())),
            ValueError,
            r"ref_seq has shape \(\)",
        ),
        (lambda: fs.theta_consistency([], [], -1.0), ValueError, "beta is -1.0; accepted"),
        (lambda: fs.theta_consistency([], [], NAN), ValueError, "beta is nan; accepted"),
        (lambda: fs.theta_consistency([], [], "3"), TypeError, "beta is '3'; accepted"),
        (lambda: fs.entropy_rate([None, 1.0]), TypeError, "values is a list"),
        (lambda: fs.entropy_rate([1.0], 0), ValueError, "window is 0; accepted"),
        (lambda: fs.entropy_rate([1.0], 2.5), TypeError, "window is 2.5; accepted: an integer"),
        (
            lambda: fs.processivity([1.0], [1.0, 2.0]),
            ValueError,
            "step_norms holds 2 .* 1, as many",
        ),
        (lambda: fs.f_total(NAN, 0.0), ValueError, "s_dot is nan; accepted: a finite"),
        (lambda: fs.f_total(0.0, 0.0, w_p=INF), ValueError, "w_p is inf"),
        (lambda: fs.f_total(0.0, None), TypeError, "p is None; accepted: a number"),
        (lambda: fs.two_second_precursor([], 0), ValueError, "rate_hz is 0.0; accepted"),
        (lambda: fs.two_second_precursor([], window_sec=-1), ValueError, "window_sec is -1.0"),
        (lambda: fs.two_second_precursor([], z=NAN), ValueError, "z is nan; accepted"),
        (lambda: fs.signals.snapshot([], [], [1.0], [1.0, 2.0]), ValueError, "step_norms"),
    ],
)
def test_bad_input_is_named(call: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()
