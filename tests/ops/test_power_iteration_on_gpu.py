"""power_iteration in Triton and CUDA C++ on a real device, against the reference on the host."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from foreshock.ops import PowerIterator
from foreshock.ops._backend import Choice
from foreshock.ops.power_iteration import reference
from tests.ops.power_iteration_cases import (
    ABOVE,
    ALL_CASES,
    RTOL,
    Bind,
    assert_agrees,
    case,
    random_vectors,
    run_pass,
    svd_norm,
)

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)
BACKENDS = ("triton", "cuda")
SHAPES = [(50257, 768), (1024, 768), *[(768, 2304), (768, 768), (768, 3072), (3072, 768)] * 12]


@pytest.fixture(params=BACKENDS)
def module(request: pytest.FixtureRequest) -> Any:
    found = importlib.import_module(f"foreshock.ops.power_iteration.{request.param}")
    reason = found.why_unavailable("cuda")
    if reason is not None:
        pytest.skip(reason)
    return found


@pytest.fixture
def bind(module: Any) -> Bind:
    return module.bind  # type: ignore[no-any-return]


@pytest.fixture
def chosen(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The public functions run on this implementation."""
    package = importlib.import_module("foreshock.ops.power_iteration")
    monkeypatch.setattr(package, "choose", lambda *_: Choice("chosen", module, {}))


def gaussian(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device=GPU).to(dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ALL_CASES)
def test_agrees_on_the_device(bind: Bind, name: str) -> None:
    assert_agrees(run_pass(bind, *case(name, GPU)), *case(name, CPU))


