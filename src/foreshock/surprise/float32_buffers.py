"""Buffers that keep their digits wherever they go."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class Float32Buffers(nn.Module):
    """A module without parameters, whose buffers move with `.to()` and stay float32."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float32Buffers:
        # model.half() is no reason to lose digits: what moves is the device.
        for module in self.children() if recurse else ():
            module._apply(fn)
        for name, buffer in self._buffers.items():
            assert buffer is not None
            moved = fn(buffer)
            is_other_type = moved.dtype != buffer.dtype
            self._buffers[name] = buffer.to(moved.device) if is_other_type else moved
        return self
