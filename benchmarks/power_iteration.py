"""power_iteration against everything a user would run instead; see docs/power_iteration.md."""

from __future__ import annotations

import importlib.util
import itertools
import math
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import rows
from benchmarks.ceiling import copy_probe, read_probe
from benchmarks.health_scan import gpt2_shapes
from benchmarks.interleave import Timing, microseconds_of_call, time_in_turn
from foreshock.drill.gpt import Recipe, build, next_token_loss
from foreshock.ops import PowerIterator, power_iteration
from foreshock.ops._backend import supported_isas
from foreshock.ops.power_iteration import cpu, reference
from foreshock.ops.power_iteration.matrices import layout_of
from foreshock.ops.power_iteration.state import PowerState
from foreshock.signals import SpectralWatch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SHAPES = {"1024^2": (1024, 1024), "4096^2": (4096, 4096), "11008 x 4096": (11008, 4096)}

LLAMA_8B_LAYER = [
    *[(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096)],
    *[(14336, 4096), (14336, 4096), (4096, 14336)],
]
# Of single matrices so many that no cache holds them, in a call each.
ALONE = {
    "16 times one 4096 x 4096": [(4096, 4096)] * 16,
    "6 times one 11008 x 4096": [(11008, 4096)] * 6,
    "6 times one 4096 x 11008": [(4096, 11008)] * 6,
}
TOGETHER = {
    "GPT-2 124M": [shape for shape in gpt2_shapes() if len(shape) > 1],
    "8 layers of Llama 8B": LLAMA_8B_LAYER * 8,
}
GPU_CASES: dict[str, list[tuple[int, ...]]] = {**ALONE, **TOGETHER}

Pair = tuple[Tensor, Tensor]


def fresh_vectors(weights: list[Tensor]) -> Tensor:
    layouts = [layout_of(w) for w in weights]
    return PowerState.cold(layouts, range(len(weights)), 0, weights[0].device).vectors


def passes(weights: list[Tensor], isa: str) -> tuple[Callable[[], object], float]:
    """A bound pass, and by how much the worst sigma_max of its first differs from the reference."""
    packed, right = torch.empty(2, len(weights), 5, dtype=torch.float64)
    vectors = fresh_vectors(weights)
    run = cpu.bind(weights, vectors, packed, isa=isa)
    run()
    reference.bind(weights, fresh_vectors(weights), right)()
    error = (packed[:, :2] / right[:, :2] - 1).abs().max().item()
    assert error < 1e-6
    return run, error


# Both GEMVs, in every way that torch can be asked for them; the best is what there is to beat.
EAGER: dict[str, Callable[[Tensor, Tensor], Pair]] = {
    "torch mv, mv of W.T": lambda W, v: (u := torch.mv(W, v), torch.mv(W.t(), u)),
    "torch matmul with columns": lambda W, v: (u := W @ v[:, None], W.t() @ u),
    "torch v W.T, u W": lambda W, v: (u := v[None] @ W.t(), u @ W),
}


