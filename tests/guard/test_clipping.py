"""Clipping by a known norm equals torch's."""

from __future__ import annotations

import math

import pytest
import torch

import foreshock as fs

# Relative difference of results; torch sums up float32 norms in float32. Measured: 2.4e-7.
RTOL = 1e-6

SHAPES = [(7, 5), (3,), (1,), (64, 33), (0, 4), ()]


def make(scale: float, dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    parameters = []
    for shape in SHAPES:
        p = torch.nn.Parameter(torch.zeros(shape, dtype=dtype))
        p.grad = scale * torch.randn(shape, generator=generator).to(dtype)
        parameters.append(p)
    parameters.append(torch.nn.Parameter(torch.zeros(2, dtype=dtype)))  # without a gradient
    return parameters


def both(
    parameters: list[torch.nn.Parameter],
    twins: list[torch.nn.Parameter],
    max_norm: float,
    norm_type: float = 2.0,
) -> None:
    norm = fs.clip_grad_norm_(parameters, max_norm, norm_type)
    expected = torch.nn.utils.clip_grad_norm_(twins, max_norm, norm_type)
    torch.testing.assert_close(norm, expected, rtol=RTOL, atol=0, equal_nan=True)
    for p, twin in zip(parameters, twins, strict=True):
        assert (p.grad is None) == (twin.grad is None)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, twin.grad, rtol=RTOL, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("max_norm", [1e-6, 0.5, 46.0, 1e6, math.inf, 0.0])
@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1.0, 1e8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm_type", [2.0, math.inf, 1.0, 3.5])
def test_result_and_return_value_are_torchs(
    max_norm: float, scale: float, dtype: torch.dtype, norm_type: float
) -> None:
    # Torch has no largest element of an empty gradient.
    ours, theirs = (
        [p for p in make(scale, dtype) if p.numel() or norm_type != math.inf] for _ in range(2)
    )
    both(ours, theirs, max_norm, norm_type)


@pytest.mark.parametrize("bad", [[math.nan], [math.inf], [-math.inf], [math.inf, math.nan]])
def test_what_nan_and_infinity_do_to_the_others_is_torchs(bad: list[float]) -> None:
    parameters, twins = make(1.0), make(1.0)
    for ps in (parameters, twins):
        for i, value in enumerate(bad):
            ps[0].grad[i, 0] = value
    both(parameters, twins, 1.0)


def test_without_gradients_the_norm_is_zero() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(2))]
    both(parameters, [torch.nn.Parameter(torch.zeros(2))], 1.0)


def test_gradients_within_the_norm_are_not_touched() -> None:
    parameters = make(1e-3)
    versions = [p.grad._version for p in parameters if p.grad is not None]
    both(parameters, make(1e-3), 1e3)
    assert [p.grad._version for p in parameters if p.grad is not None] == versions


def test_trap_5_a_norm_whose_square_is_beyond_float32_is_no_infinity() -> None:
    """Torch's sum of squares is infinite here, and every gradient becomes 0."""
    p = torch.nn.Parameter(torch.zeros(4))
    p.grad = torch.full((4,), 1e30)
    assert fs.clip_grad_norm_(p, 1.0) == pytest.approx(2e30, rel=1e-6)
    torch.testing.assert_close(p.grad, torch.full((4,), 0.5))


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_sparse_gradients_are_clipped_by_the_norm_of_their_sums() -> None:
    embedding = torch.nn.Embedding(5, 2, sparse=True)
    linear = torch.nn.Linear(2, 1)
    linear(embedding(torch.tensor([1, 1, 4]))).sum().backward()
    parameters = {"e": embedding.weight, "w": linear.weight, "b": linear.bias}
    dense = [p.grad.to_dense().clone() for p in parameters.values()]
    expected = math.sqrt(sum(g.double().square().sum().item() for g in dense))
    norm = fs.clip_grad_norm_(parameters.values(), 0.1)
    assert norm == pytest.approx(expected, rel=1e-6)
    for p, gradient in zip(parameters.values(), dense, strict=True):
        torch.testing.assert_close(p.grad.to_dense(), gradient * 0.1 / expected)


def test_mixed_precisions_are_clipped_together() -> None:
    a, b = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(3).bfloat16())
    a.grad, b.grad = torch.full((3,), 2.0), torch.full((3,), 4.0).bfloat16()
    norm = fs.clip_grad_norm_([a, b], 1.0)
    assert norm == pytest.approx(math.sqrt(60), rel=1e-6)
    torch.testing.assert_close(a.grad, torch.full((3,), 2 / math.sqrt(60)))
    torch.testing.assert_close(
        b.grad.float(), torch.full((3,), 4 / math.sqrt(60)), rtol=4e-3, atol=0
    )


@pytest.mark.parametrize("norm_type", [2, math.inf, 1])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_is_an_error_if_wanted(norm_type: float, bad: float) -> None:
    parameters = make(1.0)
    parameters[1].grad[0] = bad  # type: ignore[index]
    before = [None if p.grad is None else p.grad.clone() for p in parameters]
    with pytest.raises(RuntimeError, match="non-finite"):
        fs.clip_grad_norm_(parameters, 1.0, norm_type, error_if_nonfinite=True)
    for p, kept in zip(parameters, before, strict=True):
        assert (p.grad is None) == (kept is None)
        if kept is not None:
            assert torch.equal(p.grad.nan_to_num(), kept.nan_to_num())  # type: ignore[union-attr]
    assert not math.isfinite(fs.clip_grad_norm_(parameters, 1.0, norm_type, foreach=True))


@pytest.mark.parametrize(("given", "error"), [("one", TypeError), (-1, ValueError)])
def test_a_max_norm_that_is_none_is_refused(given: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"max_norm is .*; accepted: a number from 0 up"):
        fs.clip_grad_norm_(make(1.0), given)  # type: ignore[arg-type]
