"""soft_assign against everything a user would run instead; see docs/soft_assign.md."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks import rows
from benchmarks.ceiling import multiply_and_exponentiate_probe
from benchmarks.interleave import Timing, time_in_turn
from foreshock.ops import soft_assign
from foreshock.ops._backend import supported_isas
from foreshock.ops.soft_assign import reference

EPS = 1e-12
CHECKED = 256  # rows whose answers are looked at


class Case(NamedTuple):
    """Gaussian rows and centers, and what is asked of them."""

    n: int
    d: int
    k: int
    dtype: torch.dtype = torch.float32
    is_faultless: bool = False  # memory is kept by the process, not given back and faulted in again

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        memory = ", no page faults" if self.is_faultless else ""
        return f"N {self.n}, D {self.d}, K {self.k}, {dtype}{memory}"


CASES = [
    *[Case(65536, d, k) for d in (8, 64, 768) for k in (16, 256, 1024)],
    Case(65536, 64, 1024, torch.bfloat16),
    Case(2048, 768, 512),
    # Last: malloc cannot be told to go back to what it had learnt.
    *[Case(65536, d, 1024, is_faultless=True) for d in (8, 64, 768)],
    Case(2048, 768, 512, is_faultless=True),
]
GPU_CASES = [Case(65536, d, k) for d, k in ((8, 256), (8, 1024), (64, 1024), (768, 1024))]

Assign = Callable[[Tensor, Tensor, float], Tensor]  # surprise (N,) of x, centers, temperature


def ours(x: Tensor, centers: Tensor, temperature: float) -> Tensor:
    return soft_assign(x, centers, temperature=temperature).surprise


def surprise_of(d2: Tensor, temperature: float) -> Tensor:
    p = (-d2 / temperature).softmax(1)
    length = -(p.gather(1, d2.argmin(1, keepdim=True))[:, 0] + EPS).log()
    return length - (p * (p + EPS).log()).sum(1)


def expansion(x: Tensor, centers: Tensor, temperature: float) -> Tensor:
    x, centers = x.float(), centers.float()
    sums = (x * x).sum(1, keepdim=True) + (centers * centers).sum(1)
    return surprise_of((sums - 2 * x @ centers.t()).clamp_min(0), temperature)


def by_cdist(x: Tensor, centers: Tensor, temperature: float) -> Tensor:
    return surprise_of(torch.cdist(x.float(), centers.float()).square(), temperature)


def compiled_of(forms: dict[str, Assign], x: Tensor, centers: Tensor) -> dict[str, Assign]:
    """torch.compile of the form that is the faster one with it."""
    torch._dynamo.reset()  # or the shapes of all tests are counted, and some are too many
    compiled = {name: torch.compile(form, dynamic=False) for name, form in forms.items()}
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(4):
        for name, form in compiled.items():
            begun = time.perf_counter()
            with torch.no_grad():
                form(x, centers, float(x.shape[1])).sum().item()
            seconds[name].append(time.perf_counter() - begun)
    better = min(seconds, key=lambda name: min(seconds[name]))
    return {f"torch.compile, {better}": compiled[better]}


def nervecode(case: Case) -> dict[str, Assign]:
    if importlib.util.find_spec("nervecode") is None:
        return {}
    from nervecode.core.assignment import SoftAssignment

    module: Any = SoftAssignment(temperature=float(case.d), eps=EPS)
    name = f"nervecode {importlib.metadata.version('nervecode')}"
    return {name: lambda x, c, _: module(x.float(), c.float())[0].combined_surprise}


def nearest_by_faiss(x: Tensor, centers: Tensor) -> dict[str, Callable[[], object]]:
    """Only the index and the distance, which is a third of what is found by the others."""
    if importlib.util.find_spec("faiss") is None or x.dtype != torch.float32:
        return {}
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatL2(x.shape[1])
    index.add(centers.numpy())
    array = x.numpy()
    found = torch.from_numpy(index.search(array, 1)[1][:, 0])
    assert (found == soft_assign(x, centers).best_index).double().mean() > 0.999
    return {"faiss, nearest only": lambda: index.search(array, 1)}


def error_of(assign: Assign, x: Tensor, centers: Tensor, temperature: float) -> float:
    """The answer first: against the reference, which is in float64."""
    right = reference.forward(x[:CHECKED], centers.float(), temperature, EPS)
    with torch.no_grad():
        found = assign(x, centers, temperature)[:CHECKED]
    error = (found.double() - right[2].double() - right[3].double()).abs().max().item()
    assert error < (1e-5 if assign is ours else 1e-2)
    return error


def forward(assign: Assign, x: Tensor, centers: Tensor, temperature: float) -> Callable[[], object]:
    def call() -> None:
        with torch.no_grad():
            assign(x, centers, temperature)

    return call


def both(assign: Assign, x: Tensor, centers: Tensor, temperature: float) -> Callable[[], object]:
    leaves = x.detach().clone().requires_grad_(), centers.detach().clone().requires_grad_()
    return lambda: torch.autograd.grad(assign(*leaves, temperature).sum(), leaves)


@contextlib.contextmanager
def malloc_for(case: Case) -> Iterator[None]:
    """glibc keeps what was freed, for the next call, where no page faults are wanted."""
    if not case.is_faultless:
        yield
        return
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
    libc = ctypes.CDLL(None)
    assert libc.mallopt(M_MMAP_MAX, 0)
    assert libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        # What it comes to by itself once large pieces have been freed.
        libc.mallopt(M_MMAP_MAX, 1 << 16)
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 25)
        libc.mallopt(M_TRIM_THRESHOLD, 1 << 26)
        libc.malloc_trim(0)


def as_rows(
    timings: dict[str, Timing], base: str, case: Case, errors: dict[str, float]
) -> dict[str, dict[str, Any]]:
    def ratio(timing: Timing) -> float:
        if len(timing.each_ms) < len(timings[base].each_ms):  # of the first rounds only
            return timing.median_ms / timings[base].median_ms
        return timing.over(timings[base])

    numbers = {**case._asdict(), "dtype": str(case.dtype).removeprefix("torch.")}
    return {
        name: {
            **timing.row(),
            **numbers,
            "times_ours": ratio(timing),
            "worst_error": errors.get(name),
        }
        for name, timing in timings.items()
    }


def compare(benchmark: Any, case: Case, direction: str, device: str, name: str) -> None:
    """Everything in one direction: the forward pass, or that and the gradients of both."""
    torch.manual_seed(0)
    x = torch.randn(case.n, case.d, device=device).to(case.dtype)
    centers = torch.randn(case.k, case.d, device=device).to(case.dtype)
    temperature = float(case.d)
    eager: dict[str, Assign] = {"torch, expansion": expansion, "torch.cdist": by_cdist}
    forms = {name: ours, **eager, **compiled_of(eager, x, centers), **nervecode(case)}
    is_forward = direction == "forward"
    bind = forward if is_forward else both
    errors = {form: error_of(assign, x, centers, temperature) for form, assign in forms.items()}
    variants = {form: bind(assign, x, centers, temperature) for form, assign in forms.items()}
    if device == "cpu":
        variants["FMA + exp probe (ceiling)"] = multiply_and_exponentiate_probe(
            case.n, case.d, case.k, *((1, 1) if is_forward else (4, 2))
        )
        if is_forward:
            variants |= nearest_by_faiss(x, centers)
    is_large = case.n * case.k >= 1 << 24
    slow = {form: 5 for form in variants if is_large and form != name and "FMA" not in form}
    with malloc_for(case):
        timings = time_in_turn(benchmark, variants, 11 if is_large else 31, device, slow)
    found = as_rows(timings, name, case, errors)
    rows.store("soft_assign", f"{direction}, {case}", device, found)


DIRECTIONS = ["forward", "forward + backward"]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_on_the_cpu(benchmark: Any, case: Case, direction: str) -> None:
    compare(benchmark, case, direction, "cpu", f"foreshock {supported_isas()[-1]}")


@pytest.mark.gpu
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_on_the_gpu(benchmark: Any, case: Case, direction: str) -> None:
    compare(benchmark, case, direction, "cuda", "foreshock triton")
