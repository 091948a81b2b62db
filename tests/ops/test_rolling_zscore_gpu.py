"""rolling_zscore in Triton: in its interpreter, compiled ahead of time, and on a device.

Run as a module, this file is a process of triton_process.py.
"""

from __future__ import annotations

import itertools
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from foreshock.ops import RollingZScore
from foreshock.ops.rolling_zscore import reference
from foreshock.ops.rolling_zscore.state import DTYPES, Settings, State
from tests.ops.rolling_zscore_cases import CPU, assert_scores, run, troubled
from tests.ops.triton_process import compile_all, interpreted, main, results_of

# One process has what Triton makes, once.
pytestmark = pytest.mark.xdist_group("rolling_zscore in Triton")

GPU = torch.device("cuda", 0)
WINDOWS = [1, 2, 7]
CLIPS = {"unclipped": None, "clipped": 3.0}
KEPT = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
CASES = ["-".join(case) for case in itertools.product(map(str, WINDOWS), CLIPS, KEPT)]


def case(name: str) -> tuple[Tensor, int, Settings, torch.dtype]:
    """More series than a program serves, of values as in the tests on the CPU."""
    window, clip, dtype = name.split("-")
    s = Settings.of(min(3, int(window)), 0, CLIPS[clip], 1e6)
    return troubled(20, 133), int(window), s, KEPT[dtype]


def assert_agrees(found: tuple[Tensor, ...], name: str) -> None:
    expected, state = run(reference.bind, *case(name))
    z, ring, _, counts = found
    assert_scores(z, expected)
    assert torch.equal(counts, state.counts)
    torch.testing.assert_close(ring, state.ring, rtol=1e-6, atol=1e-6)


# Triton without a GPU.


def interpret() -> dict[str, Any]:
    from foreshock.ops.rolling_zscore import triton

    assert triton.why_unavailable("cpu") is None

    def attempt(name: str) -> tuple[Tensor, ...] | str:
        try:
            z, state = run(triton.bind, *case(name))
        except Exception:
            return traceback.format_exc()
        return z, *state

    return {name: attempt(name) for name in CASES}


def compile_kernels() -> dict[str, Any]:
    """Of every pair of dtypes and architecture: machine code, shared memory and PTX."""
    from triton.compiler import ASTSource

    from foreshock.ops.rolling_zscore import triton as ours

    sources = {}
    for kept, value in itertools.product(KEPT, POINTERS):
        signature = {"values_ptr": POINTERS[value], "z_ptr": POINTERS[kept]}
        signature |= {"ring_ptr": POINTERS[kept], "moments_ptr": "*fp64", "counts_ptr": "*i64"}
        signature |= {"limits_ptr": "*fp64"} | dict.fromkeys(SCALARS, "i32")
        sources[f"{kept}-{value}"] = ASTSource(ours._rolling_zscore_push_kernel, signature)
    return compile_all(sources, ours.OPTIONS)


POINTERS = {"float64": "*fp64", "float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}
SCALARS = ["stride", "series", "window", "min_count", "ddof"]
COMPILED = [
    f"sm{capability}-{kept}-{value}"
    for capability, kept, value in itertools.product((80, 90), KEPT, POINTERS)
]


@pytest.fixture(scope="module")
def triton_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Any]]:
    """Results of `interpret` and `compile_kernels`, each run in a process of its own."""
    yield from results_of(__name__, tmp_path_factory.mktemp("triton"))


@pytest.mark.parametrize("name", CASES)
def test_triton_agrees_with_the_reference(triton_process: Callable[[str], Any], name: str) -> None:
    assert_agrees(interpreted(triton_process("interpret")[name]), name)


@pytest.mark.parametrize("name", COMPILED)
def test_triton_compiles_ahead_of_time(triton_process: Callable[[str], Any], name: str) -> None:
    kernel = triton_process("compile_kernels")[name]
    assert kernel["cubin"] == b"\x7fELF"
    assert kernel["shared_bytes"] <= 48 << 10  # what every device grants without being asked
    assert ".ftz" not in kernel["ptx"], "denormals would be flushed"
    assert "sqrt.rn.f64" in kernel["ptx"]
    assert "div.rn.f64" in kernel["ptx"]


# On a device.


