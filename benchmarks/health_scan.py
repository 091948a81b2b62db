"""health_scan against everything a user would run instead; see docs/health_scan.md."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import rows
from benchmarks.ceiling import copy_probe, read_probe
from benchmarks.interleave import Timing, microseconds_of_call, time_in_turn
from foreshock.ops import HealthScanner, HealthStats, health_scan
from foreshock.ops._backend import supported_isas
from foreshock.ops.health_scan import cpu, reference

GPT2_124M = 148


def gpt2_shapes() -> list[tuple[int, ...]]:
    """The 148 parameters of GPT-2 124M."""
    block: list[tuple[int, ...]] = [(768,), (768,), (768, 2304), (2304,), (768, 768), (768,)]
    block += [(768,), (768,), (768, 3072), (3072,), (3072, 768), (768,)]
    return [(50257, 768), (1024, 768), *block * 12, (768,), (768,)]


def five_statistics(x: Tensor) -> Tensor:
    """What one scan finds, in torch's own operations."""
    finite = torch.where(torch.isfinite(x), x, 0).double()
    counts = torch.isnan(x).sum(), torch.isinf(x).sum()
    return torch.stack([*counts, finite.abs().amax(), finite.sum(), finite.square().sum()])


def five_statistics_in_numpy(x: np.ndarray[Any, Any]) -> list[float]:
    finite = np.where(np.isfinite(x), x, 0)
    sums = [finite.sum(dtype=np.float64), np.square(finite).sum(dtype=np.float64)]
    return [np.isnan(x).sum(), np.isinf(x).sum(), np.abs(finite).max(), *sums]


def assert_right(stats: HealthStats, tensors: list[Tensor]) -> None:
    """The answer first: against the reference, on the same tensors."""
    packed = torch.empty_like(stats.packed)
    reference.bind(list(tensors), packed)()
    expected = HealthStats.from_packed(packed)
    assert torch.equal(stats.nonfinite, expected.nonfinite)
    assert torch.equal(stats.absmax, expected.absmax)
    torch.testing.assert_close(stats.sumsq, expected.sumsq, rtol=1e-6, atol=0)


def bound(tensors: list[Tensor], isa: str) -> Callable[[], object]:
    packed = torch.empty(len(tensors), 6, dtype=torch.float64)
    run = cpu.bind(list(tensors), packed, isa=isa)
    run()
    assert_right(HealthStats.from_packed(packed), tensors)
    return run


def as_rows(timings: dict[str, Timing], num_bytes: int, ours: str) -> dict[str, dict[str, Any]]:
    base = timings[ours].median_ms
    return {
        name: {
            **t.row(),
            "gb_per_s": num_bytes / t.median_ms / 1e6,
            "times_ours": t.median_ms / base,
        }
        for name, t in timings.items()
    }


def for_every(call: Callable[[Tensor], object], tensors: list[Tensor]) -> Callable[[], object]:
    return lambda: [call(t) for t in tensors]


