"""Whether parameters and optimizer state are still what the last update has made them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from foreshock.distributed_part import local_part
from foreshock.guard.containers import tensors_in
from foreshock.guard.events import Offender
from foreshock.host_read import read

_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


class StateSeal:
    """Sums of the bits of parameters and optimizer state, to be compared between two updates.

    sum(words of the tensor's memory) mod 2^64, for each tensor. A flipped bit changes a sum by a
    power of two: one is always found, several unless their changes cancel out. The sums do not
    depend on the order of the additions, so that equal memory has equal sums.

    Args:
        parameters: by name, as they are to be named.
        optimizer: whose state is summed up too.
    Cost:
        One read of both to set it and one to look, a small kernel or two for each tensor.
    """

    def __init__(
        self, parameters: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer
    ) -> None:
        self._parameters = dict(parameters)
        self._optimizer = optimizer
        self._names: list[str] = []
        self._sums: torch.Tensor | None = None

    @property
    def is_set(self) -> bool:
        """Whether there is something to compare with."""
        return self._sums is not None

    def set(self) -> None:
        """From now on nothing may change until the next update."""
        self._names, self._sums = self._sum_up()

    def differs(self) -> torch.Tensor:
        """() bool, on the first parameter's device: whether anything has changed since."""
        return self._changed().any()

    def find_changed(self) -> Offender | None:
        """The first tensor that has changed since; waits for the device."""
        changed = read(self._changed())
        for i, (name, tensor) in enumerate(self._tensors()):
            if i >= len(changed) or changed[i]:
                kind = "parameter" if i < len(self._parameters) else "optimizer state"
                return Offender(kind, name, 0, 0, tensor.numel())  # type: ignore[arg-type]
        return None

    def place_of(self, offender: Offender) -> int | None:
        """Where a tensor stands in the order of names; None for one that is not summed up."""
        return self._names.index(offender.name) if offender.name in self._names else None

    def _changed(self) -> torch.Tensor:
        names, sums = self._sum_up()
        if self._sums is None or names != self._names:
            # State was made, or lost: that is no flipped bit, and all of it is new.
            return torch.full((1,), self._sums is not None, device=sums.device)
        return sums != self._sums

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self._parameters.items()
        for name, p in self._parameters.items():
            for key, tensor in tensors_in(self._optimizer.state.get(p, {})):
                yield f"{name}: {key}", tensor

    def _sum_up(self) -> tuple[list[str], torch.Tensor]:
        names, tensors = zip(*self._tensors(), strict=True)
        device = tensors[0].device
        with torch.no_grad():
            sums = [sum_of_bits(t) for t in tensors]
            return list(names), torch.stack([s.to(device, non_blocking=True) for s in sums])


def sum_of_bits(tensor: torch.Tensor) -> torch.Tensor:
    """() int64: the words of a tensor's memory added up, mod 2^64; of a DTensor, of this part."""
    dense = local_part(tensor).detach()
    dense = dense._values() if dense.is_sparse else dense
    flat = dense.contiguous().view(-1)
    size = max(n for n in _WORDS if flat.nbytes % n == 0 and flat.data_ptr() % n == 0)
    return flat.view(_WORDS[size]).sum(dtype=torch.int64)
