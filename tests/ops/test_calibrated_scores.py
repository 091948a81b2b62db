"""calibrated_scores against its definition, for every implementation on the CPU."""

from __future__ import annotations

import pytest
import torch

from foreshock.ops import calibrated_scores
from tests.ops.calibrated_scores_cases import (
    AGGREGATIONS,
    IMPLEMENTATIONS,
    assert_agrees,
    case,
)

SHAPES = [(1, 1, 1), (1, 5, 2), (6, 256, 300), (3, 63, 64), (5, 65, 20), (40, 130, 1000)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_scores_and_ranks_are_those_of_the_definition(
    implementation: str, aggregation: str, shape: tuple[int, int, int]
) -> None:
    given = case(*shape, aggregation)
    assert_agrees(given.scored_by(IMPLEMENTATIONS[implementation].score), given)


def test_nobody_has_a_score_of_no_samples(implementation: str) -> None:
    scores = calibrated_scores(torch.empty(3, 0), torch.ones(2, 3), torch.ones(4).double(), 1.0)
    assert scores.z.shape == (3, 0)
    assert len(scores.score) == len(scores.percentile) == len(scores.is_above) == 0


def test_without_a_reference_there_is_the_score_alone(implementation: str) -> None:
    given = case(4, 50, 10, "mean")
    ranked = calibrated_scores(given.distances, given.scale, given.reference, given.threshold)
    alone = calibrated_scores(given.distances, given.scale)
    torch.testing.assert_close(alone.score, ranked.score, rtol=0, atol=0, equal_nan=True)
    assert alone.percentile is None
    assert alone.is_above is None


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_no_score_depends_on_the_other_samples(implementation: str, aggregation: str) -> None:
    given = case(6, 200, 100, aggregation)
    score = IMPLEMENTATIONS[implementation].score
    whole = given.scored_by(score)
    for at in (0, 63, 64, 199):
        alone = given._replace(distances=given.distances[:, at : at + 1].contiguous())
        for one, all_of_it in zip(alone.scored_by(score), whole, strict=True):
            assert torch.equal(one[..., 0].nan_to_num(7), all_of_it[..., at].nan_to_num(7))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("is_ranked", [False, True])
def test_opcheck(aggregation: str, is_ranked: bool) -> None:
    given = case(3, 20, 10, aggregation)
    ranked = given.reference if is_ranked else None
    distances = given.distances.nan_to_num().requires_grad_()
    torch.library.opcheck(
        torch.ops.foreshock.calibrated_scores,
        (distances, given.scale, given.weights, ranked, 0.5, aggregation == "max"),
    )


@pytest.mark.parametrize("is_ranked", [False, True])
def test_the_op_compiles_without_a_break(is_ranked: bool) -> None:
    given = case(3, 20, 10, "mean")

    def scored(distances: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ranked = given.reference if is_ranked else None
        return (*calibrated_scores(distances.abs(), given.scale, ranked, 0.5),)

    traced = torch.compile(scored, backend="aot_eager", fullgraph=True)
    for found, expected in zip(traced(given.distances), scored(given.distances), strict=True):
        assert (found is None) == (expected is None)
        if found is not None:
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


GOOD = {
    "distances": torch.ones(3, 4),
    "scale": torch.ones(2, 3),
    "reference": torch.ones(5, dtype=torch.float64),
}


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"distances": torch.ones(3, 4, dtype=torch.float64)}, "distances is torch.float64"),
        ({"distances": torch.ones(0, 4), "scale": torch.ones(2, 0)}, "distances is"),
        ({"distances": torch.ones(3)}, "distances is"),
        ({"distances": torch.ones(4, 3).t()}, "distances is .* contiguous"),
        ({"scale": torch.ones(3, 2)}, r"scale is .*\(3, 2\)"),
        ({"scale": torch.ones(2, 3).half()}, "scale is torch.float16"),
        ({"reference": torch.ones(5)}, "reference is torch.float32"),
        ({"reference": torch.ones(0, dtype=torch.float64)}, "reference is"),
        ({"reference": torch.ones(5, 1, dtype=torch.float64)}, "reference is"),
        ({"weights": torch.ones(3, dtype=torch.float64)}, "weights is a tensor with .*'mean'"),
        ({"aggregation": "weighted"}, "weights is None"),
        ({"aggregation": "median"}, "aggregation is 'median'"),
        (
            {"aggregation": "weighted", "weights": torch.ones(2, dtype=torch.float64)},
            r"weights is .*\(2,\)",
        ),
    ],
)
def test_what_is_wrong_is_named(wrong: dict[str, object], named: str) -> None:
    calibrated_scores(**GOOD)
    with pytest.raises(ValueError, match=named):
        calibrated_scores(**{**GOOD, **wrong})