def eager_step(W: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Everything that a pass of ours finds, for torch.compile to fuse."""
    u = torch.mv(W, v)
    y = torch.mv(W.t(), u)
    return y.norm() / u.norm(), W.float().norm(), y / y.norm()


def error_of_eager(form: Callable[[Tensor, Tensor], Pair], W: Tensor, v: Tensor) -> float:
    u, y = form(W, v.to(W.dtype))
    exact = W.double() @ v
    right = (W.double().T @ exact).norm() / exact.norm()
    found = y.double().norm() / u.double().norm()
    error = abs(found / right - 1).item()
    assert error < 0.05
    return error


def as_rows(
    timings: dict[str, Timing], ours: str, num_bytes: int, errors: dict[str, float]
) -> dict[str, dict[str, Any]]:
    def ratio(timing: Timing) -> float:
        base = timings[ours]
        if len(timing.each_ms) < len(base.each_ms):  # a slow one, of the first rounds only
            return timing.median_ms / base.median_ms
        return timing.over(base)

    return {
        name: {
            **timing.row(),
            "gb_per_s": num_bytes / timing.median_ms / 1e6,
            "times_ours": ratio(timing),
            "relative_error": errors.get(name),
        }
        for name, timing in timings.items()
    }


def compare(benchmark: Any, weights: list[Tensor], case: str, rounds: int) -> None:
    """One pass over these weights, ours and eager, beside a read of their memory."""
    ours = f"foreshock {supported_isas()[-1]}"
    variants: dict[str, Callable[[], object]] = {"read probe (ceiling)": read_probe(weights)}
    errors: dict[str, float] = {}
    for isa in supported_isas():
        variants[f"foreshock {isa}"], errors[f"foreshock {isa}"] = passes(weights, isa)
    vs = [torch.nn.functional.normalize(torch.randn(w.shape[1]).double(), dim=0) for w in weights]
    pairs = [(w, v.to(w.dtype)) for w, v in zip(weights, vs, strict=True)]
    for name, form in EAGER.items():
        errors[name] = max(error_of_eager(form, w, v) for w, v in zip(weights, vs, strict=True))
        variants[name] = lambda form=form: [form(w, v) for w, v in pairs]  # type: ignore[misc]
    compiled = torch.compile(eager_step, dynamic=False)
    if len(weights) == 1:
        variants["torch.compile, the whole step"] = lambda: [compiled(w, v) for w, v in pairs]
    timings = time_in_turn(benchmark, variants, rounds=rounds)
    num_bytes = sum(w.nbytes for w in weights)
    rows.store("power_iteration", case, "cpu", as_rows(timings, ours, num_bytes, errors))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_pass_over_one_matrix(benchmark: Any, shape: str, dtype: str) -> None:
    weight = torch.randn(SHAPES[shape]).to(DTYPES[dtype])
    compare(benchmark, [weight], f"one pass, {shape} {dtype}", 41)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_pass_over_gpt2_124m(benchmark: Any, dtype: str) -> None:
    """The cost of a step where every matrix is looked at each step."""
    shapes = [shape for shape in gpt2_shapes() if len(shape) > 1]
    weights = [(0.02 * torch.randn(shape)).to(DTYPES[dtype]) for shape in shapes]
    compare(benchmark, weights, f"one pass, GPT-2 124M {dtype}, {len(weights)} matrices", 21)


def lowrank(W: Tensor) -> Tensor:
    return torch.svd_lowrank(W, q=6, niter=2)[1][0]


@pytest.mark.parametrize("shape", [(4096, 1024), (4096, 4096)], ids=lambda shape: f"{shape}")
def test_a_cold_start(benchmark: Any, shape: tuple[int, int]) -> None:
    """From nothing to sigma_max, with what is lost of it; an exact SVD is the truth."""
    W = torch.randn(shape)
    truth = torch.linalg.eigvalsh(W.double().T @ W.double())[-1].sqrt().item()
    variants: dict[str, Callable[[], object]] = {
        "foreshock, 14 passes": lambda: power_iteration(W)[0].sigma_max[0],
        "torch matrix_norm(W, 2)": lambda: torch.linalg.matrix_norm(W, 2),
        "torch svd_lowrank(q=6, niter=2)": lambda: lowrank(W),
    }
    if importlib.util.find_spec("scipy") is not None:
        from scipy.sparse.linalg import svds

        array = W.numpy()
        variants["scipy svds(k=1)"] = lambda: svds(array, k=1, return_singular_vectors=False)[0]
    errors = {name: 1 - float(call()) / truth for name, call in variants.items()}  # type: ignore[arg-type]
    assert errors["foreshock, 14 passes"] < 0.02
    slow = {"torch matrix_norm(W, 2)": 2, "scipy svds(k=1)": 5}
    timings = time_in_turn(benchmark, variants, rounds=15, slow=slow)
    case = f"cold start, {shape[0]} x {shape[1]} float32, Gaussian"
    found = as_rows(timings, "foreshock, 14 passes", W.nbytes, errors)
    rows.store("power_iteration_cold", case, "cpu", found)


def test_cold_starts_of_many_gaussian_matrices(benchmark: Any) -> None:
    """How often 14 passes lose more than 1 %; not a time but an accuracy."""
    found = {}
    for m, n, count in [(256, 256, 100), (768, 768, 60), (2304, 768, 40), (2048, 2048, 10)]:
        errors = []
        for seed in range(count):
            W = torch.randn(m, n, generator=torch.Generator().manual_seed(seed))
            truth = torch.linalg.eigvalsh(W.double().T @ W.double())[-1].sqrt().item()
            errors.append(1 - power_iteration([W])[0].sigma_max.item() / truth)
        found[f"{m} x {n}"] = {
            "matrices": count,
            "mean_error": statistics.mean(errors),
            "worst_error": max(errors),
            "over_1_percent": sum(error > 0.01 for error in errors) / count,
        }
    rows.store("power_iteration_gaussian", "cold start, 14 passes", "cpu", found)
    benchmark.pedantic(lambda: None)


def training(learning_rate: float, steps: int) -> Iterator[list[Tensor]]:
    recipe = Recipe(learning_rate=learning_rate)
    run = build(0, recipe)
    weights = [p for p in run.model.parameters() if p.dim() >= 2]
    for _, (x, y) in zip(range(steps), run.batches, strict=False):
        yield weights
        run.optimizer.zero_grad()
        next_token_loss(run.model(x), y).backward()
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), recipe.max_norm)
        run.optimizer.step()
        run.scheduler.step()


def singular_values(weights: list[Tensor]) -> Tensor:
    doubles = [w.detach().double() for w in weights]
    grams = [W @ W.T if W.shape[0] < W.shape[1] else W.T @ W for W in doubles]
    return torch.stack([torch.linalg.eigvalsh(gram)[-1].sqrt() for gram in grams])


# Steps between looks, and passes at each.
LOOKS = [(1, 1), (1, 2), (1, 3), (10, 1), (10, 10), (50, 1), (50, 14)]


@pytest.mark.parametrize("learning_rate", [1e-4, 3e-4, 1e-3, 3e-3])
def test_following_a_training(benchmark: Any, learning_rate: float) -> None:
    """How far warm calls fall behind the drill's GPT; not a time but an accuracy."""
    lost: dict[tuple[int, int], list[Tensor]] = {look: [] for look in LOOKS}
    iterators: dict[tuple[int, int], PowerIterator] = {}
    for step, weights in enumerate(training(learning_rate, 501)):
        is_checked = step % 25 == 0
        truth = singular_values(weights) if is_checked else None
        for interval, passes in LOOKS:
            if step % interval == 0:
                iterator = iterators.setdefault((interval, passes), PowerIterator(weights))
                sigma = iterator(warm_iters=passes).sigma_max
                if truth is not None:
                    lost[interval, passes].append(1 - sigma / truth)
    found = {}
    for (interval, passes), each in lost.items():
        errors = torch.stack(each)
        assert errors.min() > -1e-6
        found[f"every {interval} steps, {passes} passes"] = {
            "worst_error": errors.max().item(),
            "worst_error_after_100": errors[len(errors) // 5 :].max().item(),
            "checks": len(errors),
            "checks_over_1_percent": int((errors > 0.01).any(1).sum()),
            "median_error": errors.median().item(),
        }
    case = f"GPT of the drill, {len(weights)} matrices, 500 steps, learning rate {learning_rate:g}"
    rows.store("power_iteration_tracking", case, "cpu", found)
    benchmark.pedantic(lambda: None)


@pytest.mark.parametrize("interval", [1, 10, 50])
def test_cost_per_step_for_gpt2_124m(benchmark: Any, interval: int) -> None:
    """What the monitor pays: min(interval, 14) passes, and the tracker, every so many steps."""
    shapes = [shape for shape in gpt2_shapes() if len(shape) > 1]
    parameters = {f"w{i}": torch.nn.Parameter(0.02 * torch.randn(s)) for i, s in enumerate(shapes)}
    weights = list(parameters.values())
    watch = SpectralWatch(parameters, torch.optim.SGD(weights, lr=0.0), interval)
    steps = itertools.count(0, interval)
    watch.observe(next(steps), is_stepped=False)
    variants: dict[str, Callable[[], object]] = {
        "a look": lambda: watch.observe(next(steps), is_stepped=False),
        "read probe (ceiling)": read_probe(weights),
    }
    timings = time_in_turn(benchmark, variants, rounds=21)
    look, probe = timings["a look"], timings["read probe (ceiling)"]
    passes = min(interval, 14)
    found = {
        f"a look every {interval} steps": {
            **look.row(),
            "ms_per_step": look.median_ms / interval,
            "passes": passes,
            "times_its_reads": look.over(probe) / passes,
        }
    }
    case = f"GPT-2 124M float32, {len(weights)} matrices, looked at every {interval} steps"
    rows.store("power_iteration_per_step", case, "cpu", found)


def test_overhead_of_a_call(benchmark: Any) -> None:
    """50 matrices of one element: what is not reading."""
    weights = [torch.randn(1, 1) for _ in range(50)]
    checked, trusted = PowerIterator(weights), PowerIterator(weights, recheck=False)
    checked(), trusted()
    state = checked.state.clone()
    calls: dict[str, Callable[[], object]] = {
        "foreshock iterator, trusted table": trusted,
        "foreshock iterator, pointers re-read": checked,
        "foreshock kernel alone": trusted._pass,
        "foreshock power_iteration, bound anew": lambda: power_iteration(weights, state),
        "torch.ops.foreshock.power_iteration": lambda: torch.ops.foreshock.power_iteration(
            weights, state.vectors
        ),
        "torch _foreach_norm": lambda: torch._foreach_norm(weights),
    }
    taken = {name: microseconds_of_call(call, calls=200) for name, call in calls.items()}
    benchmark.pedantic(checked, rounds=100, iterations=10)
    found = {name: {"median_us": us} for name, us in taken.items()}
    rows.store("power_iteration_call", "50 matrices of one element", "cpu", found)


def bound(module: Any, lists: list[list[Tensor]]) -> Callable[[], object]:
    """Passes over lists of weights, a call each; the first pass is compared with the reference."""
    calls = []
    for each in lists:
        packed, right = torch.full((2, len(each), 5), math.nan, dtype=torch.float64, device="cuda")
        calls.append(module.bind(each, fresh_vectors(each), packed))
        calls[-1]()
        reference.bind(each, fresh_vectors(each), right)()
        torch.testing.assert_close(packed, right, rtol=2e-5, atol=0)
    return lambda: [call() for call in calls]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", GPU_CASES)
def test_on_the_gpu(benchmark: Any, case: str, dtype: str) -> None:
    """One pass; bytes are counted once, and a copy's both when read and when written."""
    torch.manual_seed(0)
    from foreshock.ops.power_iteration import cuda, triton

    weights = [torch.randn(shape, device="cuda").to(DTYPES[dtype]) for shape in GPU_CASES[case]]
    lists = [[weight] for weight in weights] if case in ALONE else [weights]
    num_bytes = sum(weight.nbytes for weight in weights)
    pairs = [(w, torch.randn(w.shape[1], device="cuda").to(w.dtype)) for w in weights]
    variants: dict[str, Callable[[], object]] = {
        "device copy (ceiling)": copy_probe(num_bytes // 2, "cuda"),
        "foreshock cuda": bound(cuda, lists),
        "foreshock triton": bound(triton, lists),
    }
    if case in ALONE:
        torch._dynamo.reset()  # or the shapes of all tests are counted, and some are too many
        compiled = torch.compile(eager_step, dynamic=False)
        variants["torch.compile, the whole step"] = lambda: [compiled(w, v) for w, v in pairs]
    for name, form in EAGER.items():
        variants[name] = lambda form=form: [form(w, v) for w, v in pairs]  # type: ignore[misc]
    timings = time_in_turn(benchmark, variants, rounds=31, device="cuda")
    found = as_rows(timings, "foreshock cuda", num_bytes, {})
    rows.store("power_iteration", f"one pass, {case} {dtype}", "cuda", found)
