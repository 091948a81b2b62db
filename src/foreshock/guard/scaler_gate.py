"""A GradScaler's step, before which many ranks hear of each other's overflow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.amp.grad_scaler import OptState


class ScalerGate:
    """Wraps `scaler.step` of one GradScaler object until `remove` is called.

    torch's `found_inf` is of this rank. With DTensors it is the largest over the mesh of the first
    gradient, along the dimensions that this one is split over; that leaves out what the others are
    split over, and DistributedDataParallel. Some ranks would then make an update and keep the scale
    where others do not. Here it is that of all ranks, through what they tell each other anyway.

    Args:
        scaler: whose step is wrapped, as an attribute of the object.
        optimizer: that it steps; other ones are left alone.
        has_overflowed: called before the scaler decides; whether a gradient of any rank is not
            finite, the same on all of them.
        stepped: called after each step, whether the optimizer was called or not.
    """

    def __init__(
        self,
        scaler: torch.amp.GradScaler,
        optimizer: torch.optim.Optimizer,
        has_overflowed: Callable[[], bool],
        stepped: Callable[[], None],
    ) -> None:
        self._scaler = scaler
        self._optimizer = optimizer
        self._has_overflowed = has_overflowed
        self._stepped = stepped
        self._is_removed = False
        self._had_own_step = "step" in vars(scaler)
        self._inner = scaler.step
        scaler.step = self  # type: ignore[method-assign]

    def __reduce__(self) -> tuple[Any, ...]:
        # A scaler that is copied or saved meanwhile has its own step again.
        return getattr, (self._scaler, "step")

    def __call__(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        """In the place of `scaler.step`."""
        is_ours = optimizer is self._optimizer and self._scaler.is_enabled()
        if self._is_removed or not is_ours:
            return self._inner(optimizer, *args, **kwargs)
        if not getattr(optimizer, "_step_supports_amp_scaling", False):
            self._unscale()  # as the scaler would, which then decides on what we have put there
        has_overflowed = self._has_overflowed()
        if has_overflowed:
            self._tell_scaler()
        result = self._inner(optimizer, *args, **kwargs)
        if has_overflowed:
            self._tell_scaler()  # once more: for a fused optimizer it has looked anew
        self._stepped()
        return result

    def _unscale(self) -> None:
        if self._of_optimizer()["stage"] is OptState.READY:
            self._scaler.unscale_(self._optimizer)

    def _tell_scaler(self) -> None:
        for found_inf in self._of_optimizer()["found_inf_per_device"].values():
            found_inf.fill_(1.0)

    def _of_optimizer(self) -> dict[str, Any]:
        return self._scaler._per_optimizer_states[id(self._optimizer)]

    def remove(self) -> None:
        """Puts the wrapped step back; where somebody has wrapped ours since, ours lets all pass."""
        self._is_removed = True
        if vars(self._scaler).get("step") is not self:
            return
        if self._had_own_step:
            self._scaler.step = self._inner
        else:
            del self._scaler.step
