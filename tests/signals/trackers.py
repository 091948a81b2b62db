"""Trackers and what they are fed with."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from foreshock.signals import SpectralReading, SpectralSettings, SpectralTracker


def tracker_of(matrices: int, **values: Any) -> SpectralTracker:
    return SpectralTracker([f"m{i}" for i in range(matrices)], SpectralSettings(**values))


def observe(tracker: SpectralTracker, step: int, kappa: Sequence[float]) -> SpectralReading:
    return tracker.update(step, kappa, kappa, kappa)


def follow(
    tracker: SpectralTracker, rows: Any, first: int = 0, every: int = 1
) -> list[SpectralReading]:
    return [observe(tracker, first + i * every, row) for i, row in enumerate(rows)]


def walks(steps: int, matrices: int, size: float = 0.01, seed: int = 0) -> np.ndarray:
    moves = np.random.default_rng(seed).normal(scale=size, size=(steps, matrices))
    return 20 * np.exp(np.cumsum(moves, axis=0))


def same(one: SpectralReading, other: SpectralReading) -> bool:
    """Equal to the last bit; a NaN equals a NaN."""
    return repr(dataclasses.astuple(one)) == repr(dataclasses.astuple(other))
