"""The codes of one layer, and how far from them its outputs lie."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from foreshock.ops import soft_assign
from foreshock.surprise.outputs import Reduction, over_positions
from foreshock.surprise.scores import LayerComponents

# Squared distances are in units of the variance within clusters, where the probabilities of
# Gaussian clusters are softmax(-d2 / 2).
_TEMPERATURE = 2.0


BUFFERS = ("mean", "projection", "centers", "location", "spread")


class LayerCodes(nn.Module):
    """Squared distance of a layer's outputs to the nearest code, in the whitened space.

    z = (x - mean) @ projection, D = min_k |z - c_k|^2, and L and H of the same `soft_assign`.

    All it holds are buffers, which move with `.to()` and stay float32, and no parameter.

    Args:
        layer: dotted name in the model.
        name: of these outputs: the layer's, with the number of the call where there are several.
        mean: (D,) of the outputs.
        projection: (D, E) to the whitened space.
        centers: (K, E) codes.
        location, spread: () mean and standard deviation of D in held-out normal data.
    """

    mean: Tensor
    projection: Tensor
    centers: Tensor
    location: Tensor
    spread: Tensor

    def __init__(
        self,
        layer: str,
        name: str,
        mean: Tensor,
        projection: Tensor,
        centers: Tensor,
        location: Tensor,
        spread: Tensor,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.name = name
        tensors = (mean, projection, centers, location, spread)
        for buffer, tensor in zip(BUFFERS, tensors, strict=True):
            self.register_buffer(buffer, tensor.float().contiguous())

    def components(
        self, rows: Tensor, mask: Tensor | None, reduction: Reduction
    ) -> LayerComponents:
        """D, L and H of each sample.

        Args:
            rows: (N, D), or (N, P, D) of a layer with positions.
            mask: (N, P) bool, which positions count; None if all do.
            reduction: over positions.
        Raises:
            ValueError: naming the layer, what it gave and what is accepted.
        Cost:
            One matrix product (N, D) @ (D, E) and one `soft_assign`; nothing waits for a device.
        """
        self._check(rows)
        z = self._whitened(rows)
        code = soft_assign(z, self.centers, temperature=_TEMPERATURE)
        parts = (code.distance, code.length, code.entropy)
        if rows.dim() == 2:
            return LayerComponents(*parts)
        return LayerComponents(*(over_positions(part, mask, reduction) for part in parts))

    def _whitened(self, rows: Tensor) -> Tensor:
        if not torch.is_autocast_enabled(rows.device.type):
            return (rows - self.mean) @ self.projection
        with torch.autocast(rows.device.type, enabled=False):
            return (rows - self.mean) @ self.projection

    def tensors(self) -> dict[str, Tensor]:
        """The buffers by the names that the constructor has for them."""
        return {name: getattr(self, name) for name in BUFFERS}

    def _check(self, rows: Tensor) -> None:
        features = len(self.mean)
        if rows.shape[-1] != features or rows.device != self.mean.device:
            raise ValueError(
                f"layer {self.name!r} gives {rows.shape[-1]} features on {rows.device}; accepted: "
                f"{features} on {self.mean.device}, as fitted; probe.to(device) moves the probe"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LayerCodes:
        # model.half() is no reason to lose the digits of codes: what moves is the device.
        for name, buffer in self._buffers.items():
            assert buffer is not None
            moved = fn(buffer)
            is_other_type = moved.dtype != buffer.dtype
            self._buffers[name] = buffer.to(moved.device) if is_other_type else moved
        return self
