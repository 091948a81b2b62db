"""Numbers from tensors: the only place where the monitor waits for a device."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from foreshock.distributed_part import whole


def read(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """A tensor's values in host memory, which on the CPU are the tensor's own.

    Cost:
        On the CPU nothing is copied but what NumPy has no type for; elsewhere a synchronisation.
    """
    tensor = tensor.detach()
    if tensor.dtype is torch.bfloat16:
        tensor = tensor.float()
    if tensor.device.type != "cpu":
        tensor = tensor.cpu()
    array: np.ndarray[Any, Any] = tensor.numpy()
    return array


class Later:
    """A tensor's values as they are now, to be had when they have arrived in host memory.

    Args:
        tensor: copied at once on the CPU; elsewhere into pinned memory, behind what its device has
            been given to do, without waiting for it.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        tensor = tensor.detach()
        self._arrival: torch.cuda.Event | None = None
        if tensor.device.type == "cuda":
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._arrival = torch.cuda.Event()
            self._arrival.record(torch.cuda.current_stream(tensor.device))
        else:
            self._host = tensor.clone()

    def get(self) -> np.ndarray[Any, Any]:
        """The values.

        Cost: waits for what the device was given before; a step later there is nothing to wait for.
        """
        if self._arrival is not None:
            self._arrival.synchronize()
        return read(self._host)


def as_number(value: Any, name: str) -> float:
    """A number, or a tensor with one element, as a float.

    Args:
        value: anything else is refused.
        name: of the argument.
    Raises:
        TypeError: names the argument, what was given and what is accepted.
    Cost:
        Waits for the device that a tensor is on; a DTensor is gathered.
    """
    try:
        return float(read(whole(value)).item() if isinstance(value, torch.Tensor) else value)
    except (TypeError, ValueError, RuntimeError):
        given = type(value).__name__
        if isinstance(value, torch.Tensor):
            given = f"tensor of shape {tuple(value.shape)} and {value.dtype}"
        raise TypeError(
            f"{name} is a {given}; accepted: a number, or a tensor with one element"
        ) from None
