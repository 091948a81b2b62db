"""What the figures of merit mean, by hand and against scikit-learn."""

from __future__ import annotations

import pytest
import sklearn.metrics
import torch
from benchmarks.ood import metrics
from torch import Tensor

METRICS = {
    "auroc": metrics.auroc,
    "aupr": metrics.aupr,
    "fpr95": lambda normal, ood: metrics.fpr_at_95_tpr(normal, ood, positive="normal"),
}


@pytest.fixture(params=["continuous", "many ties", "one of each"])
def scores(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = (1, 1) if request.param == "one of each" else (203, 57)
    normal, ood = (torch.randn(n, generator=generator) for n in sizes)
    if request.param == "many ties":
        return normal.round(), (ood + 0.7).round()
    return normal, ood + 0.7


def joined(normal: Tensor, ood: Tensor) -> tuple[list[int], list[float]]:
    return [0] * len(normal) + [1] * len(ood), torch.cat([normal, ood]).double().tolist()


def test_auroc_counts_pairs_and_half_of_ties() -> None:
    normal, ood = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([1.0, 3.0])
    assert metrics.auroc(normal, ood) == pytest.approx((1 + 0.5 + 3) / 6)


def test_a_higher_score_is_more_ood() -> None:
    low, high = torch.tensor([0.0, 1.0]), torch.tensor([2.0, 3.0])
    assert metrics.auroc(low, high) == 1
    assert metrics.auroc(high, low) == 0
    assert metrics.auroc(torch.ones(3), torch.ones(4)) == 0.5


def test_auroc_is_that_of_scikit_learn(scores: tuple[Tensor, Tensor]) -> None:
    assert metrics.auroc(*scores) == pytest.approx(sklearn.metrics.roc_auc_score(*joined(*scores)))


def test_aupr_is_that_of_scikit_learn_with_ood_positive(scores: tuple[Tensor, Tensor]) -> None:
    expected = sklearn.metrics.average_precision_score(*joined(*scores))
    assert metrics.aupr(*scores) == pytest.approx(expected)


def test_aupr_by_hand() -> None:
    normal, ood = torch.tensor([0.0, 2.0]), torch.tensor([1.0, 3.0])
    assert metrics.aupr(normal, ood) == pytest.approx((1 + 2 / 3) / 2)


@pytest.mark.parametrize("positive", ["normal", "ood"])
def test_fpr_is_that_of_the_roc_curve(scores: tuple[Tensor, Tensor], positive: str) -> None:
    is_ood, score = joined(*scores)
    if positive == "normal":
        is_ood, score = [1 - y for y in is_ood], [-s for s in score]
    false_rate, true_rate, _ = sklearn.metrics.roc_curve(is_ood, score, drop_intermediate=False)
    expected = false_rate[true_rate >= 0.95][0]
    found = metrics.fpr_at_95_tpr(*scores, positive=positive)  # type: ignore[arg-type]
    assert found == pytest.approx(expected)


def test_fpr_counts_the_other_class_beyond_the_threshold() -> None:
    normal, ood = torch.arange(100.0), torch.tensor([50.0, 94.0, 95.0, 200.0])
    assert metrics.fpr_at_95_tpr(normal, ood, positive="normal") == 2 / 4
    assert metrics.fpr_at_95_tpr(normal, ood, positive="ood") == 50 / 100


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_a_score_that_is_nan_is_refused_and_not_ranked(metric: object) -> None:
    with pytest.raises(ValueError, match="ood holds 1 NaN"):
        metric(torch.zeros(3), torch.tensor([1.0, torch.nan]))  # type: ignore[operator]


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_no_scores_are_refused(metric: object) -> None:
    with pytest.raises(ValueError, match=r"normal has shape \(0,\)"):
        metric(torch.zeros(0), torch.zeros(3))  # type: ignore[operator]


def test_an_infinite_score_is_the_most_ood_of_all() -> None:
    normal, ood = torch.tensor([0.0, 1.0]), torch.tensor([torch.inf, torch.inf])
    assert metrics.quality(normal, ood) == metrics.Quality(auroc=1, aupr=1, fpr95=0)


def test_the_class_of_the_true_positives_must_be_said() -> None:
    with pytest.raises(ValueError, match="positive is 'id'"):
        metrics.fpr_at_95_tpr(torch.zeros(1), torch.zeros(1), positive="id")  # type: ignore[arg-type]
