"""rolling_zscore against everything a user would run instead; see docs/rolling_zscore.md."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import rows
from benchmarks.interleave import Timing, time_in_turn
from foreshock.ops import RollingZScore
from foreshock.ops._backend import supported_isas
from foreshock.ops.rolling_zscore import cpu
from foreshock.ops.rolling_zscore.state import Settings, State

WINDOW = 128
MIN_COUNT = 32
CHECKED = 2 * WINDOW + 3  # pushes whose answers are looked at
SERIES = [1, 64, 1024, 8192]
SETTINGS = Settings.of(MIN_COUNT, 0, None, 1e6)


class TorchRing:
    """Mean and std of the whole ring at each push, in torch's own operations: the fastest of those
    that were tried (std_mean takes ten times as long for many series, and the least for one)."""

    def __init__(self, series: int, device: str = "cpu") -> None:
        self.ring = torch.zeros(series, WINDOW, dtype=torch.float64, device=device)
        self.tick = 0

    def push(self, values: Tensor) -> Tensor:
        ring = self.ring[:, : min(max(self.tick, 1), WINDOW)]
        if len(ring) == 1:
            std, mean = torch.std_mean(ring, dim=1, correction=0)
        else:
            mean = ring.mean(1)
            std = (ring - mean[:, None]).square_().mean(1).sqrt_()
        z = (values - mean) / std
        self.ring[:, self.tick % WINDOW] = values
        self.tick += 1
        return z


class NumpySums:
    """A ring and running sums, O(1), in NumPy; it drifts."""

    def __init__(self, series: int) -> None:
        self.ring = np.zeros((WINDOW, series))
        self.sum, self.sumsq = np.zeros((2, series))
        self.tick = 0

    def push(self, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        count = min(max(self.tick, 1), WINDOW)
        mean = self.sum / count
        z = (values - mean) / np.sqrt(self.sumsq / count - mean * mean)
        leaving = self.ring[self.tick % WINDOW]
        self.sum += values - leaving
        self.sumsq += values * values - leaving * leaving
        leaving[:] = values
        self.tick += 1
        return z


def for_each(push: Callable[[Any], object], values: Any) -> Callable[[], object]:
    """All the ticks, one push after the other."""

    def call() -> None:
        for row in values:
            push(row)

    return call


def assert_right(push: Callable[[Any], Any], values: Any) -> None:
    """The answer first: against a direct recomputation, once the window is full."""
    history: list[Any] = []
    for tick, row in enumerate(values):
        z = np.array(push(row), dtype=np.float64)
        if tick >= WINDOW:
            window = np.array(history[-WINDOW:], dtype=np.float64)
            expected = (np.asarray(row) - window.mean(0)) / window.std(0)
            np.testing.assert_allclose(z, expected, rtol=1e-8, atol=1e-8)
        history.append(np.asarray(row))


def kernel_alone(values: Tensor, pushes: int, isa: str) -> Callable[[], object]:
    """Many ticks in one call of the kernel."""
    state = State.empty(values.shape[1], WINDOW, values.dtype, values.device)
    push = cpu.bind_rows(state, SETTINGS, isa=isa)
    z = torch.empty_like(values)

    def push_one(row: Tensor) -> Tensor:
        push(row[None], z[:1])
        return z[0].clone()

    assert_right(push_one, list(torch.randn(CHECKED, values.shape[1], dtype=values.dtype)))
    return lambda: [push(values, z) for _ in range(pushes // len(values))]


def variants_of_one_series(values: Tensor) -> dict[str, Callable[[], object]]:
    numbers = values.flatten().tolist()
    push_float = RollingZScore(1, WINDOW).push_float
    assert_right(push_float, torch.randn(CHECKED, dtype=torch.float64).tolist())
    variants = {"foreshock push_float": for_each(push_float, numbers)}
    if importlib.util.find_spec("river") is not None:
        from river import stats, utils

        variance = utils.Rolling(stats.Var(ddof=0), window_size=WINDOW)

        def push(x: float) -> float:
            spread = variance.get()
            z = (x - variance.mean.get()) / spread**0.5 if spread > 0 else 0.0
            variance.update(x)
            return float(z)

        variants["river Rolling(Var)"] = for_each(push, numbers)
    return variants


def pandas_rolling(values: Tensor) -> dict[str, Callable[[], object]]:
    if importlib.util.find_spec("pandas") is None:
        return {}
    import pandas as pd

    frame = pd.DataFrame(values.numpy())

    def call() -> None:
        rolling = frame.rolling(WINDOW, min_periods=MIN_COUNT)
        (frame - rolling.mean().shift()) / rolling.std(ddof=0).shift()

    return {"pandas rolling, all ticks at once": call}


def as_rows(
    timings: dict[str, Timing], pushes: int, series: int, ours: str
) -> dict[str, dict[str, Any]]:
    base = timings[ours].median_ms
    return {
        name: {
            **t.row(),
            "ns_per_push": 1e6 * t.median_ms / pushes,
            "ns_per_value": 1e6 * t.median_ms / pushes / series,
            "times_ours": t.median_ms / base,
        }
        for name, t in timings.items()
    }


@pytest.mark.parametrize("series", SERIES)
def test_a_push_on_the_cpu(benchmark: Any, series: int) -> None:
    # Values come from a cache, as a training step's do, and the ring is gone round several times.
    distinct = max(16, 16_384 // series)
    repeats = max(1, 960 // distinct)
    pushes = repeats * distinct
    values = torch.randn(distinct, series, dtype=torch.float64) + 10
    vectors, arrays = list(values) * repeats, list(values.numpy()) * repeats
    ours = f"foreshock push, {supported_isas()[-1]}"
    zscore, ring, sums = RollingZScore(series, WINDOW), TorchRing(series), NumpySums(series)
    with np.errstate(all="ignore"):
        checked = torch.randn(CHECKED, series, dtype=torch.float64) + 10
        for push in (zscore.push, ring.push):
            assert_right(push, list(checked))
        assert_right(sums.push, list(checked.numpy()))
    variants: dict[str, Callable[[], object]] = {
        ours: for_each(zscore.push, vectors),
        **{
            f"foreshock kernel alone, {isa}": kernel_alone(values, pushes, isa)
            for isa in supported_isas()
        },
        "numpy, running sums": for_each(sums.push, arrays),
        "torch, mean and std of the ring": for_each(ring.push, vectors),
        **pandas_rolling(values.repeat(repeats, 1)),
    }
    if series == 1:
        variants |= variants_of_one_series(values.repeat(repeats, 1))
    slow = {"torch, mean and std of the ring": 5, "river Rolling(Var)": 5}
    timings = time_in_turn(benchmark, variants, rounds=31, slow=slow)
    found = as_rows(timings, pushes, series, ours)
    rows.store("rolling_zscore", f"{series} series, window {WINDOW}", "cpu", found)


@pytest.mark.gpu
@pytest.mark.parametrize("series", SERIES)
def test_a_push_on_the_gpu(benchmark: Any, series: int) -> None:
    values = torch.randn(300, series, dtype=torch.float64, device="cuda") + 10
    vectors = list(values)
    zscore, ring = RollingZScore(series, WINDOW, device="cuda"), TorchRing(series, "cuda")
    right = RollingZScore(series, WINDOW)
    for vector in vectors[: WINDOW + 9]:
        torch.testing.assert_close(
            zscore.push(vector).cpu(), right.push(vector.cpu()), rtol=1e-8, atol=1e-8
        )
        ring.push(vector)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        zscore.push(vectors[0])
    variants: dict[str, Callable[[], object]] = {
        "foreshock push, triton": for_each(zscore.push, vectors),
        "foreshock push, captured": lambda: [graph.replay() for _ in vectors],
        "torch, mean and std of the ring": for_each(ring.push, vectors),
    }
    timings = time_in_turn(benchmark, variants, rounds=21, device="cuda")
    found = as_rows(timings, len(vectors), series, "foreshock push, triton")
    rows.store("rolling_zscore", f"{series} series, window {WINDOW}", "cuda", found)
