"""Codebooks that follow the features instead of a gradient."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from foreshock.collectives import all_reduce
from foreshock.surprise.assignment import probabilities
from foreshock.surprise.coding import Coder
from foreshock.surprise.traces import CodingTrace
from foreshock.surprise.wrapped_model import WrappedModel

Assignment = Literal["hard", "soft"]


@dataclasses.dataclass(frozen=True)
class CodesReseeded:
    """Codes that nothing was near to were moved onto features of the last batch."""

    layer: str
    codes: tuple[int, ...]


class EmaCodebookUpdater:
    """Moves every center to the running mean of the features that are assigned to it.

    n_k <- g n_k + (1 - g) sum_n w_nk,   s_k <- g s_k + (1 - g) sum_n w_nk r_n,   c_k = s_k / n_k,
    w_nk = 1 for the nearest code ("hard") or p_nk ("soft").

    A code to which nothing was ever assigned stays where it is. One whose n_k has been below
    `dead_share` of the mean over codes for `patience` updates, which is looked at every `patience`
    updates, moves onto a feature of the batch.
    Centers no longer take a gradient. In a distributed run the sums are those of all ranks.

    >>> updater = EmaCodebookUpdater(wrapped)
    >>> wrapped(x); ...; optimizer.step(); updater.update()

    Args:
        model: the wrapped model.
        decay: g, from 0 up and below 1.
        assignment: "hard" or "soft".
        dead_share: from 0 up and below 1; 0 never moves a code.
        patience: from 1 up.
        seed: of the features drawn for dead codes.
    Raises:
        TypeError, ValueError: naming the argument, what it is and what is accepted.
    Source:
        van den Oord, Vinyals, Kavukcuoglu, Neural Discrete Representation Learning (2017),
        appendix A.1, for the running means.
    """

    def __init__(
        self,
        model: WrappedModel,
        decay: float = 0.99,
        assignment: Assignment = "soft",
        dead_share: float = 0.01,
        patience: int = 20,
        seed: int = 0,
    ) -> None:
        if not isinstance(model, WrappedModel):
            raise TypeError(f"model is a {type(model).__name__}; accepted: WrappedModel")
        for name, value in (("decay", decay), ("dead_share", dead_share)):
            if not 0 <= value < 1:
                raise ValueError(f"{name} is {value}; accepted: from 0 up and below 1")
        if assignment not in get_args(Assignment):
            raise ValueError(f"assignment is {assignment!r}; accepted: 'hard', 'soft'")
        if patience < 1:
            raise ValueError(f"patience is {patience}; accepted: from 1 up")
        self._model = model
        self._decay = decay
        self._assignment = assignment
        self._dead_share = dead_share
        self._patience = patience
        self._updates = 0
        self._random = torch.Generator().manual_seed(seed)
        self._sums = {name: _Sums.none(coder) for name, coder in model.coders.items()}
        for coder in model.coders.values():
            coder.codebook.centers.requires_grad_(False)

    @torch.no_grad()
    def update(self) -> tuple[CodesReseeded, ...]:
        """Takes in the features of the model's last forward pass.

        Returns:
            Which codes were reseeded.
        Raises:
            RuntimeError: no layer has coded anything.
        """
        traces = self._model.traces
        if not traces:
            raise RuntimeError("no layer has coded anything; call the wrapped model first")
        self._updates += 1
        by_layer: dict[str, list[CodingTrace]] = {}
        for trace in traces:
            by_layer.setdefault(trace.meta.layer, []).append(trace)
        coders = self._model.coders
        events = (self._update_layer(name, coders[name], calls) for name, calls in by_layer.items())
        return tuple(event for event in events if event.codes)

    def _update_layer(self, name: str, coder: Coder, calls: list[CodingTrace]) -> CodesReseeded:
        centers = coder.codebook.centers
        sums = self._sums[name].on(centers.device)
        self._sums[name] = sums
        counted = [_counted(trace, centers, self._assignment) for trace in calls]
        new_KD1 = torch.stack(counted).sum(0)
        if _is_distributed():
            all_reduce(new_KD1)
        sums.totals.lerp_(new_KD1, 1 - self._decay)
        count_K = sums.totals[:, -1]
        # A code that nothing was assigned to has no mean: 0 / 0 would put it at the origin or at
        # NaN. n_k and s_k fade alike, so that a mean stays until it has no digits.
        is_known = count_K > torch.finfo(count_K.dtype).tiny * 1e6
        means_KD = sums.totals[:, :-1] / count_K[:, None]
        centers.copy_(torch.where(is_known[:, None], means_KD, centers.to(means_KD.dtype)))
        is_dead = count_K < self._dead_share * count_K.mean()
        sums.dead_for = torch.where(is_dead, sums.dead_for + 1, 0)
        # To look at which codes are dead waits for the device.
        is_due = self._updates % self._patience == 0
        codes = self._reseed(coder, sums, calls) if is_due and self._dead_share else ()
        return CodesReseeded(name, codes)

    def _reseed(self, coder: Coder, sums: _Sums, calls: list[CodingTrace]) -> tuple[int, ...]:
        """Moves codes that have been dead for long onto random features; returns which."""
        codes = (sums.dead_for >= self._patience).nonzero()[:, 0]
        if len(codes) == 0:
            return ()
        centers = coder.codebook.centers
        features = torch.cat([trace.reduced.flatten(0, -2) for trace in calls])
        features = features[features.isfinite().all(1)]
        seeds = centers[codes].to(sums.totals.dtype)
        if len(features):
            drawn = torch.randint(len(features), (len(codes),), generator=self._random)
            seeds = features[drawn.to(features.device)].to(sums.totals.dtype)
        if _is_distributed():
            torch.distributed.broadcast(seeds, 0)
        mean = sums.totals[:, -1].mean().expand(len(codes), 1)
        centers[codes] = seeds.to(centers.dtype)
        sums.totals[codes] = torch.cat([seeds * mean, mean], 1)
        sums.dead_for[codes] = 0
        return tuple(codes.tolist())

    def state_dict(self) -> dict[str, Any]:
        """What another updater of the same model goes on from."""
        sums = {name: vars(sums).copy() for name, sums in self._sums.items()}
        return {"sums": sums, "updates": self._updates, "random": self._random.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from what `state_dict` of another has given.

        Raises:
            ValueError: it is of other layers.
        """
        if set(state_dict["sums"]) != set(self._sums):
            raise ValueError(
                f"state_dict is of layers {sorted(state_dict['sums'])}; accepted: "
                f"{sorted(self._sums)}"
            )
        self._sums = {
            name: _Sums(**{field: tensor.clone() for field, tensor in saved.items()})
            for name, saved in state_dict["sums"].items()
        }
        self._updates = state_dict["updates"]
        self._random.set_state(state_dict["random"])


