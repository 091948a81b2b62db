import math

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foreshock.records.curves_envelope import MAX_BUCKETS, Envelope
from foreshock.records.metrics_statistics import MetricStatistics


def statistics_of(batches):
    found = MetricStatistics()
    for batch in batches:
        found.add(batch)
    return found.summary()


_batches = st.lists(st.lists(st.floats(-1e6, 1e6), max_size=6), max_size=8)


@settings(deadline=None)
@given(_batches)
def test_batches_of_any_size_give_what_all_values_at_once_give(batches):
    values = [value for batch in batches for value in batch]
    found = statistics_of(batches)
    assert found["count"] == len(values)
    if not values:
        assert found["min"] is found["mean"] is found["std"] is found["final"] is None
        return
    assert (found["min"], found["max"], found["final"]) == (min(values), max(values), values[-1])
    assert found["mean"] == pytest.approx(numpy.mean(values), abs=1e-8)
    assert found["std"] == pytest.approx(numpy.std(values), rel=1e-6, abs=1e-6)


def test_spread_on_a_large_offset_does_not_cancel():
    values = [1e9 + value for value in (4.0, 7.0, 13.0, 16.0)] * 1000
    found = statistics_of([values[start : start + 10] for start in range(0, 4000, 10)])
    assert found["std"] == pytest.approx(math.sqrt(22.5), rel=1e-9)
    assert found["mean"] == pytest.approx(1e9 + 10, rel=1e-15)


def test_nonfinite_values_are_counted_and_never_enter():
    """Trap 1: one NaN must not blind a statistic."""
    found = statistics_of([[1.0, math.nan], [math.inf], [3.0, -math.inf]])
    assert (found["count"], found["nonfinite"]) == (2, 3)
    assert (found["min"], found["max"], found["mean"], found["std"]) == (1.0, 3.0, 2.0, 1.0)
    assert found["final"] == -math.inf


def test_largest_floats_have_a_mean():
    largest = 1.7976931348623157e308
    found = statistics_of([[largest, largest], [-largest], [largest]])
    assert found["count"] == 4
    assert found["mean"] == pytest.approx(largest / 2)


def test_short_curve_is_kept_value_by_value():
    curve = Envelope()
    curve.add(range(100), [1 / (1 + step) for step in range(100)])
    assert curve.width == 1
    assert [(b.step, b.mean) for b in curve.buckets()] == [
        (step, 1 / (1 + step)) for step in range(100)
    ]


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.tuples(st.integers(0, 10**6), st.floats()), min_size=1, max_size=50),
    st.integers(1, 40),
)
def test_no_extreme_is_lost_in_any_order_of_steps(points, num_lines):
    curve = Envelope()
    for line in range(num_lines):
        curve.add(range(line * 1000, line * 1000 + 1000), [0.5] * 1000)
    for step, value in points:
        curve.add([step], [value])
    buckets = curve.buckets()
    assert len(buckets) <= MAX_BUCKETS
    assert [b.step for b in buckets] == sorted(b.step for b in buckets)
    for step, value in points:
        (bucket,) = [b for b in buckets if b.step <= step < b.step + curve.width]
        if math.isfinite(value):
            assert bucket.low <= value <= bucket.high
        else:
            assert bucket.nonfinite > 0


@pytest.mark.parametrize("step", [0, 33_333, 54_321, 65_535, 65_536, 77_777, 99_999])
def test_single_spike_in_a_long_curve_is_kept(step):
    for spike in (9.0, -9.0):
        curve = Envelope()
        curve.add(range(100_000), [spike if at == step else 1.0 for at in range(100_000)])
        (bucket,) = [b for b in curve.buckets() if b.step <= step < b.step + curve.width]
        assert (bucket.low, bucket.high) == (min(spike, 1.0), max(spike, 1.0))


def test_mean_of_a_long_curve_is_that_of_its_values():
    curve = Envelope()
    curve.add(range(100_000), [step % 7 for step in range(100_000)])
    assert curve.width == 64
    for bucket in curve.buckets():
        steps = range(bucket.step, min(bucket.step + 64, 100_000))
        assert bucket.mean == pytest.approx(numpy.mean([step % 7 for step in steps]))
