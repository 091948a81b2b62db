"""What a rank says to the others, of which nothing is under way any more when its process ends."""

from __future__ import annotations

import atexit
import sys
import time
from collections import deque
from typing import Any

import torch

_sent: deque[torch.Tensor] = deque(maxlen=8)
"""What the threads of gloo may still hold."""
_UNSENT = deque([torch.empty(0)])

_PATIENCE_SECONDS = 1.0


def all_reduce(tensor: torch.Tensor, op: str = "SUM", group: Any = None) -> None:
    """As `torch.distributed.all_reduce`, in place; what gloo still holds is kept until it does not.

    Args:
        op: a name of `torch.distributed.ReduceOp`.
        group: the default one if None.
    Cost: some microseconds more.
    """
    dist: Any = torch.distributed
    sent = tensor.detach()  # an object that nobody else holds
    dist.all_reduce(sent, getattr(dist.ReduceOp, op), group=group)
    if sent.device.type == "cpu":
        _forget_released()
        _sent.append(sent)


@atexit.register
def await_release() -> None:
    """Waits until the threads of gloo hold nothing that was sent, a second at most.

    They let go of a tensor a little after its sum is there, for which they need Python's lock. A
    process that ends meanwhile is aborted (github.com/pytorch/pytorch/issues/190489), unless its
    group has ended before, and that DDP and FSDP2 keep.
    """
    end = time.monotonic() + _PATIENCE_SECONDS
    _forget_released()
    while _sent and time.monotonic() < end:
        time.sleep(1e-4)  # others have Python's lock meanwhile
        _forget_released()


def _forget_released() -> None:
    while _sent and sys.getrefcount(_sent[0]) <= sys.getrefcount(_UNSENT[0]):
        _sent.popleft()
