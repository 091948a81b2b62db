"""An assigner of torch's matrix product and an implementation's `forward`."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from foreshock.ops.soft_assign.frame import Assignment, Frame


class Assigner:
    """Where no kernel takes rows through a basis; the arguments are those of a `Frame`."""

    looks_first = False

    def __init__(self, frame: Frame, module: ModuleType) -> None:
        self._frame = frame
        self._forward = module.forward

    def refresh(self) -> None:
        """Nothing was laid out."""

    def distance(self, x_ND: Tensor) -> Tensor:
        """See `BoundAssigner`."""
        return self.assign(x_ND, False).distance

    def writer(self, out: Tensor) -> None:
        """Nothing is read as it lies."""

    @torch.no_grad()
    def assign(self, x_ND: Tensor, is_mapped_wanted: bool) -> Assignment:
        """See `BoundAssigner`."""
        centers, offset, basis, temperature, eps = self._frame
        # What is left of a float64 is rounded after its offset is gone, not before.
        z = x_ND if x_ND.dtype == torch.float64 else x_ND.to(centers.dtype)
        if offset is not None:
            z = z - offset
        z = z.to(centers.dtype)
        if basis is not None:
            with torch.autocast(z.device.type, enabled=False):
                z = z @ basis
        if len(z) == 0:
            none = z.new_empty(0)
            parts = torch.empty(0, dtype=torch.int64, device=z.device), none, none, none
        else:
            parts = self._forward(z.contiguous(), centers, temperature, eps)[:4]
        return Assignment(*parts, z if is_mapped_wanted else None)
