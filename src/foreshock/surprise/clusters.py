"""Codes in the space where the spread within clusters is the same in every direction."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]
Floats = NDArray[np.float32]

# Directions of less variance than this part of the largest hold rounding of float32, no features.
_LEAST_VARIANCE = 1e-7
# Less variance than this part of the rows' own is their rounding alone.
_ROUNDING = 1e-12
_MOST_ITERATIONS = 100


@dataclasses.dataclass(frozen=True, eq=False)
class Clusters:
    """z = (x - mean) @ projection, whose nearest code is among centers."""

    mean: Doubles
    """(D,)"""
    projection: Doubles
    """(D, E): to the E principal components that are kept, whitened."""
    centers: Doubles
    """(K, E): codes, as z."""


def fit_clusters(rows: Floats, codes: int, dim: int | None, whiten: bool, seed: int) -> Clusters:
    """Codes of rows, in units of the spread that is left within their clusters.

    k-means (k-means++) -> residuals r = x - c -> C = (1 - d) mean(r r^T) + d mean(r^2) I
    -> A = C^(-1/2) -> k-means anew of x A. Without whitening A = mean(r^2)^(-1/2) I.

    Args:
        rows: (R, D), finite, with R at least 2 codes.
        codes: K; fewer come out if the rows have fewer different values.
        dim: how many principal components are kept, at most; None: the features as they are.
        whiten: whether directions are weighed by the spread within clusters.
        seed: of both k-means.
    Raises:
        ImportError: scikit-learn is missing.
    Cost:
        O(R K D) an iteration of k-means, O(R D^2 + D^3) the covariance; on one thread, so that the
        same rows give the same codes on every machine with the same libraries.
    Source:
        Arthur and Vassilvitskii (2007), k-means++; Ledoit and Wolf (2004) for the shrinkage d.
    """
    cluster, covariance, threadpoolctl = _scikit_learn()
    mean: Doubles = rows.mean(0, dtype=np.float64)
    kept: Doubles = rows - mean
    basis = _principal(kept, dim)
    kept = kept if basis is None else kept @ basis
    with threadpoolctl.threadpool_limits(limits=1), _few_values_are_no_fault():
        first = _k_means(cluster, kept, codes, seed)
        residuals = kept - first.cluster_centers_[first.labels_]
        spread = _whitening(covariance, residuals, whiten, float(np.square(kept).mean()))
        second = _k_means(cluster, kept @ spread, codes, seed)
    centers = second.cluster_centers_[np.unique(second.labels_)].astype(np.float64)
    return Clusters(mean, spread if basis is None else basis @ spread, centers)


def _scikit_learn() -> tuple[Any, Any, Any]:
    try:
        import threadpoolctl
        from sklearn import cluster, covariance
    except ImportError as error:
        raise ImportError(
            "surprise.fit takes k-means from scikit-learn; pip install 'foreshock[surprise]'"
        ) from error
    return cluster, covariance, threadpoolctl


@contextlib.contextmanager
def _few_values_are_no_fault() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Number of distinct clusters")
        yield


def _k_means(cluster: Any, rows: Doubles, codes: int, seed: int) -> Any:
    means = cluster.KMeans(codes, n_init=1, max_iter=_MOST_ITERATIONS, random_state=seed)
    return means.fit(rows.astype(np.float32))  # half the time, and the rows are centred


def _principal(centred: Doubles, dim: int | None) -> Doubles | None:
    """(D, E): the directions of most variance; None if all are kept."""
    if dim is None or dim >= centred.shape[1]:
        return None
    _, directions = np.linalg.eigh(centred.T @ centred)
    kept: Doubles = np.ascontiguousarray(directions[:, ::-1][:, :dim])  # largest first
    return kept


def _whitening(covariance: Any, residuals: Doubles, whiten: bool, total: float) -> Doubles:
    """(D, D): A, after which residuals, of rows with variance `total`, have unit variance."""
    features = residuals.shape[1]
    common = float(np.square(residuals).mean())
    if common <= _ROUNDING * total:  # no more values than codes: nothing is known of a spread
        return np.eye(features) / math.sqrt(total or 1.0)
    if not whiten:
        return np.eye(features) / math.sqrt(common)
    shrunk, _ = covariance.ledoit_wolf(residuals, assume_centered=True)
    variances, directions = np.linalg.eigh(shrunk)
    least = _LEAST_VARIANCE * variances[-1]
    whitened: Doubles = directions / np.sqrt(np.maximum(variances, least))
    return whitened
