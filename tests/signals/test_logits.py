"""Range, health and drift of logits."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from foreshock.signals import LogitDrift, logit_drift, logit_histogram, logit_statistics

NAN, INF = math.nan, math.inf
TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def numbers(logits: torch.Tensor) -> list[float]:
    return torch.stack(list(logit_statistics(logits))).tolist()


def drawn(*shape: int, seed: int = 0, mean: float = 0.0, std: float = 1.0) -> torch.Tensor:
    return mean + std * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Statistics


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (7, 13), (2, 3, 501), (4, 33, 1000)], ids=str)
def test_statistics_are_those_of_numpy(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    logits = drawn(*shape, mean=3.0, std=2.0).to(dtype)
    exact = logits.double().numpy()
    expected = [exact.mean(), exact.std(), exact.max(), exact.min(), 0]
    assert numbers(logits) == pytest.approx(expected, rel=1e-6, abs=2e-6)


@pytest.mark.parametrize(
    "view",
    [lambda x: x.mT, lambda x: x[:, ::3], lambda x: x[:, :-1], lambda x: x[3].expand(5, -1)],
    ids=["transposed", "strided", "shifted", "expanded"],
)
def test_of_a_view_only_what_is_seen_counts(view: Callable[[torch.Tensor], torch.Tensor]) -> None:
    logits = drawn(300, 400)
    seen = view(logits)
    assert numbers(seen) == pytest.approx(numbers(seen.contiguous()), rel=1e-9)
    # Thinned, which is not the same for another layout.
    assert logit_drift(seen, seen.contiguous()) == 0


def test_masked_logits_leave_mean_and_spread_alone() -> None:
    logits = drawn(8, 100)
    masked = torch.cat([logits, torch.full((8, 28), -INF)], dim=1)
    alone, found = numbers(logits), numbers(masked)
    assert found[:3] == pytest.approx(alone[:3], rel=1e-9)
    assert found[3:] == [-INF, 8 * 28]
    assert torch.equal(logit_histogram(masked), logit_histogram(logits))


def test_what_is_no_number_is_counted_and_seen_in_the_range() -> None:
    logits = torch.tensor([1.0, NAN, 3.0, INF])
    mean, std, high, low, nonfinite = numbers(logits)
    assert (mean, std, nonfinite) == (2.0, 1.0, 2)
    assert math.isnan(high)
    assert math.isnan(low)
    assert numbers(torch.tensor([NAN, NAN]))[:2] == [0.0, 0.0]


def test_nothing_is_kept_for_the_backward_pass() -> None:
    logits = drawn(5, 7).requires_grad_()
    found = [*logit_statistics(logits), logit_histogram(logits)]
    assert not any(f.requires_grad for f in found)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (None, "logits is a NoneType"),
        ([1.0], "logits is a list"),
        (torch.ones(3, dtype=torch.int64), "tensor of torch.int64"),
        (torch.ones(0, 3), r"shape \(0, 3\)"),
    ],
)
@pytest.mark.parametrize("function", [logit_statistics, logit_histogram])
def test_other_than_logits_is_an_error_that_says_so(
    function: Callable[[Any], Any], given: Any, said: str
) -> None:
    with pytest.raises((TypeError, ValueError), match=said):
        function(given)


# Histogram


def test_histogram_counts_every_finite_logit_of_a_small_tensor_once() -> None:
    logits = torch.tensor([0.0, -1e-9, 0.5, -0.5, 1e30, -1e30, NAN, INF, -INF])
    counts = logit_histogram(logits)
    assert counts.shape == (227,)
    assert counts.sum() == 6
    assert counts[113] == 2
    assert counts[0] == counts[-1] == 1
    assert torch.equal(counts, counts.flip(0))


@pytest.mark.parametrize(
    "shape", [(100_000,), (4, 512, 3001), (1, 1_000_003), (2000, 300), (50_000, 2)], ids=str
)
def test_of_many_logits_a_sample_is_counted(shape: tuple[int, ...]) -> None:
    assert 5_000 < logit_histogram(drawn(*shape)).sum() <= 16_384


def test_sample_is_of_all_positions_and_all_classes() -> None:
    position, label = torch.meshgrid(torch.arange(2048), torch.arange(5000), indexing="ij")
    for is_rare in (position % 64 >= 61, label >= 0.95 * 5000):
        logits = torch.where(is_rare, 10.0, -10.0)
        counts = logit_histogram(logits)
        assert (counts > 0).sum() == 2
        assert counts[113:].sum() / counts.sum() == pytest.approx(0.05, abs=0.015)


# Drift


def test_drift_is_none_of_the_same_and_all_of_another() -> None:
    logits = drawn(1000)
    assert logit_drift(logits, logits) == 0
    assert logit_drift(logits, 1e3 + logits) == pytest.approx(math.log(2))
    assert logit_drift([1.0, 2.0], np.array([1.0, 2.0])) == 0
    assert logit_drift([NAN], logits) == 0
    assert logit_drift(logits, -logits + 1) == logit_drift(-logits + 1, logits)


@pytest.mark.parametrize("scale", [1e-2, 1.0, 30.0])
def test_drift_sees_a_wider_distribution_at_any_scale(scale: float) -> None:
    logits, other = drawn(64, 1000, std=scale), drawn(64, 1000, seed=1, std=scale)
    same = logit_drift(logits, other)
    assert same < 0.01
    assert logit_drift(logits, 1.5 * other) > 3 * same
    assert logit_drift(logits, other + scale) > 10 * same


def test_drift_over_looks_is_that_against_their_mean() -> None:
    drift = LogitDrift(window=3, min_count=2)
    looks = [logit_histogram(drawn(500, seed=seed)).tolist() for seed in range(6)]
    found = [drift.update(look) for look in looks]
    assert found[:2] == [None, None]
    joined = torch.cat([drawn(500, seed=seed) for seed in (2, 3, 4)])
    assert found[5] == pytest.approx(logit_drift(drawn(500, seed=5), joined), rel=1e-9)


def test_one_look_of_nothing_finite_blinds_nothing() -> None:
    plain, struck = LogitDrift(), LogitDrift()
    for seed in range(12):
        look = logit_histogram(drawn(500, seed=seed)).tolist()
        expected = plain.update(look)
        if seed in (3, 8):
            assert struck.update(logit_histogram(torch.full((9,), NAN)).tolist()) is None
        assert struck.update(look) == expected


def test_a_jump_stands_out_and_so_do_those_after_it() -> None:
    drift = LogitDrift()
    quiet = [drift.update(logit_histogram(drawn(4096, seed=s)).tolist()) for s in range(20)]
    largest = max(q for q in quiet if q is not None)
    jumped = [drift.update(logit_histogram(drawn(4096, std=3, seed=s)).tolist()) for s in range(4)]
    assert all(j is not None and j > 3 * largest for j in jumped)


def test_state_goes_on_where_it_was() -> None:
    first = LogitDrift(window=5)
    looks = [logit_histogram(drawn(500, seed=seed)).tolist() for seed in range(12)]
    for look in looks[:7]:
        first.update(look)
    second = LogitDrift(window=5)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [first.update(look) for look in looks[7:]] == [second.update(look) for look in looks[7:]]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda s: s.update(settings={"window": 6, "min_count": 4}),
        lambda s: s.pop("shares"),
        lambda s: s["shares"][0].pop(),
        lambda s: s["shares"][0].__setitem__(0, NAN),
    ],
)
def test_a_state_that_does_not_fit_is_an_error(spoil: Callable[[dict[str, Any]], Any]) -> None:
    drift = LogitDrift()
    drift.update(logit_histogram(drawn(500)).tolist())
    state = drift.state_dict()
    spoil(state)
    with pytest.raises((KeyError, TypeError, ValueError)):
        LogitDrift().load_state_dict(state)


@pytest.mark.parametrize("given", [[1.0], "word", [NAN] * 227, [-1.0] * 227])
def test_other_than_a_histogram_is_an_error_that_says_so(given: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="histogram is"):
        LogitDrift().update(given)


@pytest.mark.parametrize(
    ("given", "said"),
    [({"window": 0}, "window is 0"), ({"window": 3}, "min_count is 4"), ({"window": 1.5}, "1.5")],
)
def test_wrong_settings_are_errors_that_name_them(given: dict[str, Any], said: str) -> None:
    with pytest.raises((TypeError, ValueError), match=said):
        LogitDrift(**given)
