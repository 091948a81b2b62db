"""Gradients that are split over ranks, or are sums that have not been added up yet."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from foreshock.collectives import all_reduce
from foreshock.distributed_part import distinct_parts, is_distributed, local_part, split_dims
from foreshock.guard.inspection import Finding, inspect_gradients
from foreshock.host_read import read


def shares_of(tensors: Iterable[torch.Tensor], size: int) -> np.ndarray[Any, Any]:
    """(T,) what this rank's sum over its part of each tensor counts in that over all ranks.

    s = (different parts of the tensor) / size: a part that k ranks hold is counted k times.

    Args:
        tensors: that all ranks have, as a whole or a part of it.
        size: ranks.
    """
    return np.array([distinct_parts(t) for t in tensors], dtype=np.float64) / size


def add_up_partial(parameters: Sequence[torch.Tensor]) -> None:
    """Has gradients that are sums over ranks added up, where that has not been done yet.

    Tensor parallelism leaves such ones (`Partial`) to the optimizer, which would add them up in
    each of its operations.

    Cost: one all_reduce for all of a mesh; nothing where there are none.
    """
    pending: dict[Any, list[torch.Tensor]] = {}
    for p in parameters:
        gradient: Any = p.grad
        if gradient is None or not is_distributed(gradient):
            continue
        partial = [dim for dim, at in enumerate(gradient.placements) if at.is_partial()]
        if not partial:
            continue
        if len(partial) == 1 and gradient.placements[partial[0]].is_partial("sum"):
            key = (gradient.device_mesh, partial[0], gradient.dtype)
            pending.setdefault(key, []).append(p)
        else:
            p.grad = gradient.redistribute(placements=p.placements)  # type: ignore[attr-defined]
    for (mesh, dim, _), owners in pending.items():
        _add_up_along(mesh, dim, owners)


def _add_up_along(mesh: Any, dim: int, owners: Sequence[torch.Tensor]) -> None:
    from torch.distributed.tensor import DTensor, Replicate

    gradients: list[Any] = [p.grad for p in owners]
    parts = [local_part(g) for g in gradients]
    flat = torch.cat([part.reshape(-1) for part in parts])
    torch.distributed.all_reduce(flat, group=mesh.get_group(dim))
    sums = flat.split([part.numel() for part in parts])
    for p, gradient, part, whole in zip(owners, gradients, parts, sums, strict=True):
        placements = list(gradient.placements)
        placements[dim] = Replicate()
        p.grad = DTensor.from_local(
            whole.view(part.shape),
            mesh,
            placements,
            run_check=False,
            shape=gradient.shape,
            stride=gradient.stride(),
        )


def inspect_over_meshes(owners: Sequence[torch.Tensor], norm_type: float) -> Finding:
    """What is in the gradients of all ranks together, asked of the meshes that they are split over.

    Tensors that are no DTensors are taken to be the same on all ranks.

    Args:
        owners: parameters, the same on all ranks.
        norm_type: 2 or inf: which norm of the finding is that of all ranks.
    Cost:
        One read of this rank's parts; an all_reduce of three numbers for each dimension of a mesh
        that gradients are split over, those of the same dimensions together.
    """
    add_up_partial(owners)
    classes: dict[Any, list[torch.Tensor]] = {}
    for p in owners:  # not by the gradients: a rank may have none where others do
        dims = split_dims(p) if is_distributed(p) else []
        key = (p.device_mesh, tuple(dims)) if dims else None  # type: ignore[attr-defined]
        classes.setdefault(key, []).append(p)
    total = Finding()
    for key, members in classes.items():
        found = inspect_gradients({str(i): p for i, p in enumerate(members)}).inspect()
        total = _added(total, found if key is None else _over_mesh(found, norm_type, *key))
    return total


def _over_mesh(found: Finding, norm_type: float, mesh: Any, dims: Sequence[int]) -> Finding:
    is_sum = norm_type == 2.0
    size = found.sumsq if is_sum else found.absmax
    sent = torch.tensor([found.nan, found.inf, size], dtype=torch.float64, device=mesh.device_type)
    for dim in dims:
        all_reduce(sent, "SUM" if is_sum else "MAX", mesh.get_group(dim))
    nan, inf, size = read(sent).tolist()
    return Finding(int(nan), int(inf), size if is_sum else 0.0, 0.0 if is_sum else size)


def _added(one: Finding, other: Finding) -> Finding:
    return Finding(
        one.nan + other.nan,
        one.inf + other.inf,
        one.sumsq + other.sumsq,
        max(one.absmax, other.absmax),
    )
