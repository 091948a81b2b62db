"""The norm of gradients that are split over ranks, mixed, or not added up yet."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module

import foreshock as fs
from foreshock.distributed_part import local_part
from tests.ranks.training import (
    KINDS,
    assert_same_on_all_ranks,
    counted,
    make_model,
    make_optimizer,
    parameter,
    ranks,
)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def with_gradients(parameters: Iterable[Tensor], scale: float = 1.0) -> list[Tensor]:
    """Gradients that any number of ranks, and a single process, would have."""
    owners = list(parameters)
    for i, p in enumerate(owners):
        generator = torch.Generator().manual_seed(i)
        values = scale * torch.randn(p.shape, generator=generator)
        if isinstance(p, DTensor):
            values = distribute_tensor(values, p.device_mesh, p.placements)
        p.grad = values
    return owners


def true_norm(owners: Iterable[Tensor], norm_type: float = 2.0) -> float:
    flat = torch.cat([whole(p.grad).double().reshape(-1) for p in owners])
    return float(torch.linalg.vector_norm(flat, norm_type))


def assert_close(a: float, b: float, relative: float = 1e-6) -> None:
    assert abs(a - b) <= relative * abs(b), (a, b)


def check_clip_grad_norm_is_torchs_on_dtensors(out: Path) -> None:
    # torch's refuses the largest element of a rank that has none, as with four.
    for norm_type in (2.0, math.inf)[: 4 // dist.get_world_size()]:
        for max_norm in (0.1, 1e6):
            ours = with_gradients(make_model("fsdp2").parameters())
            theirs = with_gradients(make_model("fsdp2").parameters())
            norm = fs.clip_grad_norm_(ours, max_norm, norm_type)
            expected = torch.nn.utils.clip_grad_norm_(theirs, max_norm, norm_type)
            assert isinstance(norm, DTensor)
            assert_close(float(norm.full_tensor()), float(expected.full_tensor()))
            assert_same_on_all_ranks(float(norm))
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(
                    local_part(a.grad), local_part(b.grad), rtol=1e-6, atol=0
                )


def check_clip_grad_norm_mixes_split_and_whole_tensors(out: Path) -> None:
    """Where torch's raises an error."""
    owners = with_gradients(make_model("tp").parameters())
    assert {type(p) for p in owners} > {nn.Parameter}
    expected = true_norm(owners)
    before = [whole(p.grad).clone() for p in owners]
    norm = fs.clip_grad_norm_(owners, 0.1)
    assert_close(float(norm), expected)
    for p, gradient in zip(owners, before, strict=True):
        torch.testing.assert_close(whole(p.grad), gradient * (0.1 / expected), rtol=1e-5, atol=1e-9)


def check_monitors_norm_is_that_of_all_ranks(out: Path) -> None:
    for kind in KINDS:
        for norm_type in (2.0, math.inf):
            model = make_model(kind)
            owners = with_gradients(model.parameters())
            optimizer = torch.optim.SGD(owners, lr=0.1)
            with fs.Monitor(model, optimizer, out / f"{kind} {norm_type}") as monitor:
                expected = true_norm(owners, norm_type)
                norm = monitor.clip_grad_norm_(0.1, norm_type, loss=1.0)
                assert_close(float(norm), expected)
                assert_close(true_norm(owners, norm_type), 0.1, 1e-4)
                assert_same_on_all_ranks(float(norm))


@ranks(2)
def check_error_if_nonfinite_is_raised_on_all_ranks(out: Path) -> None:
    for kind in KINDS:
        model = make_model(kind)
        owners = with_gradients(model.parameters())
        with fs.Monitor(model, torch.optim.SGD(owners, lr=0.1), out / kind) as monitor:
            if dist.get_rank() == 1:
                local_part(parameter(model, "up.weight").grad).view(-1)[0] = math.inf
            with pytest.raises(RuntimeError, match="non-finite"):
                monitor.clip_grad_norm_(0.1, error_if_nonfinite=True)


def check_partial_gradients_are_added_up_before_their_norm_is_taken(out: Path) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(3)
    alone = nn.Sequential(nn.LayerNorm(6), nn.Tanh())
    model = parallelize_module(copy.deepcopy(alone), mesh, {"0": SequenceParallel()})
    x = torch.randn(2, 3 * dist.get_world_size(), 6)
    nn.Sequential(*alone)(x).square().sum().backward()
    part = x.chunk(dist.get_world_size(), dim=1)[dist.get_rank()]
    y = model(DTensor.from_local(part, mesh, [Shard(1)]))
    y.to_local().square().sum().backward()
    owners = list(model.parameters())
    assert any(at.is_partial() for p in owners for at in p.grad.placements)
    expected = true_norm(alone.parameters())
    with counted() as calls:
        norm = fs.clip_grad_norm_(owners, 0.1)
    assert_close(float(norm), expected, 1e-5)
    assert len(calls) == 1  # both gradients together
    assert all(at == Replicate() for p in owners for at in p.grad.placements)
    assert_close(true_norm(owners), 0.1, 1e-4)


@ranks(4)
def check_two_dimensional_meshes_count_every_element_once(out: Path) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "parts"))
    models: dict[str, Any] = {}
    torch.manual_seed(0)
    models["hybrid"] = fully_shard(nn.Linear(5, 7), mesh=mesh)
    both = nn.Linear(5, 7)
    both.weight = nn.Parameter(distribute_tensor(both.weight, mesh, [Shard(0), Shard(1)]))
    both.bias = nn.Parameter(distribute_tensor(both.bias, mesh["parts"], [Shard(0)]))
    models["both"] = both
    for name, model in models.items():
        owners = with_gradients(model.parameters())
        expected = true_norm(owners)
        monitor = fs.Monitor(model, torch.optim.SGD(owners, lr=0.1), out / name)
        assert_close(float(monitor.clip_grad_norm_(1e6, loss=1.0)), expected)
        assert_close(float(fs.clip_grad_norm_(owners, 0.1)), expected)
        monitor.finalize()


@ranks(2)
def check_fused_optimizers_take_the_factor_and_the_verdict_beside_dtensors(out: Path) -> None:
    for kind in KINDS:
        model = make_model(kind)
        owners = with_gradients(model.parameters())
        optimizer = make_optimizer(owners, 0.1, is_fused=True)
        before = [local_part(p).clone() for p in owners]
        with fs.guard.clipping.scaled_in_step(optimizer, torch.tensor(2.0), torch.tensor(1.0)):
            optimizer.step()
        assert all(torch.equal(a, local_part(b)) for a, b in zip(before, owners, strict=True))
        assert all(float(optimizer.state[p]["step"]) == 0 for p in owners)
        with fs.guard.clipping.scaled_in_step(optimizer, torch.tensor(2.0), torch.tensor(0.0)):
            optimizer.step()
        halved = with_gradients(make_model(kind).parameters(), scale=0.5)
        make_optimizer(halved, 0.1, is_fused=True).step()
        for a, b in zip(owners, halved, strict=True):
            torch.testing.assert_close(local_part(a), local_part(b), rtol=1e-6, atol=1e-7)
