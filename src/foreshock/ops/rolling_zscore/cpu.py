"""rolling_zscore in C++ (csrc/rolling_zscore/cpu.cpp), once for each instruction set."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from foreshock.ops._backend import active_isa, load_kernels
from foreshock.ops.rolling_zscore.state import Settings, State


def why_unavailable(device_type: str) -> str | None:
    """What keeps this implementation from tensors of a device; None if nothing does."""
    if device_type != "cpu":
        return "reads the memory of the host only"
    kernels = load_kernels()
    return kernels if isinstance(kernels, str) else None


class _Plan:
    """What the kernels know of a state (csrc/rolling_zscore/kernel.h); keeps its memory alive."""

    def __init__(self, state: State, settings: Settings, z: Tensor | None, isa: str | None) -> None:
        kernels = load_kernels()
        if isinstance(kernels, str):
            raise RuntimeError(kernels)
        self.kernels, self.isa = kernels, isa or active_isa()
        self.memory = torch.empty(kernels.rolling_zscore_plan_bytes(), dtype=torch.uint8)
        self.owned = (*state, z)
        self.address = self.memory.data_ptr()
        kernels.rolling_zscore_plan(
            *(tensor.data_ptr() for tensor in state),
            0 if z is None else z.data_ptr(),
            state.num_series,
            state.window,
            *settings,
            state.ring.dtype is torch.float32,
            self.address,
        )

    def bind(self, entry_point: str, *arguments: object) -> Any:
        """An entry point whose first arguments are known."""
        function = getattr(self.kernels, f"rolling_zscore_{entry_point}_{self.isa}")
        bound = functools.partial(function, *arguments)
        bound.owns = self  # type: ignore[attr-defined]
        return bound


def bind_rows(
    state: State, settings: Settings, isa: str | None = None
) -> Callable[[Tensor, Tensor], None]:
    """Returns push(values, z) of (T, S) tensors of the ring's dtype: T pushes in one call."""
    plan = _Plan(state, settings, None, isa)
    rows = plan.bind("push_rows", plan.address)
    dtype = state.ring.dtype

    def push(values: Tensor, z: Tensor) -> None:
        kept = values.to(dtype).contiguous()
        rows(kept.data_ptr(), len(kept), z.data_ptr())

    return push


def bind(
    state: State, settings: Settings, isa: str | None = None
) -> Callable[[Tensor, Tensor], None]:
    """Returns a call that takes a value of each series and writes its z; see `reference.bind`."""
    plan = _Plan(state, settings, None, isa)
    rows = plan.bind("push_rows", plan.address)
    dense = torch.empty(state.num_series, dtype=state.ring.dtype)
    address = dense.data_ptr()

    def push(values: Tensor, z: Tensor) -> None:
        dense.copy_(values)
        rows(address, 1, z.data_ptr())

    return push


def bind_vector(
    state: State, settings: Settings, z: Tensor, isa: str | None = None
) -> Callable[[object], bool]:
    """Returns a call that takes a vector of the ring's dtype, if it is one that can be read in
    place, and writes `z`; of anything else it returns False, and does nothing."""
    plan = _Plan(state, settings, z, isa)
    reader = plan.kernels.VectorReader(
        torch.Tensor.__dlpack_c_exchange_api__,
        torch.Tensor,
        state.num_series,
        8 * state.ring.element_size(),
        plan.address,
    )
    push: Callable[[object], bool] = plan.bind("push_vector", reader)
    return push


def bind_float(
    state: State, settings: Settings, isa: str | None = None
) -> Callable[[float], float]:
    """Returns a call that takes the value of a single series and returns its z."""
    plan = _Plan(state, settings, None, isa)
    push: Callable[[float], float] = plan.bind("push_float", plan.address)
    return push