@pytest.fixture(params=["reference", "triton"])
def bind(request: pytest.FixtureRequest) -> Callable[..., Any]:
    if request.param == "reference":
        return reference.bind
    triton = pytest.importorskip("foreshock.ops.rolling_zscore.triton")
    reason = triton.why_unavailable("cuda")
    if reason is not None:
        pytest.skip(reason)
    return triton.bind  # type: ignore[no-any-return]


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_agrees_on_the_device(bind: Callable[..., Any], name: str) -> None:
    values, *rest = case(name)
    z, state = run(bind, values.to(GPU), *rest)
    assert_agrees((z.cpu(), *(t.cpu() for t in state)), name)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_values_of_any_type_and_stride_are_read(
    bind: Callable[..., Any], dtype: torch.dtype
) -> None:
    state, right = (State.empty(9, 4, torch.float64, device) for device in (GPU, CPU))
    push, expected = bind(state, S := Settings.of(2, 0, None, 1e6)), reference.bind(right, S)
    z, z_right = torch.empty(9, device=GPU).double(), torch.empty(9).double()
    for _ in range(7):
        x = torch.randn(18).to(dtype)
        push(x.to(GPU)[::2], z)
        expected(x[::2], z_right)
        assert_scores(z.cpu(), z_right)


@pytest.mark.gpu
def test_a_push_waits_for_nothing_and_allocates_nothing(bind: Callable[..., Any]) -> None:
    state = State.empty(1000, 64, torch.float64, GPU)
    push = bind(state, Settings.of(2, 0, 3.0, 1e6))
    x, z = torch.randn(1000, device=GPU), torch.empty(1000, dtype=torch.float64, device=GPU)
    push(x, z)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        push(x, z)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    if bind is not reference.bind:
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@pytest.mark.gpu
def test_the_op_waits_for_nothing() -> None:
    state = State.empty(5, 4, torch.float64, GPU)
    x = torch.randn(5, device=GPU)
    torch.ops.foreshock.rolling_zscore(x, *state, 2, 0, 3.0, 1e6)
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.ops.foreshock.rolling_zscore(x, *state, 2, 0, 3.0, 1e6)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_captured_push_takes_what_is_there_at_its_replay(bind: Callable[..., Any]) -> None:
    s = Settings.of(2, 0, 3.0, 1e6)
    state, right = (State.empty(5, 4, torch.float64, device) for device in (GPU, CPU))
    x, z = torch.zeros(5, device=GPU).double(), torch.zeros(5, device=GPU).double()
    push, expected = bind(state, s), reference.bind(right, s)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        push(x, z)
    z_right = torch.empty(5, dtype=torch.float64)
    for row in troubled(20, 5):
        x.copy_(row)
        graph.replay()
        expected(row, z_right)
        assert_scores(z.cpu(), z_right)


@pytest.mark.gpu
def test_the_public_class_runs_there() -> None:
    zscore, right = (
        RollingZScore(6, 5, min_count=2, device="cuda"),
        RollingZScore(6, 5, min_count=2),
    )
    for row in troubled(20, 6):
        z = zscore.push(row.to(GPU))
        assert z.is_cuda
        assert_scores(z.cpu(), right.push(row))
    assert zscore.nonfinite.cpu().tolist() == right.nonfinite.tolist()
    with pytest.raises(ValueError, match="values is on cpu; accepted: cuda:0"):
        zscore.push(torch.zeros(6))
    with pytest.raises(TypeError, match="values is a list; accepted on cuda:0: a tensor there"):
        zscore.push([0.0] * 6)
    with pytest.raises(ValueError, match="accepted: one on the CPU"):
        RollingZScore(1, 5, device="cuda").push_float(1.0)


@pytest.mark.gpu
def test_triton_compiles_when_it_binds_and_never_later(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("foreshock.ops.rolling_zscore.triton")
    if triton.why_unavailable("cuda") is not None:
        pytest.skip(triton.why_unavailable("cuda"))
    state = State.empty(300, 17, torch.float64, GPU)
    push = triton.bind(state, Settings.of(2, 0, None, 1e6))
    monkeypatch.setattr(triton._rolling_zscore_push_kernel, "_do_compile", None)
    z = torch.empty(300, dtype=torch.float64, device=GPU)
    for dtype in triton.VALUE_DTYPES:
        push(torch.randn(600, device=GPU).to(dtype)[::2], z)
        push(torch.randn(301, device=GPU).to(dtype)[1:], z)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main({"interpret": interpret, "compile_kernels": compile_kernels})
