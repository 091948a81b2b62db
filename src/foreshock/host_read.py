"""Numbers from tensors: the only place where the monitor waits for a device."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


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
