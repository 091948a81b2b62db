"""What the tests of soft_assign share: implementations, and the definition, done directly."""

from __future__ import annotations

import functools
import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from foreshock.ops._backend import Choice, supported_isas
from foreshock.ops.soft_assign import cpu, reference

IMPLEMENTATIONS: dict[str, Any] = {
    "reference": reference,
    **{
        f"cpu-{isa}": SimpleNamespace(
            forward=functools.partial(cpu.forward, isa=isa),
            backward=functools.partial(cpu.backward, isa=isa),
            Assigner=functools.partial(cpu.Assigner, isa=isa),
        )
        for isa in supported_isas()
    },
}
COMPILED = [name for name in IMPLEMENTATIONS if name.startswith("cpu")]
SCALARS = ("distance", "length", "entropy", "surprise")


def use(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choice = Choice(name, IMPLEMENTATIONS[name], {})
    register = importlib.import_module("foreshock.ops.soft_assign.register")
    monkeypatch.setattr(register, "choose", lambda *_: choice)


def direct(
    x: Tensor, centers: Tensor, temperature: float = 1.0, eps: float = 1e-12
) -> dict[str, Tensor]:
    """The definition in float64, with every difference; differentiable by autograd."""
    x, centers = x.double(), centers.double()
    d2 = torch.stack([(x - c).square().sum(-1) for c in centers], -1)
    p = (-d2 / temperature).softmax(-1)
    distance, best = d2.min(-1)
    length = -(p.gather(-1, best[..., None])[..., 0] + eps).log()
    entropy = -torch.special.xlogy(p, p + eps).sum(-1)
    return {
        "best_index": best,
        "distance": distance,
        "length": length,
        "entropy": entropy,
        "surprise": length + entropy,
        "probs": p,
        "d2": d2,
    }