def eager_variants(tensors: list[Tensor]) -> dict[str, Callable[[], object]]:
    compiled = torch.compile(five_statistics, dynamic=True)
    return {
        "torch aminmax alone": for_every(torch.aminmax, tensors),
        "torch aminmax + sum + norm": for_every(
            lambda t: (torch.aminmax(t), t.sum(), torch.linalg.vector_norm(t)), tensors
        ),
        "torch _foreach_norm": lambda: torch._foreach_norm(tensors),
        "torch isfinite.all().item()": for_every(lambda t: t.isfinite().all().item(), tensors),
        "torch.compile, five statistics": for_every(compiled, tensors),
        "torch eager, five statistics": for_every(five_statistics, tensors),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_gpt2_124m_on_the_cpu(benchmark: Any, dtype: torch.dtype) -> None:
    tensors = [torch.randn(shape).to(dtype) for shape in gpt2_shapes()]
    assert len(tensors) == GPT2_124M
    num_bytes = sum(t.nbytes for t in tensors)
    ours = f"foreshock {supported_isas()[-1]}"
    variants: dict[str, Callable[[], object]] = {
        f"foreshock {isa}": bound(tensors, isa) for isa in supported_isas()
    }
    variants["read probe (ceiling)"] = read_probe(tensors)
    variants |= eager_variants(tensors)
    if dtype is torch.float32:
        arrays = [t.numpy() for t in tensors]
        variants["numpy, five statistics"] = lambda: [five_statistics_in_numpy(a) for a in arrays]
    slow = {name: 5 for name in variants if "five" in name or "isfinite" in name}
    timings = time_in_turn(benchmark, variants, rounds=41, slow=slow)
    case = f"124M {str(dtype).removeprefix('torch.')}, 148 tensors"
    rows.store("health_scan", case, "cpu", as_rows(timings, num_bytes, ours))


def test_a_large_bfloat16_model_on_the_cpu(benchmark: Any) -> None:
    gc.collect()
    tensors = [torch.randn(32_500_000).bfloat16() for _ in range(40)]
    num_bytes = sum(t.nbytes for t in tensors)
    ours = f"foreshock {supported_isas()[-1]}"
    variants: dict[str, Callable[[], object]] = {
        ours: bound(tensors, supported_isas()[-1]),
        "read probe (ceiling)": read_probe(tensors),
        "torch aminmax alone": for_every(torch.aminmax, tensors),
        "torch isfinite.all().item()": for_every(lambda t: t.isfinite().all().item(), tensors),
    }
    timings = time_in_turn(benchmark, variants, rounds=11, slow={"torch isfinite.all().item()": 3})
    case = "1.3B bfloat16, 40 tensors"
    rows.store("health_scan", case, "cpu", as_rows(timings, num_bytes, ours))


def test_overhead_of_a_call_on_the_cpu(benchmark: Any) -> None:
    """148 tensors of one element: what is not reading."""
    tensors = [torch.randn(1) for _ in range(GPT2_124M)]
    checked, trusted = HealthScanner(tensors), HealthScanner(tensors, recheck=False)
    none_checked, none_trusted = HealthScanner([]), HealthScanner([], recheck=False)
    assert_right(checked(), tensors)
    kernel = trusted._scan
    calls: dict[str, Callable[[], object]] = {
        "foreshock scanner, trusted table": trusted,
        "foreshock scanner, pointers re-read": checked,
        "foreshock kernel alone": kernel,
        "foreshock scanner without tensors, trusted table": none_trusted,
        "foreshock scanner without tensors, pointers re-read": none_checked,
        "foreshock health_scan, bound anew": lambda: health_scan(tensors),
        "torch.ops.foreshock.health_scan": lambda: torch.ops.foreshock.health_scan(tensors),
        "data_ptr() of each tensor": lambda: [t.data_ptr() for t in tensors],
        "torch _foreach_norm": lambda: torch._foreach_norm(tensors),
    }
    taken = {name: microseconds_of_call(call, calls=500) for name, call in calls.items()}
    benchmark.pedantic(checked, rounds=100, iterations=10)
    benchmark.extra_info |= taken
    found = {name: {"median_us": us} for name, us in taken.items()}
    rows.store("health_scan_call", "148 tensors of one element", "cpu", found)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("size", ["124M", "4B"])
def test_on_the_gpu(benchmark: Any, dtype: torch.dtype, size: str) -> None:
    from foreshock.ops.health_scan import cuda, triton

    shapes = gpt2_shapes() if size == "124M" else [(2**27,)] * 32
    tensors = [torch.randn(shape, device="cuda").to(dtype) for shape in shapes]
    num_bytes = sum(t.nbytes for t in tensors)
    variants: dict[str, Callable[[], object]] = {}
    for name, module in (("cuda", cuda), ("triton", triton)):
        packed = torch.full((len(tensors), 6), math.nan, dtype=torch.float64, device="cuda")
        variants[f"foreshock {name}"] = run = module.bind(list(tensors), packed)
        run()
        assert_right(HealthStats.from_packed(packed), tensors)
    found, scale = (torch.ones(1, device="cuda") * v for v in (0.0, 1.0))
    check = torch._amp_foreach_non_finite_check_and_unscale_
    variants["device copy (ceiling)"] = copy_probe(num_bytes // 2, "cuda")
    variants["torch _foreach_norm"] = lambda: torch._foreach_norm(tensors)
    variants["torch _amp check and unscale"] = lambda: check(tensors, found, scale)
    variants["torch isfinite.all().item()"] = for_every(
        lambda t: t.isfinite().all().item(), tensors
    )
    if size == "124M":
        compiled = torch.compile(five_statistics, dynamic=True)
        variants["torch.compile, five statistics"] = for_every(compiled, tensors)
    timings = time_in_turn(benchmark, variants, rounds=31, device="cuda")
    case = f"{size} {str(dtype).removeprefix('torch.')}, {len(tensors)} tensors"
    rows.store("health_scan", case, "cuda", as_rows(timings, num_bytes, "foreshock cuda"))
