"""What power_iteration remembers from one call to the next."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foreshock.ops.power_iteration.matrices import Layout


def initial_vector(seed: int, index: int, columns: int) -> Tensor:
    """(columns,) float64 of unit length: a function of its arguments alone, on every machine.

    Uniform numbers of the counter-based generator Philox4x64, under the key (seed, index): torch's
    global generator is neither read nor moved, and no matrix's vector depends on another matrix.
    """
    key = np.array([seed % 2**64, index], np.uint64)  # of a list, NumPy would make floats
    bits = np.random.Philox(key=key).random_raw(columns)
    v: Tensor = torch.from_numpy((bits >> np.uint64(11)) * 2.0**-52 - (1 - 2.0**-53))
    length: Tensor = v.norm()
    return v / length


class PowerState:
    """A direction for each of M matrices, which the next pass multiplies by, and the one before.

    Attributes:
        layouts: M, how each matrix is read.
        vectors: (2, N) float64 on the device of the weights, N the columns of all matrices: in the
            first row every matrix's v end to end, in the second its `previous`.
        is_warm: M; whether v has had its cold start. False until the matrix was seen finite and not
            all zero.
        is_all_warm: whether every matrix is.
    """

    def __init__(self, layouts: Sequence[Layout], vectors: Tensor, is_warm: Iterable[bool]) -> None:
        self.layouts = tuple(layouts)
        self.vectors = vectors
        self.is_warm = tuple(is_warm)

    @property
    def is_warm(self) -> tuple[bool, ...]:
        return self._is_warm

    @is_warm.setter
    def is_warm(self, is_warm: tuple[bool, ...]) -> None:
        self._is_warm = is_warm
        self.is_all_warm = all(is_warm)

    @classmethod
    def cold(
        cls, layouts: Sequence[Layout], index: Sequence[int], seed: int, device: torch.device
    ) -> PowerState:
        """The state before the first call; `index` says which weights the matrices are."""
        starts = [
            initial_vector(seed, i, layout.columns)
            for i, layout in zip(index, layouts, strict=True)
        ]
        v = torch.cat([torch.empty(0, dtype=torch.float64), *starts])
        vectors = torch.stack([v, torch.zeros_like(v)]).to(device)
        return cls(layouts, vectors, [False] * len(layouts))

    @property
    def columns(self) -> list[int]:
        """Length of each matrix's vectors."""
        return [layout.columns for layout in self.layouts]

    def of_matrices(self) -> tuple[Tensor, ...]:
        """(2, n) views of `vectors`, one for each matrix."""
        return torch.split(self.vectors, self.columns, dim=1)

    def clone(self) -> PowerState:
        """A copy that shares no memory."""
        return PowerState(self.layouts, self.vectors.clone(), self.is_warm)

    def fitted(self, cold: PowerState, index: Sequence[int]) -> PowerState:
        """This state for the matrices of `cold`; where the memory order changed, cold.

        Raises:
            ValueError: naming the weight whose shape is not the one that the state is for.
        """
        if self.layouts == cold.layouts and self.vectors.device == cold.vectors.device:
            return self
        if len(self.layouts) != len(cold.layouts):
            raise ValueError(
                f"state is for {len(self.layouts)} matrices, weights has {len(cold.layouts)}; "
                "accepted: the state of the same weights, or None"
            )
        for i, mine, theirs in zip(index, self.layouts, cold.layouts, strict=True):
            if mine.shape != theirs.shape:
                raise ValueError(
                    f"weights[{i}] has shape {theirs.shape}, but state is for {mine.shape} there; "
                    "accepted: the state of the same weights, or None"
                )
        is_same = [a == b for a, b in zip(self.layouts, cold.layouts, strict=True)]
        mine = self.vectors.to(cold.vectors.device).split(self.columns, dim=1)
        pairs = zip(is_same, mine, cold.of_matrices(), strict=True)
        vectors = torch.cat([kept if same else new for same, kept, new in pairs], dim=1)
        is_warm = (warm and same for warm, same in zip(self.is_warm, is_same, strict=True))
        return PowerState(cold.layouts, vectors, is_warm)

    def state_dict(self) -> dict[str, Any]:
        """Everything, in tensors and plain values, for a checkpoint; shares no memory."""
        return {
            "vectors": self.vectors.clone(),
            "is_warm": list(self.is_warm),
            "shapes": [list(layout.shape) for layout in self.layouts],
            "orders": [list(layout.order) for layout in self.layouts],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts back what `state_dict` took, bit for bit, into the memory that is there.

        Raises:
            ValueError: naming the matrix that the saved state does not fit, or the missing key.
        """
        missing = {"vectors", "is_warm", "shapes", "orders"} - set(state)
        if missing:
            raise ValueError(f"state has no {', '.join(sorted(missing))}; accepted: a state_dict()")
        saved = [
            Layout(tuple(shape), tuple(order))
            for shape, order in zip(state["shapes"], state["orders"], strict=True)
        ]
        if len(saved) != len(self.layouts):
            raise ValueError(
                f"state is of {len(saved)} matrices; accepted here: of {len(self.layouts)}"
            )
        for i, (theirs, mine) in enumerate(zip(saved, self.layouts, strict=True)):
            if theirs != mine:
                raise ValueError(
                    f"state has {theirs.shape} read in the order {theirs.order} as matrix {i}; "
                    f"accepted here: {mine.shape} in the order {mine.order}"
                )
        self.vectors.copy_(state["vectors"])
        self.is_warm = tuple(bool(warm) for warm in state["is_warm"])
