"""Compiled one-pass operations: tensors in, numbers out."""

import torch as _torch

from foreshock.ops._backend import choose as _choose
from foreshock.ops.health_scan import HealthScanner, HealthStats, health_scan

__all__ = ["OPS", "HealthScanner", "HealthStats", "active_backends", "health_scan"]

OPS = ("health_scan",)


def active_backends() -> dict[str, dict[str, str]]:
    """For each op, the backend that serves each kind of device present."""
    devices = ["cpu", *(["cuda"] if _torch.cuda.is_available() else [])]
    return {op: {device: _choose(op, device).backend for device in devices} for op in OPS}
