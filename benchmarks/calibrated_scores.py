"""calibrated_scores against the same in torch's and NumPy's operations."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import rows
from benchmarks.ceiling import read_probe
from benchmarks.interleave import time_in_turn
from foreshock.ops import calibrated_scores
from foreshock.ops._backend import supported_isas
from foreshock.ops.calibrated_scores import cpu, reference

SIZES = [(6, 256), (12, 4096), (24, 16_384)]
KNOWN, CALLS, ROUNDS = 1000, 20, 15


def in_numpy(distances: Tensor, scale: Tensor, ranked: Tensor, threshold: float) -> object:
    d, (location, spread) = distances.numpy(), scale.numpy()[:, :, None]
    z = (d - location) / spread
    z[~np.isfinite(d)] = np.nan
    score = z.mean(0, dtype=np.float64).astype(np.float32)
    rank = np.searchsorted(ranked.numpy(), score.astype(np.float64), side="right")
    return z, score, rank / len(ranked), ~(score.astype(np.float64) <= threshold)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_scores(benchmark: object, size: tuple[int, int]) -> None:
    layers, samples = size
    distances = torch.randn(size).exp_() * 30
    scale = torch.rand(2, layers) * 20 + 0.5
    ranked = torch.randn(KNOWN, dtype=torch.float64).sort().values
    given = (distances, scale, ranked, float(ranked[900]))
    ours = f"foreshock, {supported_isas()[-1]}"
    calls: dict[str, Callable[[], object]] = {ours: functools.partial(calibrated_scores, *given)}
    in_parts = (distances, scale, None, ranked, given[3])
    for isa in supported_isas()[:-1]:
        calls[f"foreshock, {isa}"] = functools.partial(
            cpu.score, *in_parts, is_largest=False, isa=isa
        )
    calls["torch, op by op"] = functools.partial(reference.score, *in_parts, is_largest=False)
    calls["numpy"] = functools.partial(in_numpy, *given)
    expected = reference.score(*in_parts, is_largest=False)
    for name, call in calls.items():
        for found, right in zip(call(), expected, strict=True):  # type: ignore[call-overload]
            torch.testing.assert_close(torch.as_tensor(found), right, msg=name)
    calls["ceiling: the distances are read"] = read_probe([distances])
    repeated = {n: functools.partial(_repeat, call) for n, call in calls.items()}
    timings = time_in_turn(benchmark, repeated, ROUNDS)
    found_rows = {
        name: {
            **timing.row(),
            "us_per_call": 1e3 * timing.median_ms / CALLS,
            "times_ours": timing.median_ms / timings[ours].median_ms,
        }
        for name, timing in timings.items()
    }
    rows.store("calibrated_scores", f"{layers} layers, {samples} samples", "cpu", found_rows)


def _repeat(call: Callable[[], object]) -> None:
    for _ in range(CALLS):
        call()
