"""The true alignment of a step, against one long vector."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from foreshock.signals import alignment, update_alignment

# Sums in double precision in another order: measured 2e-16.
TOLERANCE = 1e-13


def step_of(
    shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    before = [torch.randn(shape).to(dtype) for shape in shapes]
    gradients = [torch.randn(shape).to(dtype) for shape in shapes]
    after = [
        b - 0.1 * g + 0.1 * torch.randn_like(b) for b, g in zip(before, gradients, strict=True)
    ]
    return before, after, gradients


def flat(tensors: list[Tensor]) -> np.ndarray:
    return np.concatenate([t.double().reshape(-1).numpy() for t in tensors])


@pytest.mark.parametrize("elements", [1, 7, 64, 1 << 17])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_it_is_the_cosine_of_two_long_vectors(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, elements: int
) -> None:
    monkeypatch.setattr(alignment, "_CPU_ELEMENTS", elements)
    before, after, gradients = step_of([(3, 5), (), (17,), (0,), (4, 2, 3), (1,)], dtype)
    found = update_alignment(before, after, gradients)
    g, u = flat(gradients), flat(after) - flat(before)
    expected = -g @ u / np.linalg.norm(g) / np.linalg.norm(u)
    assert found.cosine.item() == pytest.approx(expected, rel=TOLERANCE)
    assert found.grad_norm.item() == pytest.approx(np.linalg.norm(g), rel=TOLERANCE)
    assert found.step_norm.item() == pytest.approx(np.linalg.norm(u), rel=TOLERANCE)


def test_more_elements_than_are_worked_on_at_a_time() -> None:
    before, after, gradients = step_of([(300, 1000), (5,)])
    g, u = flat(gradients), flat(after) - flat(before)
    found = update_alignment(before, after, gradients)
    assert found.dot.item() == pytest.approx(-g @ u, rel=1e-12)


def test_plain_descent_is_at_one_and_ascent_at_minus_one() -> None:
    model = torch.nn.Linear(20, 10)
    model(torch.randn(5, 20)).square().sum().backward()
    before = [p.detach().clone() for p in model.parameters()]
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    gradients = [p.grad for p in model.parameters()]
    down = update_alignment(before, model.parameters(), gradients).cosine
    up = update_alignment(model.parameters(), before, gradients).cosine
    assert down.item() == pytest.approx(1.0, abs=1e-6)
    assert up.item() == pytest.approx(-1.0, abs=1e-6)
    assert not down.requires_grad


def test_magnitudes_that_single_precision_cannot_square() -> None:
    before = [torch.zeros(10)]
    for size in (1e-30, 1e30):
        found = update_alignment(before, [torch.full((10,), -size)], [torch.full((10,), size)])
        assert found.cosine.item() == pytest.approx(1.0)


def test_parameters_without_a_gradient_are_left_out() -> None:
    before, after, gradients = step_of([(5,), (6,)])
    both = update_alignment(before, after, [gradients[0], None])
    alone = update_alignment(before[:1], after[:1], gradients[:1])
    assert both.cosine == alone.cosine


def test_nothing_and_zeros_are_at_zero() -> None:
    zeros, ones = [torch.zeros(3)], [torch.ones(3)]
    assert update_alignment([], [], []).cosine == 0
    assert update_alignment(zeros, ones, [None]).cosine == 0
    assert update_alignment(zeros, ones, zeros).cosine == 0
    assert update_alignment(ones, [torch.ones(3)], ones).cosine == 0
    empty = [torch.zeros(0)]
    assert update_alignment(empty, [torch.zeros(0)], empty).cosine == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_told_as_nan(bad: float) -> None:
    before, after, gradients = step_of([(5,)])
    gradients[0][2] = bad
    assert update_alignment(before, after, gradients).cosine.isnan()


def test_strides_and_complex_numbers_are_read_as_they_are() -> None:
    before, after, gradients = step_of([(4, 6)])
    expected = update_alignment(before, after, gradients).cosine.item()
    turned = [[t.t().contiguous().t() for t in group] for group in (before, after, gradients)]
    assert update_alignment(*turned).cosine.item() == pytest.approx(expected, rel=TOLERANCE)
    paired = [
        [torch.view_as_complex(t.view(4, 3, 2)) for t in g] for g in (before, after, gradients)
    ]
    assert update_alignment(*paired).cosine.item() == pytest.approx(expected, rel=TOLERANCE)


def test_a_dtensor_is_read_by_its_local_shard(tmp_path: Any) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    groups = step_of([(4, 3), (5,)])
    expected = update_alignment(*groups)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        shards = [[distribute_tensor(t, mesh, [Shard(0)]) for t in group] for group in groups]
        found = update_alignment(*shards)
        assert type(found.dot) is Tensor
        assert found.cosine == expected.cosine
    finally:
        dist.destroy_process_group()


@pytest.mark.gpu
def test_on_a_device_it_is_what_it_is_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alignment, "_DEVICE_ELEMENTS", 1000)
    groups = step_of([(300, 100), (5,)])
    expected = update_alignment(*groups).cosine.item()
    found = update_alignment(*[[t.cuda() for t in group] for group in groups]).cosine
    assert found.is_cuda
    assert found.item() == pytest.approx(expected, rel=1e-12)


ONE = torch.ones(3)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (([ONE], [], [ONE]), ValueError, "after holds 0 tensors; accepted: 1"),
        (([ONE], [ONE], []), ValueError, "gradients holds 0 tensors; accepted: 1"),
        (([ONE], [torch.ones(4)], [ONE]), ValueError, r"after\[0\] is of shape \(4,\)"),
        (([ONE], [ONE * 2], [torch.ones(1)]), ValueError, r"gradients\[0\] is of shape \(1,\)"),
        (([ONE], [1.0], [ONE]), TypeError, r"after\[0\] is a float"),
        (([1.0], [ONE], [ONE]), TypeError, r"before\[0\] is a float"),
        (([ONE], [ONE], [ONE]), ValueError, r"before\[0\] is the memory of after\[0\]"),
        (([ONE], [ONE.detach()], [ONE]), ValueError, "a copy made before the step"),
        (([ONE], [ONE * 2], [ONE.to_sparse()]), TypeError, r"gradients\[0\] has layout"),
    ],
)
def test_bad_input_is_named(arguments: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        update_alignment(*arguments)