@dataclasses.dataclass
class _Sums:
    """What is known of every code of a layer."""

    totals: Tensor
    """(K, D + 1): the sum of what was assigned to it, s_k, and n_k behind."""
    dead_for: Tensor
    """(K,) int64: for how many updates it has been dead."""

    @classmethod
    def none(cls, coder: Coder) -> _Sums:
        centers = coder.codebook.centers
        wide = torch.float64 if centers.dtype == torch.float64 else torch.float32
        shape = coder.codebook.codes, coder.codebook.dim + 1
        return cls(
            torch.zeros(shape, dtype=wide, device=centers.device),
            torch.zeros(shape[0], dtype=torch.int64, device=centers.device),
        )

    def on(self, device: torch.device) -> _Sums:
        return _Sums(self.totals.to(device), self.dead_for.to(device))


def _counted(trace: CodingTrace, centers: nn.Parameter, assignment: Assignment) -> Tensor:
    """(K, D + 1): of every code the weighted sum of the features, and the sum of their weights."""
    wide = torch.float64 if centers.dtype == torch.float64 else torch.float32
    x_ND = trace.reduced.flatten(0, -2).to(wide)
    # Rows that are not finite count for nothing.
    is_finite_N1 = x_ND.isfinite().all(1, keepdim=True)
    x_ND = torch.where(is_finite_N1, x_ND, 0)
    x_ND1 = torch.cat([x_ND, is_finite_N1.to(wide)], 1)
    sums_KD1 = x_ND1.new_zeros(len(centers), x_ND1.shape[1])
    if assignment == "hard":
        return sums_KD1.index_add_(0, trace.soft_code.best_index.flatten(), x_ND1)
    for rows, p_NK in probabilities(x_ND, centers, trace.meta.temperature):
        sums_KD1 += p_NK.T @ x_ND1[rows]
    return sums_KD1


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
