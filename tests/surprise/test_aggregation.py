"""One score from several layers."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from foreshock.surprise import max_surprise, mean_surprise, weighted_surprise

LAYERS = {"first": torch.tensor([1.0, 2.0, -3.0]), "second": torch.tensor([3.0, -4.0, 0.0])}
WEIGHTS = {"first": 3.0, "second": 1.0}


def weighted(per_layer: dict[str, Tensor]) -> Tensor:
    return weighted_surprise(per_layer, WEIGHTS)


AGGREGATES = [mean_surprise, max_surprise, weighted]


def test_each_says_what_its_name_says() -> None:
    assert mean_surprise(LAYERS).tolist() == [2.0, -1.0, -1.5]
    assert max_surprise(LAYERS).tolist() == [3.0, 2.0, 0.0]
    assert weighted(LAYERS).tolist() == [1.5, 0.5, -2.25]


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_layers_with_positions_are_aligned_per_sample(
    aggregate: Callable[[dict[str, Tensor]], Tensor],
) -> None:
    over = torch.Tensor.amax if aggregate is max_surprise else torch.Tensor.mean
    tokens, pixels = torch.randn(3, 5), torch.randn(3, 2, 4)
    given = {"first": tokens, "second": pixels}
    reduced = {"first": over(tokens, 1), "second": over(pixels.flatten(1), 1)}
    torch.testing.assert_close(aggregate(given), aggregate(reduced))


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("second", [torch.randn(4), torch.randn(6, 3), torch.tensor(1.0)])
def test_layers_that_cannot_be_aligned_are_refused_with_their_names(
    aggregate: Callable[[dict[str, Tensor]], Tensor], second: Tensor
) -> None:
    with pytest.raises(ValueError, match=r"'first' \(3,\).*'second' "):
        aggregate({"first": LAYERS["first"], "second": second})


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_a_nan_in_any_layer_is_a_nan_of_that_sample_alone(
    aggregate: Callable[[dict[str, Tensor]], Tensor],
) -> None:
    for name in LAYERS:
        bad = LAYERS[name].clone()
        bad[1] = math.nan
        assert aggregate({**LAYERS, name: bad}).isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("size", [1, 7, 64])
def test_trap_26_a_score_does_not_depend_on_the_batch(
    aggregate: Callable[[dict[str, Tensor]], Tensor], size: int
) -> None:
    per_layer = {"first": torch.randn(200), "second": torch.randn(200, 50)}
    parts = [
        {name: t[begin : begin + size] for name, t in per_layer.items()}
        for begin in range(0, 200, size)
    ]
    assert torch.cat([aggregate(part) for part in parts]).equal(aggregate(per_layer))


def test_weights_are_one_for_each_layer() -> None:
    for weights in ({"first": 1.0}, {**WEIGHTS, "frist": 1.0}):
        with pytest.raises(ValueError, match=r"lacks .* and has .*accepted: exactly"):
            weighted_surprise(LAYERS, weights)
    for bad in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="finite numbers from 0 up"):
            weighted_surprise(LAYERS, {**WEIGHTS, "first": bad})
    with pytest.raises(ValueError, match="not all 0"):
        weighted_surprise(LAYERS, dict.fromkeys(LAYERS, 0.0))


def test_bad_input_is_answered() -> None:
    with pytest.raises(ValueError, match="empty"):
        mean_surprise({})
    with pytest.raises(TypeError, match=r"per_layer\['first'\] is torch.int64"):
        mean_surprise({"first": torch.arange(3)})
    with pytest.raises(TypeError, match=r"per_layer\['first'\] is list"):
        max_surprise({"first": [1.0]})  # type: ignore[dict-item]
