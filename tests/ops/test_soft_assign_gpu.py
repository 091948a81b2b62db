"""soft_assign in Triton: in its interpreter, compiled ahead of time, and on a device.

Run as a module, this file is a process of triton_process.py.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.ops.triton_process import CAPABILITIES, compile_all, interpreted, main, results_of

# One process has what Triton makes, once.
pytestmark = pytest.mark.xdist_group("soft_assign in Triton")

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)
F32, F64 = torch.float32, torch.float64
GRADS = ("distance", "length", "entropy")


class Case(NamedTuple):
    """Gaussian rows and centers, and what is asked of them."""

    n: int
    d: int
    k: int
    dtype: torch.dtype = F32
    temperature: float = 1.0
    eps: float = 1e-12
    slab: int | None = None  # what backward holds at a time, if not what it is made for
    grads: tuple[str, ...] = GRADS  # that backward is given


CASES = {
    "float32": Case(70, 9, 130, temperature=3.0),
    "float64": Case(70, 9, 130, F64),
    "bfloat16": Case(33, 8, 20, torch.bfloat16),
    "float16": Case(33, 8, 20, torch.float16),
    "float32-felt-eps": Case(20, 3, 70, eps=0.03),
    "float64-felt-eps": Case(20, 3, 70, F64, eps=0.03),
    "float32-slabs": Case(200, 5, 20, slab=1),
    "float64-slabs": Case(130, 5, 70, F64, slab=1),
    "one-code": Case(5, 4, 1),
    "one-feature": Case(66, 1, 3),
    "one-of-each": Case(1, 1, 1, F64),
    "cold": Case(20, 4, 10, temperature=1e-3),
    "hot": Case(20, 4, 10, temperature=1e3),
    "wide": Case(3, 300, 5, temperature=100.0),
    "wider": Case(3, 1000, 5, temperature=1000.0),
    "only-distance": Case(7, 3, 5, F64, grads=("distance",)),
    "only-length": Case(7, 3, 5, F64, grads=("length",)),
    "only-entropy": Case(7, 3, 5, F64, grads=("entropy",)),
}
SPECIAL = ("duplicates", "near", "large", "overflow", "enormous", "enormous-hot", "nan", "empty")

# Against float64, |found - expected| / (1 + |expected|) of scalars and |found - expected| of probs,
# these where the temperature is that of typical distances, and where it is lower: p has the error
# of d2 / T. Measured over the cases: 3.2e-7, 1.3e-7 and 3.1e-7 in float32, 7e-16 in float64.
SCALARS = {F32: 2e-6, F64: 1e-14}
PROBS = {F32: (2e-7, 4e-7), F64: (1e-14, 1e-14)}
# Against float64, |found - expected| / (largest |expected|). Measured: 1.1e-6 in float32, 9e-16 in
# float64; otherwise the rounding of the result.
GRADIENTS = {F32: 4e-6, F64: 1e-14, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def made(name: str) -> tuple[Tensor, Tensor, Case]:
    """Rows and centers of a case."""
    case = CASES.get(name, Case(9, 3, 70, temperature=1e38 if name == "enormous-hot" else 1.0))
    generator = torch.Generator().manual_seed(len(name))
    x, centers = (
        torch.randn(size, case.d, dtype=F64, generator=generator) for size in (case.n, case.k)
    )
    if name == "duplicates":
        centers[66] = centers[2] = centers[40]
        x[:] = centers[40] + x / 10
    elif name == "near":
        centers *= 30
        x = centers[:9] + x * 1e-4
    elif name == "large":
        x *= 1e15
    elif name == "overflow":
        x *= 1e30
    elif name.startswith("enormous"):
        centers[7] = 1e30
    elif name == "nan":
        x[4, 1] = torch.nan
    elif name == "empty":
        x = x[:0]
    return x.to(case.dtype), centers.to(case.dtype), case


def upstream(n: int, case: Case) -> dict[str, Tensor | None]:
    """Gradients of what forward returns, in float64."""
    generator = torch.Generator().manual_seed(1)
    drawn = {name: torch.randn(n, dtype=F64, generator=generator) for name in GRADS}
    return {name: grad if name in case.grads else None for name, grad in drawn.items()}


class Found(NamedTuple):
    best_index: Tensor
    distance: Tensor
    length: Tensor
    entropy: Tensor
    log_normaliser: Tensor
    probs: Tensor
    grad_x: Tensor
    grad_centers: Tensor


def directly(name: str) -> Found:
    """The definition in float64, with its N x K tensors."""
    x, centers, case = made(name)
    x, centers = (t.double().requires_grad_() for t in (x, centers))
    d2 = (x[:, None] - centers).square().sum(2)
    is_least = d2 == d2.amin(1, keepdim=True)
    best = torch.where(is_least, torch.arange(case.k), case.k).amin(1)
    best = best.where(best < case.k, 0)
    scores = -d2 / case.temperature
    p = scores.softmax(1)
    distance = d2.gather(1, best[:, None])[:, 0]
    length = -(p.gather(1, best[:, None])[:, 0] + case.eps).log()
    entropy = -(p * (p + case.eps).log()).sum(1)
    results = {"distance": distance, "length": length, "entropy": entropy}
    loss = sum(
        (results[key] * grad).sum()
        for key, grad in upstream(len(x), case).items()
        if grad is not None
    )
    grads = torch.autograd.grad(loss, (x, centers))
    scalars = (t.detach() for t in (distance, length, entropy, scores.logsumexp(1), p))
    return Found(best, *scalars, *grads)


def run(triton: Any, name: str, device: torch.device) -> Found:
    x, centers, case = made(name)
    x, centers = x.to(device), centers.to(device)
    forward = triton.forward(x, centers, case.temperature, case.eps)
    log_normaliser = forward[-1]
    p = triton.probs(x, centers, case.temperature, log_normaliser)
    number = F64 if case.dtype == F64 else F32
    grads = (g if g is None else g.to(number).to(device) for g in upstream(len(x), case).values())
    usual = triton.SLAB
    try:
        triton.SLAB = case.slab or usual
        found = triton.backward(*grads, x, centers, case.temperature, case.eps, forward)
    finally:
        triton.SLAB = usual
    assert all(g.dtype == case.dtype for g in found)
    return Found(*(t.cpu() for t in (*forward, p, *found)))


def assert_within(found: Tensor, expected: Tensor, tolerance: float, name: str) -> None:
    error = (found.double() - expected).abs() / (1 + expected.abs())
    assert error.max() <= tolerance, f"{name} is off by {error.max()}"


def assert_agrees(found: Found, name: str) -> None:
    expected, dtype = directly(name), made(name)[2].dtype
    number = F64 if dtype == F64 else F32
    assert found.best_index.dtype == torch.int64
    assert all(t.dtype == number for t in found[1:6])
    assert torch.equal(found.best_index, expected.best_index)
    for key in ("distance", "length", "entropy", "log_normaliser"):
        assert_within(getattr(found, key), getattr(expected, key), SCALARS[number], key)
    case = made(name)[2]
    allowed = PROBS[number][case.temperature < case.d]
    assert (found.probs - expected.probs).abs().max() <= allowed
    for key in ("grad_x", "grad_centers"):
        right = getattr(expected, key)
        error = (getattr(found, key).double() - right).abs().max()
        assert error <= GRADIENTS[dtype] * right.abs().max(), f"{key} is off by {error}"


def assert_special(found: Found, name: str) -> None:
    """What `assert_agrees` does not see of inputs that are made to be hard."""
    if name == "duplicates":
        assert_agrees(found, name)
        assert (found.best_index == 2).all()
        assert torch.equal(found.probs[:, 2], found.probs[:, 66])
    elif name == "near":
        expected = directly(name)
        torch.testing.assert_close(found.distance.double(), expected.distance, rtol=1e-4, atol=0)
        assert_within(found.entropy, expected.entropy, 1e-6, "entropy")
        # Weighed by 2 (x - c): here the sum over codes has nothing but what is left of x - c.
        torch.testing.assert_close(found.grad_x.double(), expected.grad_x, rtol=1e-4, atol=1e-9)
    elif name == "large":
        expected = directly(name)
        torch.testing.assert_close(found.distance.double(), expected.distance, rtol=1e-5, atol=0)
        assert not any(t.isnan().any() for t in found)
        assert (found.entropy <= 5).all()
        torch.testing.assert_close(found.probs.sum(1), torch.ones(9))
    elif name == "overflow":
        assert not any(t.isnan().any() for t in found)
        assert (found.best_index == 0).all()
        assert (found.distance == torch.inf).all()
        assert (found.log_normaliser == -torch.inf).all()
        torch.testing.assert_close(found.entropy, torch.full((9,), 70.0).log())
        torch.testing.assert_close(found.length, torch.full((9,), 70.0).log())
    elif name == "enormous":
        assert_agrees(found, name)
    elif name == "enormous-hot":
        others = torch.arange(70) != 7
        assert (found.probs[:, 7] == 0).all()
        torch.testing.assert_close(found.probs[:, others], torch.full((9, 69), 1 / 69))
        torch.testing.assert_close(found.length, torch.full((9,), 69.0).log())
    elif name == "nan":
        fine = torch.arange(9) != 4
        for t in (*found[1:6], found.grad_x):
            assert t[4].isnan().all()
            assert t[fine].isfinite().all()
        assert torch.equal(found.best_index, directly(name).best_index)
    else:
        assert [t.shape for t in found] == [(0,)] * 5 + [(0, 70), (0, 3), (70, 3)]
        assert (found.grad_centers == 0).all()


# Triton without a GPU.


def interpret() -> dict[str, Any]:
    from foreshock.ops.soft_assign import triton

    assert triton.why_unavailable("cpu") is None

    def attempt(name: str) -> tuple[Tensor, ...] | str:
        try:
            return tuple(run(triton, name, CPU))
        except Exception:
            return traceback.format_exc()

    return {name: attempt(name) for name in (*CASES, *SPECIAL)}


POINTERS = {"float64": "*fp64", "float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}
ELEMENTS = ("x_ptr", "centers_ptr", "grad_x_ptr")
KERNELS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "rows-near": ({"FEELS_EPS": False}, ["float32", "bfloat16"]),
    "rows-felt": ({"FEELS_EPS": True}, ["float64", "float16"]),
    "probs": ({}, ["float64", "float32"]),
    "weights": ({}, ["float64", "float32"]),
    "grad_x": ({"COLUMNS": 64}, ["float64", "float32", "bfloat16"]),
    "grad_x-narrow": ({"COLUMNS": 8}, ["float32", "float16"]),
    "grad_centers": ({"COLUMNS": 64}, ["float64", "float32", "bfloat16"]),
    "grad_centers-narrow": ({"COLUMNS": 8}, ["float32", "float16"]),
}
SOURCES = [(name, dtype) for name, (_, dtypes) in KERNELS.items() for dtype in dtypes]
COMPILED = [
    f"sm{capability}-{kernel}-{dtype}" for capability in CAPABILITIES for kernel, dtype in SOURCES
]


def compile_kernels() -> dict[str, Any]:
    """Of every kernel, dtype and architecture: machine code, shared memory and PTX."""
    from triton.compiler import ASTSource

    from foreshock.ops.soft_assign import triton as ours

    def source(name: str, dtype: str) -> Any:
        kernel = getattr(ours, f"_soft_assign_{name.partition('-')[0]}_kernel")
        number = F64 if dtype == "float64" else F32
        constants = {"F": ours.FORMATS[number]} | KERNELS[name][0]
        signature = {
            arg: POINTERS[dtype if arg in ELEMENTS else str(number).removeprefix("torch.")]
            if arg.endswith("_ptr")
            else "i32"
            for arg in kernel.arg_names
        }
        signature |= {"best_ptr": "*i64"} if "best_ptr" in signature else {}
        return ASTSource(kernel, signature | dict.fromkeys(constants, "constexpr"), constants)

    def compiled(is_gradient: bool, options: dict[str, Any]) -> dict[str, Any]:
        names = [pair for pair in SOURCES if pair[0].startswith("grad_") == is_gradient]
        return compile_all({f"{n}-{dtype}": source(n, dtype) for n, dtype in names}, options)

    return compiled(False, ours.OPTIONS) | compiled(True, ours.GRADIENT_OPTIONS)


@pytest.fixture(scope="module")
def triton_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Any]]:
    """Results of `interpret` and `compile_kernels`, each run in a process of its own."""
    yield from results_of(__name__, tmp_path_factory.mktemp("triton"))


@pytest.mark.parametrize("name", CASES)
def test_triton_agrees_with_the_definition(triton_process: Callable[[str], Any], name: str) -> None:
    assert_agrees(Found(*interpreted(triton_process("interpret")[name])), name)


@pytest.mark.parametrize("name", SPECIAL)
def test_triton_stands_hard_inputs(triton_process: Callable[[str], Any], name: str) -> None:
    assert_special(Found(*interpreted(triton_process("interpret")[name])), name)


@pytest.mark.parametrize("name", COMPILED)
def test_triton_compiles_ahead_of_time(triton_process: Callable[[str], Any], name: str) -> None:
    kernel = triton_process("compile_kernels")[name]
    assert kernel["cubin"] == b"\x7fELF"
    assert kernel["shared_bytes"] <= 48 << 10  # what every device grants without being asked
    # Where the logarithm of a double begins; PTX has no other form of it.
    ptx = kernel["ptx"].replace("rcp.approx.ftz.f64", "")
    assert ".ftz" not in ptx, "denormals would be flushed"
    assert "tf32" not in ptx


# On a device.


@pytest.fixture
def triton() -> Any:
    found = pytest.importorskip("foreshock.ops.soft_assign.triton")
    reason = found.why_unavailable("cuda")
    if reason is not None:
        pytest.skip(reason)
    return found


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_agrees_on_the_device(triton: Any, name: str) -> None:
    assert_agrees(run(triton, name, GPU), name)


@pytest.mark.gpu
@pytest.mark.parametrize("name", SPECIAL)
def test_the_device_stands_hard_inputs(triton: Any, name: str) -> None:
    assert_special(run(triton, name, GPU), name)


@pytest.mark.gpu
def test_the_device_finds_the_same_bits_twice(triton: Any) -> None:
    once, again = (run(triton, "float32-slabs", GPU) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.gpu
def test_neither_direction_waits_or_holds_all_pairs(triton: Any) -> None:
    x, centers = torch.randn(1 << 16, 8, device=GPU), torch.randn(1024, 8, device=GPU)
    grad = torch.randn(1 << 16, device=GPU)

    def both() -> None:
        saved = triton.forward(x, centers, 1.0, 1e-12)
        triton.backward(grad, grad, grad, x, centers, 1.0, 1e-12, saved)

    both()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        both()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    used = torch.cuda.max_memory_allocated() - before
    assert used < len(x) * len(centers) * x.element_size() // 2


if __name__ == "__main__":
    main({"interpret": interpret, "compile_kernels": compile_kernels})
