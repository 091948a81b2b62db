"""The state of a tracker: what is restored repeats the future."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.signals.trackers import follow, same, tracker_of, walks


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 30), st.sampled_from(["relative", "absolute"]), st.integers(0, 10**6))
def test_a_restored_tracker_repeats_the_future_bit_for_bit(
    saved_at: int, scale: Any, seed: int
) -> None:
    rows = walks(40, 3, seed=seed)
    rows[5, 1], rows[20], rows[:8, 2] = math.nan, math.inf, 0.0
    shape = {"window": 10, "scale": scale, "patience": 3}
    tracker = tracker_of(3, **shape)
    follow(tracker, rows[:saved_at])
    state = tracker.state_dict()
    worst = tracker.worst(3)
    future = follow(tracker, rows[saved_at:], first=saved_at)
    for restored in (tracker, tracker_of(3, **shape)):
        restored.load_state_dict(state)
        assert repr(restored.worst(3)) == repr(worst)
        again = follow(restored, rows[saved_at:], first=saved_at)
        assert all(same(one, other) for one, other in zip(again, future, strict=True))


def test_a_saved_state_shares_nothing_with_the_tracker() -> None:
    tracker = tracker_of(2)
    follow(tracker, walks(20, 2))
    state = tracker.state_dict()
    kept = {k: v.clone() for k, v in state.items() if isinstance(v, torch.Tensor)}
    follow(tracker, walks(20, 2, seed=1), first=20)
    tracker.load_state_dict(state)
    follow(tracker, walks(20, 2, seed=2), first=20)
    assert all(torch.equal(state[k].nan_to_num(), v.nan_to_num()) for k, v in kept.items())


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda: tracker_of(3), r"'names'\] is \['m0', 'm1', 'm2'\]; accepted: \['m0', 'm1'\]"),
        (lambda: tracker_of(2, window=9), r"'settings'\] is .*'window': 9"),
        (lambda: tracker_of(2, patience=9), r"'settings'\] is .*'patience': 9"),
        (lambda: tracker_of(2, scale="absolute"), r"'settings'\] is .*'absolute'"),
        (lambda: tracker_of(2, aggregate="mean"), r"'settings'\] is .*'mean'"),
    ],
)
def test_the_state_of_another_tracker_is_refused(other: Any, words: str) -> None:
    tracker = tracker_of(2)
    follow(tracker, walks(5, 2))
    before = repr(tracker.state_dict())
    with pytest.raises(ValueError, match=words):
        tracker.load_state_dict(other().state_dict())
    assert repr(tracker.state_dict()) == before


def test_a_damaged_state_is_refused_and_nothing_of_it_loaded() -> None:
    tracker = tracker_of(2)
    before = repr(tracker.state_dict())
    damaged = tracker.state_dict()
    damaged["step"], damaged["latest"] = 5, damaged["latest"].float()
    with pytest.raises(ValueError, match=r"'latest'\] is float32 of shape \(3, 2\)"):
        tracker.load_state_dict(damaged)
    del damaged["latest"]
    with pytest.raises(KeyError, match="latest"):
        tracker.load_state_dict(damaged)
    assert repr(tracker.state_dict()) == before
