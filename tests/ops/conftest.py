"""Implementations of the ops that this machine can run, and torch.empty that hides nothing."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import pytest
import torch

from foreshock.ops._backend import supported_isas
from foreshock.ops.health_scan import HealthStats, cpu, reference

Scan = Callable[[list[torch.Tensor | None]], HealthStats]


def _scan_with(bind: Callable[..., Callable[[], object]], tensors: list[torch.Tensor | None]):
    packed = torch.full((len(tensors), 6), torch.nan, dtype=torch.float64)
    bind(tensors, packed)()
    return HealthStats.from_packed(packed)


CPU_SCANS: dict[str, Scan] = {
    "reference": functools.partial(_scan_with, reference.bind),
    **{
        f"cpu-{isa}": functools.partial(_scan_with, functools.partial(cpu.bind, isa=isa))
        for isa in supported_isas()
    },
}


@pytest.fixture(params=list(CPU_SCANS))
def scan(request: pytest.FixtureRequest) -> Scan:
    return CPU_SCANS[request.param]


@pytest.fixture(params=[name for name in CPU_SCANS if name != "reference"])
def compiled_scan(request: pytest.FixtureRequest) -> Scan:
    return CPU_SCANS[request.param]


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan() -> Iterator[None]:
    """What an op forgets to write shows as NaN instead of as whatever lay there."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
