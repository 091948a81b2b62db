"""health_scan in C++ (csrc/health_scan/cpu.cpp), once for each instruction set."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from foreshock.ops._backend import active_isa, load_kernels
from foreshock.ops._table import compiled_table


def why_unavailable(device_type: str) -> str | None:
    """What keeps this implementation from tensors of a device; None if nothing does."""
    if device_type != "cpu":
        return "reads the memory of the host only"
    kernels = load_kernels()
    return kernels if isinstance(kernels, str) else None


def bind(
    tensors: list[torch.Tensor | None], packed: torch.Tensor, isa: str | None = None
) -> Callable[[], None]:
    """Returns a call that scans these tensors into `packed`, (T, 6); see `HealthStats.packed`.

    The call owns what it needs but the tensors' memory, which the caller keeps alive. Its `table`
    can be made to follow tensors that have moved.
    """
    kernels = load_kernels()
    if isinstance(kernels, str):
        raise RuntimeError(kernels)
    table = compiled_table(tensors)
    plan = torch.empty(kernels.health_scan_plan_bytes(table.address, len(table)), dtype=torch.uint8)
    kernels.health_scan_plan(table.address, len(table), plan.data_ptr())
    scan = getattr(kernels, f"health_scan_{isa or active_isa()}")
    bound = functools.partial(scan, table.address, len(table), plan.data_ptr(), packed.data_ptr())
    bound.owns = (plan, packed)  # type: ignore[attr-defined]
    bound.table = table  # type: ignore[attr-defined]
    return bound