BIG = {
    "tall": (50257, 768),
    "square": (4096, 4096),
    "odd": (1025, 4099),
    "long rows": (1000, 11008),
    "longest rows whole": (515, 16384),
    "rows in segments": (300, 28672),
    "65536 columns": (130, 65536),
    "many rows": (1_000_003, 24),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", BIG.values(), ids=BIG)
def test_big_matrices_agree(bind: Bind, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Against the reference on the device, in float64."""
    weights = [gaussian(shape, dtype)]
    vectors = random_vectors(weights).to(GPU)
    found, right = (run_pass(b, weights, vectors) for b in (bind, reference.bind))
    torch.testing.assert_close(found.rows, right.rows, rtol=2 * RTOL[dtype], atol=0)
    assert (found.vectors - right.vectors).norm() <= 2 * RTOL[dtype]


@pytest.mark.gpu
def test_more_elements_than_an_int32_counts(bind: Bind) -> None:
    shape = (2**19 + 1, 2**12 + 64)
    if torch.cuda.mem_get_info()[0] < 3 * shape[0] * shape[1]:
        pytest.skip("needs 7 GB of device memory")
    W = torch.zeros(shape, dtype=torch.bfloat16, device=GPU)
    W[0, 0], W[-1, -1], W[2**18, 7] = 1.0, 3.0, -2.0
    vectors = torch.zeros(2, shape[1], dtype=torch.float64, device=GPU)
    vectors[0, [0, 7, -1]] = 3**-0.5
    rows, _ = run_pass(bind, [W], vectors)
    u, y = (1 + 9 + 4) ** 0.5, (1 + 81 + 16) ** 0.5
    assert rows[0, :2].tolist() == pytest.approx([y / u, u], rel=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_pass_gives_the_same_bits_in_any_list(bind: Bind, dtype: torch.dtype) -> None:
    weights = [gaussian(shape, dtype) for shape in SHAPES[:6]]
    vectors = random_vectors(weights).to(GPU)
    runs = [run_pass(bind, weights, vectors) for _ in range(20)]
    assert all(torch.equal(run.rows, runs[0].rows) for run in runs)
    assert all(torch.equal(run.vectors, runs[0].vectors) for run in runs)
    spans = vectors.split([shape[1] for shape in SHAPES[:6]], dim=1)
    alone = [run_pass(bind, [w], v.contiguous()) for w, v in zip(weights, spans, strict=True)]
    assert torch.equal(torch.cat([run.rows for run in alone]), runs[0].rows)
    assert torch.equal(torch.cat([run.vectors for run in alone], dim=1), runs[0].vectors)


@pytest.mark.gpu
def test_a_whole_model_is_followed_from_a_cold_start(chosen: None) -> None:
    weights = [gaussian(shape, torch.bfloat16) for shape in [(30, 20), *SHAPES[1:6], (8, 9000)]]
    iterator = PowerIterator([*weights, torch.zeros_like(weights[0])])
    for _ in range(60):
        stats = iterator()
    found = stats.sigma_max[:-1].tolist()
    errors = [1 - s / svd_norm(w.cpu()) for s, w in zip(found, weights, strict=True)]
    assert min(errors) >= -ABOVE
    assert max(errors) <= 0.01
    assert stats.packed[-1].tolist() == [0.0] * 5


@pytest.mark.gpu
def test_a_captured_pass_reads_what_is_there_at_its_replay(bind: Bind) -> None:
    weights = [gaussian((300, 700), torch.bfloat16), gaussian((9, 9000), torch.float32)]
    vectors = random_vectors(weights).to(GPU)
    moved, packed = vectors.clone(), torch.full((2, 5), torch.nan, dtype=torch.float64, device=GPU)
    call = bind(weights, moved, packed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for step in range(3):
        weights[0][step, step] = 50.0
        before = moved.clone()
        packed.fill_(torch.nan)
        graph.replay()
        right = run_pass(reference.bind, weights, before)
        torch.testing.assert_close(packed, right.rows, rtol=1e-5, atol=0)
        torch.testing.assert_close(moved, right.vectors, rtol=0, atol=1e-5)


@pytest.mark.gpu
def test_nothing_waits_for_the_device(bind: Bind) -> None:
    weights, vectors = case("mixed", GPU)
    packed = torch.empty(len(weights), 5, dtype=torch.float64, device=GPU)
    bind(weights, vectors.clone(), packed)  # compiles what it needs
    moved = vectors.clone()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call = bind(weights, moved, packed)
        bound = torch.cuda.memory_stats()["allocation.all.allocated"]
        call()
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == bound
    finally:
        torch.cuda.set_sync_debug_mode("default")
    right = run_pass(bind, weights, vectors)
    assert torch.equal(packed.nan_to_num(7), right.rows.nan_to_num(7))
    assert torch.equal(moved, right.vectors)


@pytest.mark.gpu
@pytest.mark.parametrize("iters", [None, 1, 3, 6, 20])
def test_no_number_of_passes_waits_for_the_device(chosen: None, iters: int | None) -> None:
    weights = [gaussian((40, 30), torch.float32), gaussian((20, 9000), torch.bfloat16)]
    PowerIterator(weights)(iters=6)  # loads torch's own kernels
    iterator = PowerIterator(weights)
    iterator.state.is_warm = (True, False)  # as where one weight's memory order has changed
    torch.cuda.set_sync_debug_mode("error")
    try:
        iterator(iters=iters)
        iterator()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert iterator.stats.packed.isfinite().all()


@pytest.mark.gpu
def test_runs_on_the_current_stream(bind: Bind) -> None:
    """Both the bind, still under way on the other stream, and the values are waited for."""
    W = torch.zeros(1 << 11, 1 << 10, device=GPU)
    vectors = torch.zeros(2, 1 << 10, dtype=torch.float64, device=GPU)
    vectors[0] = 2.0**-5
    packed = torch.empty(1, 5, dtype=torch.float64, device=GPU)
    bind([W], vectors.clone(), packed)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    torch.cuda._sleep(100_000_000)
    call = bind([W], vectors, packed)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        W.fill_(2.0)
        call()
    stream.synchronize()
    assert packed[0, :2].tolist() == pytest.approx([2 * 2.0**10.5] * 2, rel=1e-6)


@pytest.mark.gpu
def test_triton_compiles_when_it_binds_and_never_later(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = importlib.import_module("foreshock.ops.power_iteration.triton")
    if triton.why_unavailable("cuda") is not None:
        pytest.skip(triton.why_unavailable("cuda"))
    weights, vectors = case("mixed", GPU)
    packed = torch.empty(len(weights), 5, dtype=torch.float64, device=GPU)
    call = triton.bind(weights, vectors.clone(), packed)
    for stage in ("pass", "chunk", "matrix"):
        kernel = getattr(triton, f"_power_iteration_{stage}_kernel")
        monkeypatch.setattr(kernel, "_do_compile", None)
    call()
    assert_agrees(run_pass(triton.bind, weights, vectors), *case("mixed", CPU))
