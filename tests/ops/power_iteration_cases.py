"""What the tests of power_iteration share: implementations, spectra, and how far off is far."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from foreshock.ops import SpectralStats
from foreshock.ops._backend import Choice, supported_isas
from foreshock.ops.power_iteration import cpu, reference
from foreshock.ops.power_iteration.matrices import layout_of

Bind = Callable[[list[Tensor], Tensor, Tensor], Callable[[], object]]

IMPLEMENTATIONS: dict[str, Bind] = {
    "reference": reference.bind,
    **{f"cpu-{isa}": functools.partial(cpu.bind, isa=isa) for isa in supported_isas()},
}
COMPILED = [name for name in IMPLEMENTATIONS if name != "reference"]
DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

# One pass against the reference, which adds in float64. Measured over three seeds of the shapes in
# test_power_iteration.py and every instruction set: 5e-15, 1.2e-6, 3.8e-6 and 1.9e-6.
RTOL = {torch.float64: 1e-13, torch.float32: 5e-6, torch.bfloat16: 1e-5, torch.float16: 1e-5}
# How far rounding may lift an estimate above the singular value: measured 1e-7.
ABOVE = 1e-6


def use(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choice = Choice(name, SimpleNamespace(bind=IMPLEMENTATIONS[name]), {})  # type: ignore[arg-type]
    for module in ("foreshock.ops.power_iteration", "foreshock.ops.power_iteration.register"):
        monkeypatch.setattr(importlib.import_module(module), "choose", lambda *_: choice)


def svd_norm(weight: Tensor) -> float:
    """The largest singular value, in float64."""
    if weight.numel() == 0:
        return 0.0
    W = weight.detach().double().reshape(weight.shape[0], -1)
    if min(W.shape) <= 64:
        return torch.linalg.matrix_norm(W, 2).item()
    gram = W @ W.T if W.shape[0] < W.shape[1] else W.T @ W
    return math.sqrt(torch.linalg.eigvalsh(gram)[-1].item())


def error_of(stats: SpectralStats, weights: list[Tensor]) -> list[float]:
    """By how much, relatively, each estimate lies below the singular value."""
    found = stats.sigma_max.tolist()
    return [1 - s / svd_norm(w) for s, w in zip(found, weights, strict=True)]


def with_spectrum(m: int, n: int, values: Tensor) -> Tensor:
    left, _ = torch.linalg.qr(torch.randn(m, len(values), dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(n, len(values), dtype=torch.float64))
    return (left * values) @ right.T


def random_vectors(weights: list[Tensor]) -> Tensor:
    """For each matrix a unit v, and a `previous` of a length that occurs."""
    pairs = [torch.empty(2, 0, dtype=torch.float64)]
    for weight in weights:
        v, other = torch.randn(2, layout_of(weight).columns, dtype=torch.float64)
        v /= v.norm()
        pairs.append(torch.stack([v, v + 0.2 * other / other.norm()]))
    return torch.cat(pairs, dim=1)


class Pass(NamedTuple):
    """What a pass made: rows of `SpectralStats.packed`, and both vectors of all matrices."""

    rows: Tensor
    vectors: Tensor


def run_pass(bind: Bind, weights: list[Tensor], vectors: Tensor) -> Pass:
    """A pass over a copy of the vectors."""
    moved = vectors.clone()
    packed = vectors.new_full((len(weights), 5), torch.nan)
    bind(weights, moved, packed)()
    return Pass(packed, moved)


def one_pass(name: str, weights: list[Tensor], vectors: Tensor) -> tuple[Tensor, list[Tensor]]:
    rows, moved = run_pass(IMPLEMENTATIONS[name], weights, vectors)
    return rows, list(moved.split([layout_of(w).columns for w in weights], dim=1))


def assert_same_pass(name: str, weights: list[Tensor]) -> None:
    """A pass of an implementation against the reference's, for every matrix of a list."""
    vectors = random_vectors(weights)
    assert_agrees(run_pass(IMPLEMENTATIONS[name], weights, vectors), weights, vectors)


