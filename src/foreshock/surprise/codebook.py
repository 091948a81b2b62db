"""The codes that a layer's features are compared with."""

from __future__ import annotations

import importlib
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

Init = Literal["normal", "uniform"]

_MOST_ROWS = 65536


class Codebook(nn.Module):
    """K centers of D features: one parameter, `centers`.

    "normal": c ~ N(0, 1) / sqrt(D);  "uniform": c ~ U(-1, 1) / sqrt(D).

    Args:
        codes: K.
        dim: D.
        init: which of the two.
        seed: of a random stream of its own: the global one is not drawn from.
        device: of the centers.
        dtype: of the centers, which are drawn in float32.
    Raises:
        ValueError: naming the argument, what it is and what is accepted.
    """

    def __init__(
        self,
        codes: int,
        dim: int,
        *,
        init: Init = "normal",
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("codes", codes), ("dim", dim)):
            if value < 1:
                raise ValueError(f"{name} is {value}; accepted: from 1 up")
        if init not in get_args(Init):
            raise ValueError(f"init is {init!r}; accepted: {', '.join(map(repr, get_args(Init)))}")
        random = torch.Generator().manual_seed(seed)
        drawn = torch.empty(codes, dim)
        drawn.normal_(generator=random) if init == "normal" else drawn.uniform_(
            -1, 1, generator=random
        )
        self.centers = nn.Parameter((drawn / dim**0.5).to(device=device, dtype=dtype))

    @property
    def codes(self) -> int:
        """K."""
        return len(self.centers)

    @property
    def dim(self) -> int:
        """D."""
        return self.centers.shape[1]

    @torch.no_grad()
    def move_to_means(self, features: Tensor, seed: int = 0) -> None:
        """Puts the centers on the means that k-means++ finds among features.

        Args:
            features: (N, D), N at least K; 65536 rows at most are used, drawn without replacement.
            seed: the same seed and features give the same centers.
        Raises:
            ImportError: scikit-learn is missing; install foreshock[surprise].
            ValueError: naming what is wrong with features.
        """
        if features.dim() != 2 or features.shape[1] != self.dim or len(features) < self.codes:
            raise ValueError(
                f"features has shape {tuple(features.shape)}; accepted: (N, {self.dim}) with N "
                f"from {self.codes} up"
            )
        rows = features.detach().cpu().float()
        if not rows.isfinite().all():
            raise ValueError("features holds numbers that are not finite; accepted: finite ones")
        if len(rows) > _MOST_ROWS:
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
            rows = rows[order[:_MOST_ROWS]]
        means = _cluster_module().KMeans(self.codes, n_init=1, random_state=seed).fit(rows.numpy())
        self.centers.copy_(torch.from_numpy(means.cluster_centers_))

    def extra_repr(self) -> str:
        """What print(module) shows."""
        return f"codes={self.codes}, dim={self.dim}"


def _cluster_module() -> Any:
    try:
        return importlib.import_module("sklearn.cluster")
    except ImportError as error:
        raise ImportError(
            "k-means needs scikit-learn; install foreshock[surprise]", name="sklearn"
        ) from error
