"""`torch.ops.foreshock.rolling_zscore`: one push, as torch.compile and torch.export see it."""

from __future__ import annotations

import torch
from torch import Tensor

from foreshock.ops._backend import choose
from foreshock.ops.rolling_zscore.state import Settings, State

_library = torch.library.Library("foreshock", "FRAGMENT")
_library.define(
    "rolling_zscore(Tensor values, Tensor(a!) ring, Tensor(b!) moments, Tensor(c!) counts, "
    "int min_count, int ddof, float? clip, float z_cap) -> Tensor"
)


@torch.library.impl(_library, "rolling_zscore", "CompositeExplicitAutograd")
def _impl(
    values: Tensor,
    ring: Tensor,
    moments: Tensor,
    counts: Tensor,
    min_count: int,
    ddof: int,
    clip: float | None,
    z_cap: float,
) -> Tensor:
    """z of (S,) values; ring, moments and counts are those of a `State`, changed in place."""
    state = State(ring, moments, counts)
    z = torch.empty(state.num_series, dtype=ring.dtype, device=ring.device)
    if state.num_series:
        module = choose("rolling_zscore", ring.device.type).module
        module.bind(state, Settings.of(min_count, ddof, clip, z_cap))(values, z)
    return z


@torch.library.register_fake("foreshock::rolling_zscore", lib=_library)
def _fake(values: Tensor, ring: Tensor, *_: object) -> Tensor:
    return ring.new_empty(ring.shape[1])


@torch.library.impl(_library, "rolling_zscore", "Autograd")
def _detached(values: Tensor, *rest: object) -> Tensor:
    """Nothing is differentiable: what was pushed is a number by then."""
    with torch._C._AutoDispatchBelowAutograd():
        z: Tensor = torch.ops.foreshock.rolling_zscore(values.detach(), *rest)
    return z
