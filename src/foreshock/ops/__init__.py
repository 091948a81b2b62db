"""Compiled one-pass operations: tensors in, numbers out."""

from foreshock.ops._backend import active_backends as active_backends
from foreshock.ops.health_scan import HealthScanner, HealthStats, health_scan

__all__ = ["HealthScanner", "HealthStats", "active_backends", "health_scan"]
