"""Losses and norms that stand out."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from foreshock.guard import Guard, Reason
from foreshock.guard.spikes import SpikeDetector

LOSS, GRADIENT = Reason.LOSS_SPIKE, Reason.GRADIENT_SPIKE


def detector(**given: Any) -> SpikeDetector:
    return SpikeDetector(Guard(**given))


def losses(count: int, seed: int = 0) -> list[float]:
    return (2 + 0.1 * np.random.default_rng(seed).normal(size=count)).tolist()


def feed(spikes: SpikeDetector, values: list[float]) -> list[tuple[Reason, ...]]:
    return [spikes.update(value, 1.0 + 0.01 * (i % 7)) for i, value in enumerate(values)]


def test_one_nan_in_the_loss_changes_no_later_score() -> None:
    """Trap 1."""
    values = losses(200)
    with_nan, without = detector(), detector()
    scores = []
    for i, value in enumerate(values):
        if i in (5, 60, 61):
            assert with_nan.update(math.nan, math.inf) == ()
            assert with_nan.loss_z is None
        with_nan.update(value, 1.0 + 0.01 * (i % 7))
        without.update(value, 1.0 + 0.01 * (i % 7))
        scores.append((with_nan.loss_z, with_nan.grad_norm_z))
        assert scores[-1] == (without.loss_z, without.grad_norm_z)
    assert scores[31] == (None, None)
    assert None not in scores[40]


def test_eight_spikes_in_a_row_are_all_seen() -> None:
    """Trap 2: with a plain window the later of them hide behind the first."""
    found = feed(detector(), [*losses(128), *[20.0] * 8, *losses(64, seed=1)])
    assert [i for i, reasons in enumerate(found) if reasons] == list(range(128, 136))
    assert found[130] == (LOSS,)


def test_the_first_steps_are_protected_too() -> None:
    """Trap 4."""
    values = losses(31)
    values[7] = 25.0
    values[8] = 25.0
    assert [i for i, found in enumerate(feed(detector(), values)) if found] == [7, 8]
    first = detector()
    assert first.update(1e5, 3.0) == ()
    assert first.update(2.0, 31.0) == (GRADIENT,)
    assert first.update(2.0, 29.0) == ()


def test_a_slow_drift_is_no_spike() -> None:
    rising = [2 * 1.01**i * (1 + 0.01 * math.sin(i)) for i in range(700)]
    falling = [10 * 0.99**i * (1 + 0.01 * math.sin(i)) for i in range(700)]
    for values in (rising, falling):
        assert not any(feed(detector(), values))


def test_a_norm_that_spikes_is_told_from_a_loss_that_does() -> None:
    spikes = detector()
    feed(spikes, losses(100))
    assert spikes.update(2.0, 5.0) == (GRADIENT,)
    assert spikes.grad_norm_z > 8 > spikes.loss_z > -8
    assert spikes.update(20.0, 5.0) == (LOSS, GRADIENT)


def test_a_threshold_of_infinity_switches_it_off() -> None:
    spikes = detector(spike_z=math.inf)
    assert not any(feed(spikes, [*losses(100), 1e30]))


def test_a_restored_detector_goes_on_bit_for_bit() -> None:
    for at in (10, 90):
        ours, theirs = detector(), detector()
        feed(ours, losses(at))
        theirs.load_state_dict(ours.state_dict())
        for value in [*losses(60, seed=2), 30.0]:
            assert ours.update(value, value) == theirs.update(value, value)
            assert (ours.loss_z, ours.grad_norm_z) == (theirs.loss_z, theirs.grad_norm_z)


def test_more_least_values_than_the_window_holds_are_refused() -> None:
    with pytest.raises(ValueError, match="spike_min_count=40 is more than spike_window=20"):
        Guard(spike_window=20, spike_min_count=40)
