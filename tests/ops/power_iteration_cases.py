"""What the tests of power_iteration share: implementations, spectra, and how far off is far."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from foreshock.ops import SpectralStats
from foreshock.ops._backend import Choice, supported_isas
from foreshock.ops.power_iteration import cpu, reference
from foreshock.ops.power_iteration.matrices import layout_of

Bind = Callable[[list[Tensor], Tensor, Tensor], Callable[[], object]]

BINDS: dict[str, Bind] = {
    "reference": reference.bind,
    **{f"cpu-{isa}": functools.partial(cpu.bind, isa=isa) for isa in supported_isas()},
}
COMPILED = [name for name in BINDS if name != "reference"]
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
    choice = Choice(name, SimpleNamespace(bind=BINDS[name]), {})  # type: ignore[arg-type]
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
    pairs = []
    for weight in weights:
        v, other = torch.randn(2, layout_of(weight).columns, dtype=torch.float64)
        v /= v.norm()
        pairs.append(torch.stack([v, v + 0.2 * other / other.norm()]))
    return torch.cat(pairs, dim=1)


def one_pass(name: str, weights: list[Tensor], vectors: Tensor) -> tuple[Tensor, list[Tensor]]:
    moved = vectors.clone()
    packed = torch.empty(len(weights), 5, dtype=torch.float64)
    BINDS[name](weights, moved, packed)()
    return packed, list(moved.split([layout_of(w).columns for w in weights], dim=1))


def assert_same_pass(name: str, weights: list[Tensor]) -> None:
    """A pass of an implementation against the reference's, for every matrix of a list."""
    vectors = random_vectors(weights)
    rows, pairs = one_pass(name, weights, vectors)
    right_rows, right_pairs = one_pass("reference", weights, vectors)
    for m, weight in enumerate(weights):
        case = (tuple(weight.shape), weight.stride(), weight.dtype)
        sigma, frobenius, _, _, growth = right_rows[m].tolist()
        # Where W v cancels by chance, its rounding is measured against what was added up.
        columns = max(1, pairs[m].shape[1])
        cancels = frobenius * growth / sigma / columns**0.5 if sigma > 0 else 1.0
        rtol = RTOL[weight.dtype] * max(1.0, cancels)
        close = torch.isclose(rows[m], right_rows[m], rtol=rtol, atol=0, equal_nan=True)
        assert close.all(), (case, rows[m], right_rows[m])
        for mine, right in zip(pairs[m], right_pairs[m], strict=True):
            assert (mine - right).norm() <= rtol * max(1.0, right.norm().item()), case
