"""One gate: what it computes, in which precision, and what it refuses."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch

from foreshock.gates import SO8RotationGate, rotation_of

# Measured against float64: 2e-7 in float32; in bfloat16 the rounding of the output, 2^-8 of it.
ATOL = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def open_gate(dim: int = 24, **given: Any) -> SO8RotationGate:
    return SO8RotationGate(dim, alpha=0.5, theta_std=0.7, **given)


def expected(gate: SO8RotationGate, x: torch.Tensor) -> torch.Tensor:
    """By the formula, in float64, block by block."""
    rotation = rotation_of(gate.theta.double())
    blocks = x.double().split(8, -1)
    turned = torch.cat([b @ r for b, r in zip(blocks, rotation, strict=True)], -1)
    return x.double() + torch.sigmoid(gate.alpha.double()) * (turned - x.double())


@pytest.mark.parametrize("dtype", ATOL, ids=str)
@pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 3, 4, 24), (0, 24)], ids=str)
def test_it_mixes_the_rotation_of_each_block_into_its_input(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    gate = open_gate(dtype=torch.float64 if dtype is torch.float64 else torch.float32)
    x = torch.randn(shape).to(dtype)
    out = gate(x)
    assert out.dtype is dtype
    torch.testing.assert_close(out.double(), expected(gate, x), rtol=0, atol=ATOL[dtype])


def test_it_starts_nearly_closed_and_as_the_identity_bit_for_bit() -> None:
    gate, x = SO8RotationGate(64), torch.randn(100, 64)
    assert gate.mix().item() == pytest.approx(0.0066929, abs=1e-7)
    assert torch.equal(gate(x), x)
    gate(x).square().sum().backward()
    assert gate.theta.grad is not None
    assert gate(x).sum().isfinite()


def test_theta_and_alpha_learn() -> None:
    gate, x = open_gate(), torch.randn(50, 24)
    (gate(x) * torch.randn(50, 24)).sum().backward()
    assert gate.theta.grad is not None
    assert gate.alpha.grad is not None
    assert gate.theta.grad.abs().amax((-2, -1)).min() > 0
    assert gate.alpha.grad != 0


@pytest.mark.parametrize(
    "cast",
    [lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.to("cpu", torch.bfloat16)],
    ids=["bfloat16", "half", "to"],
)
def test_cast_to_less_it_stays_in_float32(cast: Any) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(24, 24), open_gate())
    theta = model[1].theta.detach().clone()
    cast(model)
    assert model[0].weight.dtype.itemsize == 2
    assert model[1].theta.dtype is model[1].alpha.dtype is torch.float32
    assert torch.equal(model[1].theta, theta)
    assert model.double()[1].theta.dtype is torch.float64
    assert model.to("meta")[1].theta.is_meta


def test_autocast_does_not_reach_it() -> None:
    gate, x = open_gate(), torch.randn(5, 24)
    with torch.autocast("cpu", torch.bfloat16):
        out = gate(x)
    assert out.dtype is torch.float32
    torch.testing.assert_close(out.double(), expected(gate, x), rtol=0, atol=ATOL[torch.float32])


def test_a_copy_is_a_gate_of_its_own() -> None:
    gate, x = open_gate(), torch.randn(5, 24)
    before = gate(x)
    file = io.BytesIO()
    torch.save(gate, file)
    file.seek(0)
    for other in (copy.deepcopy(gate), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), before)
        with torch.no_grad():
            other.theta.mul_(2)
        assert not torch.equal(other(x), before)
        assert not torch.equal(other(x), before)
        assert torch.equal(gate(x), before)


@pytest.mark.parametrize("dim", [12, 7, 0, -8, 8.0, True])
def test_a_width_that_is_not_of_eights_is_refused(dim: Any) -> None:
    with pytest.raises(ValueError, match=rf"dim is {dim}, not divisible by 8"):
        SO8RotationGate(dim)


@pytest.mark.parametrize(
    ("x", "what"),
    [
        (torch.randn(3, 16), r"\(3, 16\); accepted: \(\.\.\., 24\)"),
        (torch.tensor(1.0), r"\(\); accepted"),
        (torch.zeros(3, 24, dtype=torch.int64), "int64; accepted: floating point"),
    ],
    ids=["width", "scalar", "integers"],
)
def test_an_input_that_it_cannot_turn_is_refused(x: torch.Tensor, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        open_gate()(x)


def test_other_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="theta_std is -1"):
        SO8RotationGate(8, theta_std=-1)
    with pytest.raises(ValueError, match=r"dtype is torch\.float16"):
        SO8RotationGate(8, dtype=torch.float16)