def assert_agrees(found: Pass, weights: list[Tensor], vectors: Tensor) -> None:
    """A pass over weights on the host, wherever it was made, against the reference's."""
    expected = run_pass(reference.bind, weights, vectors)
    columns = [layout_of(w).columns for w in weights]
    pairs, right_pairs = (p.vectors.cpu().split(columns, dim=1) for p in (found, expected))
    for m, weight in enumerate(weights):
        case = (m, tuple(weight.shape), weight.stride(), weight.dtype)
        row, right_row = found.rows[m].cpu(), expected.rows[m]
        sigma, frobenius, _, _, growth = right_row.tolist()
        # Where W v cancels by chance, its rounding is measured against what was added up.
        cancels = frobenius * growth / sigma / max(1, columns[m]) ** 0.5 if sigma > 0 else 1.0
        rtol = RTOL[weight.dtype] * max(1.0, cancels)
        close = torch.isclose(row, right_row, rtol=rtol, atol=0, equal_nan=True)
        assert close.all(), (case, row, right_row)
        for mine, right in zip(pairs[m], right_pairs[m], strict=True):
            assert (mine - right).norm() <= rtol * max(1.0, right.norm().item()), case


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "offset": lambda x: x.flatten()[1:-26].view(-1, 27),
    "transposed": lambda x: x[0].t(),
    "transposed block": lambda x: x[0].t()[3:9, 2:11],
    "wide rows": lambda x: x[3][:, :20],
    "every second row": lambda x: x[3][::2],
    "every third column": lambda x: x[3][:, ::3],
    "both": lambda x: x[3][::2, 1::3],
    "one column": lambda x: x[3][:, 4:5],
    "one row": lambda x: x[3][4:5],
    "expanded rows": lambda x: x[3][:1].expand(6, -1),
    "expanded columns": lambda x: x[3][:, :1].expand(-1, 6),
    "one number": lambda x: x[0, 0, 0].expand(5, 7),
    "overlapping windows": lambda x: x.flatten().unfold(0, 5, 2),
    "convolution": lambda x: x,
    "channels last": lambda x: x.unsqueeze(-1).to(memory_format=torch.channels_last),
    "input channels first": lambda x: x.transpose(0, 1),
    "last first": lambda x: x.permute(2, 0, 1),
    "inner block": lambda x: x[2:9, 3:11, 5:23],
    "seven dims": lambda x: x.reshape(11, 13, 1, 3, 1, 3, 3)[::2, 1:, :, ::2, :, 1:, ::2],
    "one by one": lambda x: x[:, :1, :1, None],
    "empty": lambda x: x[3][:, 3:3],
    "no rows": lambda x: x[3][3:3],
}


# Lists of matrices for implementations that run in another process or on another device; the same
# each time, wherever they are built.


def odd_sizes(dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    shapes = [(m, n) for m in (1, 7, 33) for n in (1, 8, 63, 130, 520)]
    return [torch.randn(shape).to(device, dtype) for shape in [*shapes, (300, 40), (70, 2500)]]


def views(dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    x = torch.randn(11, 13, 27).to(device, dtype)
    return [view(x) for view in VIEWS.values()]


def long_rows(dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Longer than the threads of a block hold, and longer than twice that."""
    hold = 4096 if dtype is torch.float64 else 8192
    x = torch.randn(2, 2 * hold + 100).to(device, dtype)
    return [x[:, 1 : hold + 2], x]


def unwell(dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Zeros, what is not finite, and scales at which squares overflow or vanish."""
    info = torch.finfo(dtype)
    x = torch.rand(40, 70, dtype=torch.float64) - 0.4
    sizes = [1.0, 0.0, info.max, info.smallest_normal * 4, info.smallest_normal * info.eps * 9]
    weights = [(x * size).to(dtype) for size in sizes]
    for bad, place in ((torch.nan, (0, 0)), (torch.inf, (39, 69)), (-torch.inf, (17, 64))):
        weights.append(weights[0].clone())
        weights[-1][place] = bad
    return [weight.to(device) for weight in weights]


BUILDERS = (odd_sizes, views, long_rows, unwell)
CASES = {f"{build.__name__}-{name}": (build, DTYPES[name]) for build in BUILDERS for name in DTYPES}


def case(name: str, device: torch.device) -> tuple[list[Tensor], Tensor]:
    """Weights, and the vectors of a pass over them."""
    torch.manual_seed(0)
    if name == "mixed":
        lists = [build(dtype, device)[::3] for build in BUILDERS[::-1] for dtype in DTYPES.values()]
        weights = [weight for turn in zip(*lists, strict=False) for weight in turn]
    elif name == "blind":
        weights = [torch.zeros(6, 40, device=device), torch.eye(5, device=device)]
        weights[0][0, 3] = 2
    else:
        build, dtype = CASES[name]
        weights = build(dtype, device)
    vectors = random_vectors(weights)
    if name == "blind":
        vectors[0, :40] = torch.eye(40)[7]
    return weights, vectors.to(device)


ALL_CASES = [*CASES, "mixed", "blind"]
