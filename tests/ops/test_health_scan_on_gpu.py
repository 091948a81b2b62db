"""health_scan in Triton and CUDA C++ on a real device, against the reference on the host."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor

from tests.ops.health_scan_cases import CASES, CPU, Bind, assert_agrees, case, scan


@pytest.fixture(params=["triton", "cuda"])
def bind(request: pytest.FixtureRequest) -> Bind:
    module = importlib.import_module(f"foreshock.ops.health_scan.{request.param}")
    reason = module.why_unavailable("cuda")
    if reason is not None:
        pytest.skip(reason)
    return module.bind  # type: ignore[no-any-return]


GPU = torch.device("cuda", 0)
GPT_SHAPES = [(50257, 768), (1024, 768)] + 12 * [
    *[(768,), (768,), (2304, 768), (2304,), (768, 768), (768,)],
    *[(768,), (768,), (3072, 768), (3072,), (768, 3072), (768,)],
] + [(768,), (768,)]  # fmt: skip


def gpt_gradients(dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(shape, device=GPU, dtype=torch.float32).to(dtype) for shape in GPT_SHAPES]


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*CASES, "mixed"])
def test_agrees_on_the_device(bind: Bind, name: str) -> None:
    assert_agrees(scan(bind, case(name, GPU), GPU), case(name, CPU))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scans_a_whole_model(bind: Bind, dtype: torch.dtype) -> None:
    gradients = gpt_gradients(dtype)
    assert len(gradients) == 148
    gradients[77].view(-1)[5] = torch.nan
    gradients[2].view(-1)[-1] = -torch.inf
    assert_agrees(scan(bind, list(gradients), GPU), [g.cpu() for g in gradients])


@pytest.mark.gpu
@pytest.mark.parametrize("scale", [1e-6, 1e18])
def test_a_hundred_million_elements_are_summed_to_one_in_a_million(
    bind: Bind, scale: float
) -> None:
    x = (torch.rand(100_000_000, device=GPU) * scale).bfloat16()
    found, wide = scan(bind, [x], GPU)[0], x.double()
    torch.testing.assert_close(found[4], wide.sum(), rtol=1e-6, atol=0)
    torch.testing.assert_close(found[5], wide.square().sum(), rtol=1e-6, atol=0)


@pytest.mark.gpu
def test_scans_more_elements_than_an_int32_counts(bind: Bind) -> None:
    n = 2**31 + 2**20 + 3
    if torch.cuda.mem_get_info()[0] < 3 * n:
        pytest.skip("needs 7 GB of device memory")
    x = torch.zeros(n, dtype=torch.bfloat16, device=GPU)
    for place, value in ((0, 2.0), (2**31 - 1, torch.nan), (2**31, -3.0), (n - 1, torch.inf)):
        x[place] = value
    found = scan(bind, [x, x[1:], x.view(-1)[::2]], GPU).cpu()
    assert found.view(torch.int64)[:, :3].tolist() == [
        [n, 1, 1],
        [n - 1, 1, 1],
        [(n + 1) // 2, 0, 1],
    ]
    assert found[:, 3:].tolist() == [[3, -1, 13], [3, -3, 9], [3, -1, 13]]


@pytest.mark.gpu
def test_the_same_scan_gives_the_same_bits(bind: Bind) -> None:
    gradients: list[Tensor | None] = [*gpt_gradients(torch.float32)]
    runs = [scan(bind, gradients, GPU).view(torch.int64) for _ in range(20)]
    assert all(torch.equal(run, runs[0]) for run in runs)
    alone = torch.cat([scan(bind, [gradient], GPU) for gradient in gradients])
    assert torch.equal(alone.view(torch.int64), runs[0])


@pytest.mark.gpu
def test_a_captured_scan_reads_what_is_there_at_its_replay(bind: Bind) -> None:
    tensors: list[Tensor | None] = [*gpt_gradients(torch.bfloat16), None]
    packed = torch.full((len(tensors), 6), torch.nan, dtype=torch.float64, device=GPU)
    call = bind(tensors, packed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for step in range(3):
        for tensor in tensors[:-1]:
            assert tensor is not None
            tensor.fill_(step).view(-1)[step] = torch.nan
        packed.fill_(torch.nan)
        graph.replay()
        assert_agrees(packed, [None if t is None else t.cpu() for t in tensors])


@pytest.mark.gpu
def test_nothing_waits_for_the_device(bind: Bind) -> None:
    tensors = case("mixed", GPU)
    packed = torch.empty(len(tensors), 6, dtype=torch.float64, device=GPU)
    bind(tensors, packed)  # compiles what it needs
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        call = bind(tensors, packed)
        bound = torch.cuda.memory_stats()["allocation.all.allocated"]
        call()
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == bound > before
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_agrees(packed, case("mixed", CPU))


@pytest.mark.gpu
def test_runs_on_the_current_stream(bind: Bind) -> None:
    """Both the bind, still under way on the other stream, and the values are waited for."""
    x = torch.zeros(1 << 22, device=GPU)
    packed = torch.empty(1, 6, dtype=torch.float64, device=GPU)
    bind([x], packed)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    torch.cuda._sleep(100_000_000)
    call = bind([x], packed)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        x.fill_(2.0)
        call()
    stream.synchronize()
    assert packed[0, 3:].tolist() == [2, 2 << 22, 4 << 22]


@pytest.mark.gpu
def test_triton_compiles_when_it_binds_and_never_later(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = importlib.import_module("foreshock.ops.health_scan.triton")
    if triton.why_unavailable("cuda") is not None:
        pytest.skip(triton.why_unavailable("cuda"))
    tensors = case("mixed", GPU)
    packed = torch.empty(len(tensors), 6, dtype=torch.float64, device=GPU)
    call = triton.bind(tensors, packed)
    for kernel in (triton._health_scan_chunk_kernel, triton._health_scan_tensor_kernel):
        monkeypatch.setattr(kernel, "_do_compile", None)
    call()
    triton.bind(tensors[::-1], packed)()
    assert_agrees(packed, case("mixed", CPU)[::-1])
