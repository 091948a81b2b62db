"""Implementations of the ops that this machine can run, and torch.empty that hides nothing."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from types import ModuleType

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


def _cases_of(tests: ModuleType) -> ModuleType:
    """`soft_assign_cases` for `test_soft_assign_calls`: implementations, and how to run on one."""
    ops = ("calibrated_scores", "power_iteration", "rolling_zscore", "soft_assign")
    op = next(op for op in ops if op in tests.__name__)
    return importlib.import_module(f"tests.ops.{op}_cases")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for fixture, names in {"implementation": "IMPLEMENTATIONS", "compiled": "COMPILED"}.items():
        if fixture in metafunc.fixturenames:
            found = getattr(_cases_of(metafunc.module), names)
            metafunc.parametrize(fixture, list(found), indirect=True)


@pytest.fixture
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the op of this module of tests runs on in this test."""
    _cases_of(request.module).use(request.param, monkeypatch)
    return str(request.param)


@pytest.fixture
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same, without the reference."""
    _cases_of(request.module).use(request.param, monkeypatch)
    return str(request.param)


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan() -> Iterator[None]:
    """What an op forgets to write shows as NaN instead of as whatever lay there."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
