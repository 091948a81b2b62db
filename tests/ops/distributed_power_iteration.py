"""Reads matrices that are split over ranks; run by test_power_iteration_ranks.py, once a rank."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from foreshock.ops import PowerIterator, PowerState, power_iteration

REDUCED: list[int] = []
"""Elements of every all_reduce."""


class Split(NamedTuple):
    """A matrix, how it is split, and the one whose parts are read in the same way."""

    given: Tensor
    whole: Tensor


def split(W: Tensor, dim: int | None, mesh: DeviceMesh) -> Split:
    placements = [Replicate() if dim is None else Shard(dim)]
    whole = W.t().contiguous() if dim == 1 else W
    return Split(distribute_tensor(W, mesh, placements), whole)


def everything(mesh: DeviceMesh) -> Iterator[Split]:
    """Of odd sizes; of some, ranks hold nothing."""
    yield split(torch.randn(37, 53), 0, mesh)
    yield split(torch.randn(37, 53), 1, mesh)
    yield split(torch.randn(300, 70).bfloat16(), 0, mesh)
    yield split(torch.randn(64, 9, dtype=torch.float64) * 1e30, 0, mesh)
    yield split(torch.randn(11, 6, 3, 3), 0, mesh)
    yield split(torch.randn(1, 40), 0, mesh)
    yield split(torch.randn(3, 1), 0, mesh)
    yield split(torch.randn(20, 30), None, mesh)
    yield split(torch.zeros(8, 5), 0, mesh)
    yield split(torch.empty(0, 5), 0, mesh)
    plain = torch.randn(12, 13)
    yield Split(plain, plain)
    spoilt = torch.randn(16, 10)
    spoilt[-1, 3] = torch.nan
    yield split(spoilt, 0, mesh)


def count_reductions() -> None:
    inner = dist.all_reduce

    def all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        REDUCED.append(tensor.numel())
        return inner(tensor, *args, **kwargs)

    dist.all_reduce = all_reduce


def taken() -> list[int]:
    found = list(REDUCED)
    REDUCED.clear()
    return found


def assert_same_on_all_ranks(tensor: Tensor) -> None:
    bits = tensor.contiguous().view(torch.int64)
    every = [torch.empty_like(bits) for _ in range(dist.get_world_size())]
    dist.all_gather(every, bits)
    assert all(torch.equal(bits, other) for other in every)


def check_all_agree(mesh: DeviceMesh) -> None:
    """With what one process finds, and with each other; by one small all_reduce a pass."""
    splits = list(everything(mesh))
    given, wholes = [s.given for s in splits], [s.whole for s in splits]
    group = dist.group.WORLD
    alone, together = PowerIterator(wholes), PowerIterator(given, group=group)
    columns = sum(together.state.columns)
    for iters in (None, 1, 1, 5):
        expected, found = alone(iters=iters).packed, together(iters=iters).packed
        assert taken() == [columns + 2 * len(given)] * (iters or 14)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7, equal_nan=True)
        assert_same_on_all_ranks(found)
        assert_same_on_all_ranks(together.state.vectors)


def check_warm_passes(mesh: DeviceMesh) -> None:
    W = torch.randn(45, 31)
    given = distribute_tensor(W.clone(), mesh, [Shard(0)])
    stats, state = power_iteration(given, group=dist.group.WORLD)
    assert taken() == [31 + 2] * 14
    alone, mine = power_iteration(W)
    for _ in range(3):
        W *= 1.01
        given.to_local().mul_(1.01)
        alone, mine = power_iteration(W, mine)
        stats, state = power_iteration(given, state, group=dist.group.WORLD)
        assert taken() == [31 + 2]
        torch.testing.assert_close(stats.packed, alone.packed, rtol=1e-5, atol=0)
    # What ranks have found together, one process goes on from, and the other way round.
    again = PowerState.cold(mine.layouts, [0], 0, torch.device("cpu"))
    again.load_state_dict(state.state_dict())
    torch.testing.assert_close(power_iteration(W, again)[0].packed, stats.packed, rtol=1e-5, atol=0)


def check_replicas_are_counted_once() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard"))
    W = torch.randn(18, 7)
    given = distribute_tensor(W, mesh, [Replicate(), Shard(0)])
    found, _ = power_iteration(given, group=dist.group.WORLD)
    torch.testing.assert_close(found.packed, power_iteration(W)[0].packed, rtol=1e-5, atol=0)
    taken()
    cut = distribute_tensor(W, mesh, [Shard(0), Shard(1)])
    assert "split along the dimensions [0, 1]" in refusal([cut])
    part = distribute_tensor(W, mesh["shard"], [Shard(0)])
    assert "is on 2 ranks, and the group has 4" in refusal([part])


def check_refusals(mesh: DeviceMesh) -> None:
    summed = DTensor.from_local(torch.randn(3, 4), mesh, [Partial()])
    assert "weights[1] is Partial" in refusal([torch.randn(2, 2), summed])


def refusal(weights: list[Tensor]) -> str:
    try:
        power_iteration(weights, group=dist.group.WORLD)
    except ValueError as error:
        return str(error)
    raise AssertionError("accepted")


def main() -> None:
    world_size = int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", world_size=world_size,
                            rank=int(os.environ["RANK"]))  # fmt: skip
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (world_size,))
    count_reductions()
    check_all_agree(mesh)
    check_warm_passes(mesh)
    check_refusals(mesh)
    if world_size == 4:
        check_replicas_are_counted_once()
    dist.destroy_process_group()
    print("agreed")


if __name__ == "__main__":
    main()
