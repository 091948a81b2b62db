"""Compiled one-pass operations: tensors in, numbers out."""

from foreshock.ops._backend import active_backends as active_backends
from foreshock.ops.calibrated_scores import CalibratedScores, calibrated_scores
from foreshock.ops.health_scan import HealthScanner, HealthStats, health_scan
from foreshock.ops.power_iteration import (
    PowerIterator,
    PowerState,
    SpectralStats,
    kappa,
    power_iteration,
)
from foreshock.ops.rolling_zscore import RollingZScore
from foreshock.ops.soft_assign import Assignment, SoftAssigner, SoftCode, soft_assign

__all__ = [
    "Assignment",
    "CalibratedScores",
    "HealthScanner",
    "HealthStats",
    "PowerIterator",
    "PowerState",
    "RollingZScore",
    "SoftAssigner",
    "SoftCode",
    "SpectralStats",
    "active_backends",
    "calibrated_scores",
    "health_scan",
    "kappa",
    "power_iteration",
    "soft_assign",
]
