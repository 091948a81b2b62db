"""power_iteration on a GPU against what a user would run there; see docs/power_iteration.md."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import rows
from benchmarks.ceiling import copy_probe
from benchmarks.health_scan import gpt2_shapes
from benchmarks.interleave import Timing, time_in_turn
from foreshock.ops.power_iteration import cuda, reference, triton
from foreshock.ops.power_iteration.matrices import layout_of
from foreshock.ops.power_iteration.state import PowerState

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
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
CASES: dict[str, list[tuple[int, ...]]] = {**ALONE, **TOGETHER}

Pair = tuple[Tensor, Tensor]

# Both GEMVs, in every way that torch can be asked for them; the best is what there is to beat.
EAGER: dict[str, Callable[[Tensor, Tensor], Pair]] = {
    "cuBLAS: torch mv, mv of W.T": lambda W, v: (u := torch.mv(W, v), torch.mv(W.t(), u)),
    "cuBLAS: torch matmul with columns": lambda W, v: (u := W @ v[:, None], W.t() @ u),
    "cuBLAS: torch v W.T, u W": lambda W, v: (u := v[None] @ W.t(), u @ W),
}


def eager_step(W: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Everything that a pass of ours finds, for torch.compile to fuse."""
    u = torch.mv(W, v)
    y = torch.mv(W.t(), u)
    return y.norm() / u.norm(), W.float().norm(), y / y.norm()


def fresh_vectors(weights: list[Tensor]) -> Tensor:
    layouts = [layout_of(weight) for weight in weights]
    return PowerState.cold(layouts, range(len(weights)), 0, weights[0].device).vectors


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


def as_rows(timings: dict[str, Timing], num_bytes: int) -> dict[str, dict[str, Any]]:
    ours = timings["foreshock cuda"]
    return {
        name: {
            **timing.row(),
            "gb_per_s": num_bytes / timing.median_ms / 1e6,
            "times_ours": timing.over(ours),
        }
        for name, timing in timings.items()
    }


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_on_the_gpu(benchmark: Any, case: str, dtype: str) -> None:
    """One pass; bytes are counted once, and a copy's both when read and when written."""
    torch.manual_seed(0)
    weights = [torch.randn(shape, device="cuda").to(DTYPES[dtype]) for shape in CASES[case]]
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
    found = as_rows(timings, num_bytes)
    rows.store("power_iteration", f"one pass, {case} {dtype}", "cuda", found)
