"""Every baseline where the answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import sklearn.mixture
import torch
import torch.nn.functional as F
from benchmarks.ood import baselines
from benchmarks.ood.metrics import auroc
from torch import Tensor

COVARIANCE = torch.tensor([[4.0, 1.0], [1.0, 0.5]], dtype=torch.float64)
MEANS = torch.tensor([[0.0, 0.0], [30.0, 0.0]], dtype=torch.float64)
ROWS = 20_000


def two_classes(num_rows: int = ROWS, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Two Gaussians of one covariance; the logits are the signed distance to the middle."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_rows) % 2
    noise = torch.randn(num_rows, 2, dtype=torch.float64, generator=generator)
    features = MEANS[labels] + noise @ torch.linalg.cholesky(COVARIANCE).T
    return features, logits_of(features), labels


def logits_of(features: Tensor) -> Tensor:
    return torch.stack([15 - features[:, 0], features[:, 0] - 15], 1)


def scored(baseline: baselines.Baseline, queries: Tensor) -> Tensor:
    return baseline.fit(*two_classes()).score(queries, logits_of(queries))


def test_msp_is_one_minus_the_largest_probability() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]])
    score = baselines.MaxSoftmax().score(logits, logits)
    torch.testing.assert_close(score, torch.tensor([0.25, 0.5], dtype=torch.float64))


def test_max_logit_is_the_largest_logit_with_its_sign_turned() -> None:
    logits = torch.tensor([[1.0, 7.0], [-2.0, -3.0]])
    assert baselines.MaxLogit().score(logits, logits).tolist() == [-7, 2]


def test_energy_is_minus_the_log_of_the_sum_of_exponentials() -> None:
    logits = torch.tensor([[math.log(2.0), math.log(3.0)], [900.0, 0.0]])
    score = baselines.Energy().score(logits, logits)
    torch.testing.assert_close(score, torch.tensor([-math.log(5.0), -900.0], dtype=torch.float64))


QUERIES = torch.tensor([[2.0, 1.0], [29.0, -3.0], [0.0, 100.0]], dtype=torch.float64)


def test_mahalanobis_is_the_distance_to_the_nearest_class_mean() -> None:
    to_each = QUERIES[:, None] - MEANS
    expected = torch.einsum("nkd,de,nke->nk", to_each, torch.linalg.inv(COVARIANCE), to_each)
    torch.testing.assert_close(
        scored(baselines.Mahalanobis(), QUERIES), expected.amin(1), rtol=0.05, atol=0.05
    )


def test_relative_mahalanobis_subtracts_the_distance_to_one_gaussian_of_all() -> None:
    to_all = QUERIES - MEANS.mean(0)
    spread = torch.zeros(2, 2, dtype=torch.float64)
    spread[0, 0] = 15.0**2
    inverse = torch.linalg.inv(COVARIANCE + spread)
    background = torch.einsum("nd,de,ne->n", to_all, inverse, to_all)
    expected = scored(baselines.Mahalanobis(), QUERIES) - background
    found = scored(baselines.RelativeMahalanobis(), QUERIES)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("baseline", [baselines.MahalanobisPlusPlus(), baselines.KNN(k=1)])
def test_normalised_features_have_a_direction_and_no_length(baseline: baselines.Baseline) -> None:
    near, far = scored(baseline, torch.stack([QUERIES[0], 1000 * QUERIES[0]]))
    assert near == pytest.approx(float(far))


def test_mahalanobis_plus_plus_is_mahalanobis_of_normalised_features() -> None:
    features, logits, labels = two_classes(400)
    plain = baselines.Mahalanobis().fit(F.normalize(features), logits, labels)
    plus = baselines.MahalanobisPlusPlus().fit(features, logits, labels)
    expected = plain.score(F.normalize(QUERIES), logits_of(QUERIES))
    torch.testing.assert_close(plus.score(QUERIES, logits_of(QUERIES)), expected)


def test_knn_is_the_distance_to_the_kth_fitted_row() -> None:
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-2.0, 0.0]])
    knn = baselines.KNN(k=2).fit(rows, rows, torch.tensor([0, 0, 0]))
    score = knn.score(torch.tensor([[3.0, 0.0], [0.0, -1.0]]), rows[:2])
    expected = torch.tensor([math.sqrt(2.0), math.sqrt(2.0)], dtype=torch.float64)
    torch.testing.assert_close(score, expected)


@pytest.mark.parametrize(("rows", "k"), [(20, 1), (630, 6), (50_000, 50)])
def test_knn_takes_a_hundredth_of_the_rows_and_50_at_most(rows: int, k: int) -> None:
    features = torch.ones(rows, 1)
    assert baselines.KNN().fit(features, features, torch.zeros(rows, dtype=torch.int64)).k == k


def test_knn_needs_k_rows() -> None:
    with pytest.raises(ValueError, match="k is 4; accepted: up to the 3 fitted rows"):
        baselines.KNN(k=4).fit(torch.ones(3, 1), torch.ones(3, 1), torch.zeros(3))


def test_vim_sees_what_leaves_the_principal_subspace_and_only_that() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(500, 3, generator=generator, dtype=torch.float64)
    features[:, 2] *= 1e-3
    weight = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    bias = torch.tensor([0.25, -0.5])
    vim = baselines.ViM(weight, bias, dim=2)
    logits = features @ weight.double().T + bias
    vim.fit(features, logits, torch.zeros(500, dtype=torch.int64))
    origin = torch.tensor([[-0.25, 0.5, 0.0]], dtype=torch.float64)
    queries = origin + torch.tensor([[0.0, 0, 0], [5, -7, 0], [0, 0, 2]], dtype=torch.float64)
    same_logits = torch.zeros(3, 2, dtype=torch.float64)
    residual = vim.score(queries, same_logits) + math.log(2)
    assert residual[0] == pytest.approx(0, abs=1e-9)
    assert residual[1] == pytest.approx(0, abs=0.01 * vim.alpha)
    assert residual[2] == pytest.approx(2 * vim.alpha, rel=1e-3)
    fitted_residual = vim.score(features, logits) + logits.logsumexp(1)
    assert float(fitted_residual.mean()) == pytest.approx(float(logits.amax(1).mean()))


def test_vim_needs_something_left_of_the_width() -> None:
    with pytest.raises(ValueError, match="dim is 8; accepted: below 8"):
        baselines.ViM(torch.ones(2, 8), torch.ones(2), dim=8)


def test_one_component_of_a_mixture_is_a_gaussian() -> None:
    features, logits, labels = two_classes(5000)
    mixture = baselines.TiedGaussianMixture(components=1).fit(features, logits, labels)
    normal = scipy.stats.multivariate_normal(features.mean(0), np.cov(features.T, ddof=0))
    expected = torch.from_numpy(-normal.logpdf(QUERIES.numpy()))
    torch.testing.assert_close(
        mixture.score(QUERIES, logits_of(QUERIES)), expected, rtol=1e-2, atol=1e-2
    )


def test_the_mixture_finds_what_scikit_learn_finds() -> None:
    features, logits, labels = two_classes(2000)
    ours = baselines.TiedGaussianMixture(components=2).fit(features, logits, labels)
    theirs = sklearn.mixture.GaussianMixture(2, covariance_type="tied", random_state=0)
    expected = torch.from_numpy(-theirs.fit(features.numpy()).score_samples(features.numpy()))
    torch.testing.assert_close(ours.score(features, logits), expected, rtol=2e-2, atol=2e-2)


def test_length_plus_entropy_calls_the_farthest_input_the_most_normal() -> None:
    """Trap 24, and the reason why this form is not ours."""
    features, logits, labels = two_classes(500)
    published = baselines.LengthPlusEntropy().fit(features, logits, labels)
    far = torch.tensor([[-5000.0, 8000.0], [9000.0, -300.0]], dtype=torch.float64)
    assert auroc(published.score(features, logits), published.score(far, logits_of(far))) < 0.5


def test_length_plus_entropy_between_two_codes_is_that_of_a_fair_coin() -> None:
    rows = torch.tensor([[0.0], [10.0]])
    published = baselines.LengthPlusEntropy(codes=2).fit(rows, rows, torch.tensor([0, 1]))
    halfway = torch.tensor([[5.0]])
    assert float(published.score(halfway, halfway)) == pytest.approx(2 * math.log(2))


class Given:
    """A score that is a column of the features."""

    def __init__(self, column: int) -> None:
        self.column = column
        self.fitted = 0

    def fit(self, features_ND: Tensor, logits_NC: Tensor, labels_N: Tensor) -> Given:
        self.fitted = len(features_ND)
        return self

    def score(self, features_ND: Tensor, logits_NC: Tensor) -> Tensor:
        return features_ND[:, self.column]


def test_the_combination_gives_parts_of_any_scale_the_same_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(50_000, 2, generator=generator, dtype=torch.float64)
    features = features * torch.tensor([1e-3, 1e6]) + torch.tensor([5.0, -1e7])
    parts = [Given(0), Given(1)]
    labels = torch.zeros(50_000, dtype=torch.int64)
    combination = baselines.EqualZScores(parts).fit(features, features, labels)
    assert [part.fitted for part in parts] == [40_000, 40_000]
    score = combination.score(torch.tensor([[5.0 + 2e-3, -1e7 + 4e6]]), features[:1])
    assert float(score) == pytest.approx(3, abs=0.05)


ALL = {
    "MSP": baselines.MaxSoftmax(),
    "MaxLogit": baselines.MaxLogit(),
    "Energy": baselines.Energy(),
    "Mahalanobis": baselines.Mahalanobis(),
    "Mahalanobis++": baselines.MahalanobisPlusPlus(),
    "RMD": baselines.RelativeMahalanobis(),
    "KNN": baselines.KNN(),
    "ViM": baselines.ViM(torch.eye(2), torch.zeros(2)),
    "mixture": baselines.TiedGaussianMixture(components=4),
    "L + H": baselines.LengthPlusEntropy(),
    "combination": baselines.EqualZScores(),
}


@pytest.mark.parametrize("baseline", ALL.values(), ids=ALL)
def test_the_score_of_a_row_does_not_depend_on_its_batch(baseline: baselines.Baseline) -> None:
    """Trap 26."""
    features, logits, labels = two_classes(300)
    baseline.fit(features, logits, labels)
    together = baseline.score(features[:50], logits[:50])
    alone = torch.cat([baseline.score(features[i : i + 1], logits[i : i + 1]) for i in range(50)])
    torch.testing.assert_close(alone, together)


def test_a_dead_unit_does_no_harm() -> None:
    features, logits, labels = two_classes(300)
    features = torch.cat([features, torch.zeros(300, 3)], 1)
    assert (
        baselines.Mahalanobis()
        .fit(features, logits, labels)
        .score(features, logits)
        .isfinite()
        .all()
    )


def test_a_class_without_rows_is_an_error() -> None:
    features, logits, _ = two_classes(30)
    with pytest.raises(ValueError, match=r"no row of class \[1\]"):
        baselines.Mahalanobis().fit(features, logits, torch.arange(30) % 2 * 2)


def test_more_codes_than_rows_is_an_error() -> None:
    with pytest.raises(ValueError, match="64 codes; accepted: 1 to the 30 fitted rows"):
        baselines.TiedGaussianMixture().fit(*two_classes(30))
