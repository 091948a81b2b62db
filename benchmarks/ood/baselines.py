"""Scores that others use: `fit` on what a model was trained on, then `score` anything.

Every score grows with how far out of distribution an input is. A fitted baseline scores each row by
itself. Features are (N, D), logits (N, C), labels (N,) whole numbers from 0 up; all that is
estimated is float64.

Covariances are shrunk (Ledoit and Wolf) in all of them: with fewer rows than a few times D the
published pseudo-inverse loses to its own noise, and the comparison would be with that noise.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ood.extras import imported
from foreshock.ops import soft_assign


class Baseline(Protocol):
    """What all of them can do."""

    def fit(self, features_ND: Tensor, logits_NC: Tensor, labels_N: Tensor) -> Baseline:
        """Takes in what the model makes of its training data; returns itself."""
        ...

    def score(self, features_ND: Tensor, logits_NC: Tensor) -> Tensor:
        """(N,): higher is more out-of-distribution."""
        ...


class _OfLogits:
    """A score with nothing to fit."""

    def fit(self, features_ND: Tensor, logits_NC: Tensor, labels_N: Tensor) -> _OfLogits:
        return self


class MaxSoftmax(_OfLogits):
    """MSP: 1 - max_c softmax(logits)_c. Source: Hendrycks and Gimpel, 2017."""

    def score(self, features_ND: Tensor, logits_NC: Tensor) -> Tensor:
        return 1 - logits_NC.double().softmax(1).amax(1)


class MaxLogit(_OfLogits):
    """-max_c logit_c. Source: Hendrycks et al., 2022."""

    def score(self, features_ND: Tensor, logits_NC: Tensor) -> Tensor:
        return -logits_NC.double().amax(1)


class Energy(_OfLogits):
    """-log sum_c exp(logit_c). Source: Liu et al., 2020, with T = 1."""

    def score(self, features_ND: Tensor, logits_NC: Tensor) -> Tensor:
        return -logits_NC.double().logsumexp(1)


@dataclasses.dataclass(frozen=True)
class Gaussians:
    """Gaussians of one covariance: its shrunk estimate from residuals, as a Cholesky factor."""

    means: Tensor
    factor: Tensor

    @classmethod
    def around(cls, means_CD: Tensor, residuals_ND: Tensor) -> Gaussians:
        covariance = imported("sklearn.covariance", "surprise")
        shrunk, _ = covariance.ledoit_wolf(residuals_ND.numpy(), assume_centered=True)
        return cls(means_CD, _cholesky(torch.from_numpy(shrunk)))

    def distances(self, x_ND: Tensor) -> Tensor:
        """(N, C): the squared Mahalanobis distance of every row to every mean."""
        white_x, white_means = (_whiten(part, self.factor) for part in (x_ND, self.means))
        return torch.cdist(white_x, white_means).square()


class Mahalanobis:
    """min_c (x - m_c)^T S^-1 (x - m_c): class means, one covariance. Source: Lee et al., 2018."""

    def fit(self, features_ND: Tensor, logits_NC: Tensor, labels_N: Tensor) -> Mahalanobis:
        x_ND = self._prepared(features_ND)
        means_CD = _class_means(x_ND, labels_N)
        self.classes = Gaussians.around(means_CD, x_ND - means_CD[labels_N])
        return self

    def score(self, features_ND: Tensor, logits_NC: Tensor) -> Tensor:
        return self.classes.distances(self._prepared(features_ND)).amin(1)

    def _prepared(self, features_ND: Tensor) -> Tensor:
        return features_ND.double()


class MahalanobisPlusPlus(Mahalanobis):
    """Mahalanobis of features of length one. Source: Mueller and Hein, 2025."""

    def _prepared(self, features_ND: Tensor) -> Tensor:
        return F.normalize(features_ND.double(), dim=1)


class RelativeMahalanobis(Mahalanobis):
    """RMD: Mahalanobis, less that to one Gaussian of all rows. Source: Ren et al., 2021."""

    def fit(self, features_ND: Tensor, logits_NC: Tensor, labels_N: Tensor) -> RelativeMahalanobis:
        super().fit(features_ND, logits_NC, labels_N)
        x_ND = features_ND.double()
        mean_1D = x_ND.mean(0, keepdim=True)
        self.background = Gaussians.around(mean_1D, x_ND - mean_1D)
        return self

    def score(self, features_ND: Tensor, logits_NC: Tensor) -> Tensor:
        background_N = self.background.distances(features_ND.double()).amin(1)
        return super().score(features_ND, logits_NC) - background_N


class KNN:
    """Distance to the k-th nearest fitted row, all of length one. Source: Sun et al., 2022.

    Args:
        k: from 1 up; default 50, which is for CIFAR's 50 000 rows, or a hundredth of the fitted
            rows where that is less, but at least 1.
    """

    def __init__(self, k: int | None = None) -> None:
        self.given_k = k

    def fit(self, features_ND: Tensor, logits_NC: Tensor, labels_N: Tensor) -> KNN:
        self.rows_ND = F.normalize(features_ND.double(), dim=1)
        self.k = self.given_k or max(1, min(50, len(self.rows_ND) // 100))
        if self.k > len(self.rows_ND):
            raise ValueError(f"k is {self.k}; accepted: up to the {len(self.rows_ND)} fitted rows")
        return self

    def score(self, features_ND: Tensor, logits_NC: Tensor) -> Tensor:
        chunks = F.normalize(features_ND.double(), dim=1).split(1024)
        return torch.cat([torch.cdist(x, self.rows_ND).kthvalue(self.k).values for x in chunks])


class ViM:
    """alpha |P(x + W^+ b)| - log sum_c exp(logit_c). Source: Wang et al., 2022.

    P projects onto what the principal subspace of the fitted features leaves; alpha makes the
    first term as large as the largest logit, in the mean over the fitted rows.

    Args:
        weight_CD, bias_C: of the head, whose input the features are.
        dim: of the principal subspace, below D; default 1000 for D >= 2048, 512 for D >= 768, else
            half of D.
    """

    def __init__(self, weight_CD: Tensor, bias_C: Tensor, dim: int | None = None) -> None:
        self.origin_D = -torch.linalg.pinv(weight_CD.detach().double()) @ bias_C.detach().double()
        width = weight_CD.shape[1]
        self.dim = dim or (1000 if width >= 2048 else 512 if width >= 768 else width // 2)
        if self.dim >= width:
            raise ValueError(f"dim is {self.dim}; accepted: below {width}, the width of the head")

    def fit(self, features_ND: Tensor, logits_NC: Tensor, labels_N: Tensor) -> ViM:
        x_ND = features_ND.double() - self.origin_D
        _, directions_DD = torch.linalg.eigh(x_ND.T @ x_ND)  # the smallest first
        self.residual_DR = directions_DD[:, : x_ND.shape[1] - self.dim]
        norm = (x_ND @ self.residual_DR).norm(dim=1).mean()
        self.alpha = float(logits_NC.double().amax(1).mean() / norm)
        return self

    def score(self, features_ND: Tensor, logits_NC: Tensor) -> Tensor:
        residual_NR = (features_ND.double() - self.origin_D) @ self.residual_DR
        return self.alpha * residual_NR.norm(dim=1) - logits_NC.double().logsumexp(1)


class TiedGaussianMixture:
    """-log p(x) of a mixture of Gaussians of one covariance, by EM from k-means.

    The covariance is shrunk in every round by what Ledoit and Wolf find for k-means' residuals.

    Args:
        components: K, from 1 up to the number of fitted rows.
        seed: of k-means.
        rounds: of EM; it ends sooner where a round gains less than 1e-3 nats a row.
    """

    def __init__(self, components: int = 64, seed: int = 0, rounds: int = 100) -> None:
        self.components, self.seed, self.rounds = components, seed, rounds

    def fit(self, features_ND: Tensor, logits_NC: Tensor, labels_N: Tensor) -> TiedGaussianMixture:
        x_ND = features_ND.double()
        centers_KD = _k_means(x_ND, self.components, self.seed)
        nearest_N = torch.cdist(x_ND, centers_KD).argmin(1)
        covariance = imported("sklearn.covariance", "surprise")
        residuals_ND = x_ND - centers_KD[nearest_N]
        _, self.shrinkage = covariance.ledoit_wolf(residuals_ND.numpy(), assume_centered=True)
        shares_NK = F.one_hot(nearest_N, self.components).double()
        before = -math.inf
        for _ in range(self.rounds):
            self._maximise(x_ND, shares_NK)
            log_joint_NK = self._log_joint(x_ND)
            shares_NK = log_joint_NK.softmax(1)
            now = float(log_joint_NK.logsumexp(1).mean())
            if now - before < 1e-3:
                break
            before = now
        return self

    def score(self, features_ND: Tensor, logits_NC: Tensor) -> Tensor:
        return -self._log_joint(features_ND.double()).logsumexp(1)

    def _maximise(self, x_ND: Tensor, shares_NK: Tensor) -> None:
        mass_K = shares_NK.sum(0).clamp_min(1e-10)
        self.log_weights_K = (mass_K / mass_K.sum()).log()
        means_KD = shares_NK.T @ x_ND / mass_K[:, None]
        within_DD = (x_ND.T @ x_ND - (means_KD * mass_K[:, None]).T @ means_KD) / len(x_ND)
        shrunk_DD = (1 - self.shrinkage) * within_DD
        shrunk_DD.diagonal().add_(self.shrinkage * within_DD.diagonal().mean())
        self.gaussians = Gaussians(means_KD, _cholesky(shrunk_DD))

    def _log_joint(self, x_ND: Tensor) -> Tensor:
        """(N, K): log of weight times density."""
        factor_DD = self.gaussians.factor
        log_norm = factor_DD.diagonal().log().sum() + len(factor_DD) / 2 * math.log(2 * math.pi)
        return self.log_weights_K - self.gaussians.distances(x_ND) / 2 - log_norm


class LengthPlusEntropy:
    """L + H of `soft_assign` with its default weights: the published form, kept to be compared.

    It FALLS with the distance from all codes, beside which no code is sure.

    Args:
        codes: K, of k-means on the fitted rows.
        temperature: of `soft_assign`.
        seed: of k-means.
    """

    def __init__(self, codes: int = 16, temperature: float = 1.0, seed: int = 0) -> None:
        self.codes, self.temperature, self.seed = codes, temperature, seed

    def fit(self, features_ND: Tensor, logits_NC: Tensor, labels_N: Tensor) -> LengthPlusEntropy:
        self.centers_KD = _k_means(features_ND.double(), self.codes, self.seed)
        return self

    def score(self, features_ND: Tensor, logits_NC: Tensor) -> Tensor:
        code = soft_assign(features_ND.double(), self.centers_KD, temperature=self.temperature)
        return code.surprise


class EqualZScores:
    """combo_id_zscore_equal: the mean of the z-scores of several baselines, all of equal weight.

    Means and standard deviations are those of in-distribution rows that the parts were not fitted
    on: one fifth of the rows given, drawn by the seed.

    Args:
        parts: the baselines; default Energy, Mahalanobis and KNN, one of each sort.
        seed: which rows are held out.
    """

    def __init__(self, parts: list[Baseline] | None = None, seed: int = 0) -> None:
        self.parts = parts or [Energy(), Mahalanobis(), KNN()]
        self.seed = seed

    def fit(self, features_ND: Tensor, logits_NC: Tensor, labels_N: Tensor) -> EqualZScores:
        order = torch.randperm(len(labels_N), generator=torch.Generator().manual_seed(self.seed))
        held_out, fitted = order[: len(order) // 5], order[len(order) // 5 :]
        for part in self.parts:
            part.fit(features_ND[fitted], logits_NC[fitted], labels_N[fitted])
        scores_PN = self._scores(features_ND[held_out], logits_NC[held_out])
        self.mean_P1 = scores_PN.mean(1, keepdim=True)
        self.std_P1 = scores_PN.std(1, keepdim=True).clamp_min(1e-12)
        return self

    def score(self, features_ND: Tensor, logits_NC: Tensor) -> Tensor:
        return ((self._scores(features_ND, logits_NC) - self.mean_P1) / self.std_P1).mean(0)

    def _scores(self, features_ND: Tensor, logits_NC: Tensor) -> Tensor:
        return torch.stack([part.score(features_ND, logits_NC) for part in self.parts])


def _class_means(x_ND: Tensor, labels_N: Tensor) -> Tensor:
    missing = sorted(set(range(int(labels_N.max()) + 1)) - set(labels_N.tolist()))
    if missing:
        raise ValueError(f"labels hold no row of class {missing}; accepted: every class from 0 up")
    return torch.stack([x_ND[labels_N == c].mean(0) for c in range(int(labels_N.max()) + 1)])


def _cholesky(covariance_DD: Tensor) -> Tensor:
    """Of the covariance and a ridge of 1e-6 of the mean variance: a dead unit has no variance."""
    ridge = max(1e-6 * float(covariance_DD.diagonal().mean()), 1e-12)
    eye_DD = torch.eye(len(covariance_DD), dtype=covariance_DD.dtype)
    return torch.linalg.cholesky(covariance_DD + ridge * eye_DD)


def _whiten(x_ND: Tensor, factor_DD: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(factor_DD, x_ND.T, upper=False).T


def _k_means(x_ND: Tensor, codes: int, seed: int) -> Tensor:
    if not 1 <= codes <= len(x_ND):
        raise ValueError(f"{codes} codes; accepted: 1 to the {len(x_ND)} fitted rows")
    cluster = imported("sklearn.cluster", "surprise")
    found = cluster.KMeans(codes, n_init=1, random_state=seed).fit(x_ND.numpy())
    return torch.from_numpy(found.cluster_centers_)
