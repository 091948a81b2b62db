"""What rotations made of thetas are, and how their gradients flow."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foreshock.gates import SO8RotationGate, measure, rotation_of, share

# Measured: at most 3.4e-7 over 11520 blocks of norms 0.01 to 30, computed in float32 itself.
MAX_ORTHOGONALITY_ERROR = 1e-6
DET_ATOL = 1e-6
NORM_RTOL = 1e-6
# Measured: at most 4e-12 of the largest, by norms from 0.01 to 100.
GRAD_ATOL = 1e-8


def thetas(norm: float, seed: int, blocks: int = 8) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    drawn = torch.randn(blocks, 8, 8, generator=random)
    return norm * drawn / torch.linalg.matrix_norm(drawn)[:, None, None]


def excess(rotation: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(rotation.mT @ rotation - torch.eye(8))


@settings(deadline=None, max_examples=60)
@given(norm=st.floats(0, 10), seed=st.integers(0, 2**31))
def test_it_is_orthogonal_keeps_norms_and_has_determinant_one(norm: float, seed: int) -> None:
    rotation = rotation_of(thetas(norm, seed))
    assert rotation.dtype is torch.float32
    assert excess(rotation).max() < MAX_ORTHOGONALITY_ERROR
    assert (torch.linalg.det(rotation.double()) - 1).abs().max() < DET_ATOL
    x = torch.randn(8, 5, 8, generator=torch.Generator().manual_seed(seed)).double()
    before, after = x.norm(dim=-1), (x @ rotation.double()).norm(dim=-1)
    torch.testing.assert_close(after, before, rtol=NORM_RTOL, atol=0)


@pytest.mark.parametrize("norm", [1e2, 1e4, 1e6, 1e8])
def test_it_is_orthogonal_for_thetas_that_are_far_too_large(norm: float) -> None:
    assert excess(rotation_of(thetas(norm, 0, 200))).max() < MAX_ORTHOGONALITY_ERROR


def test_in_float32_itself_it_would_not_be() -> None:
    theta = thetas(10, 0, 200)
    assert excess(torch.linalg.matrix_exp(theta - theta.mT)).max() > MAX_ORTHOGONALITY_ERROR


def test_it_is_the_exponential_that_it_is_said_to_be() -> None:
    theta = thetas(2, 0).double()
    skew, term, total = theta - theta.mT, torch.eye(8).double(), torch.eye(8).double()
    for k in range(1, 60):
        term = term @ skew / k
        total = total + term
    torch.testing.assert_close(rotation_of(theta), total.expand_as(theta), rtol=0, atol=1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_block_and_is_seen(bad: float) -> None:
    theta = thetas(1, 0, 3)
    theta[1, 0, 1] = bad
    rotation = rotation_of(theta)
    assert rotation[1].isnan().all()
    assert excess(rotation[[0, 2]]).max() < MAX_ORTHOGONALITY_ERROR


def several(count: int = 3) -> list[SO8RotationGate]:
    return [SO8RotationGate(8 * (i + 1), theta_std=0.5, dtype=torch.float64) for i in range(count)]


@pytest.mark.parametrize("norm", [0.0, 1e-3, 1.0, 10.0, 100.0])
def test_gradients_of_many_at_once_are_those_of_each(norm: float) -> None:
    gates = several()
    share(gates)
    for i, gate in enumerate(gates):
        gate.theta.data = thetas(norm, i, i + 1).double()
    weights = [torch.randn_like(gate.theta) for gate in gates]

    def gradients(rotations: list[Tensor]) -> tuple[Tensor, ...]:
        loss = sum((w * r).sum() for w, r in zip(weights, rotations, strict=True))
        assert isinstance(loss, Tensor)
        return torch.autograd.grad(loss, [gate.theta for gate in gates])

    together = gradients([gate.rotation() for gate in gates])
    apart = gradients([rotation_of(gate.theta) for gate in gates])
    torch.testing.assert_close(together, apart, rtol=0, atol=GRAD_ATOL)


def test_what_is_not_finite_spoils_no_other_gradient() -> None:
    gates = several(2)
    share(gates)
    expected = torch.autograd.grad(rotation_of(gates[0].theta)[0, 0].sum(), gates[0].theta)
    with torch.no_grad():
        gates[1].theta[1, 2, 3] = float("inf")
    total = gates[0].rotation()[0, 0].sum() + gates[1].rotation().sum()
    ours, theirs = torch.autograd.grad(total, [gate.theta for gate in gates])
    torch.testing.assert_close((ours,), expected, rtol=0, atol=GRAD_ATOL)
    assert theirs[0].isfinite().all()
    assert not theirs[1].isfinite().all()


def test_more_blocks_than_are_taken_at_once_make_no_difference() -> None:
    gate = SO8RotationGate(8 * 1100, theta_std=0.5, dtype=torch.float64)
    weight = torch.randn_like(gate.theta)
    expected = torch.autograd.grad((rotation_of(gate.theta) * weight).sum(), gate.theta)
    found = torch.autograd.grad((gate.rotation() * weight).sum(), gate.theta)
    torch.testing.assert_close(found, expected, rtol=0, atol=GRAD_ATOL)


def test_gradients_are_those_of_finite_differences() -> None:
    (gate,) = several(1)
    start = gate.theta.detach().clone()
    weight = torch.randn_like(start)
    (gate.rotation() * weight).sum().backward()
    step = torch.randn_like(start)
    ahead, behind = (rotation_of(start + h * step) for h in (1e-6, -1e-6))
    assert gate.theta.grad is not None
    slope = ((ahead - behind) * weight).sum() / 2e-6
    torch.testing.assert_close((gate.theta.grad * step).sum(), slope, rtol=1e-7, atol=1e-7)


def test_all_gates_are_measured_as_each_alone() -> None:
    gates = [SO8RotationGate(8 * (i + 1), alpha=float(-i), theta_std=1.0) for i in range(3)]
    share(gates)
    found = measure(gates)
    for row, gate in zip(found, gates, strict=True):
        rotation = rotation_of(gate.theta).detach().double()
        errors = torch.linalg.matrix_norm(rotation.mT @ rotation - torch.eye(8))
        dets = torch.linalg.det(rotation)
        expected = [
            errors.max(),
            errors.mean(),
            dets[(dets - 1).abs().argmax()],
            gate.alpha.double().sigmoid(),
        ]
        torch.testing.assert_close(row, torch.stack(expected).detach(), rtol=0, atol=1e-8)
