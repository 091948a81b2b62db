"""What torch's optimizers know of each parameter: second moments and weight decay.

Shapes: P parameters that have a gradient and moments, M matrices.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

_WITH_SECOND_MOMENTS = (torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam)

_WHY_NOT: tuple[tuple[type[torch.optim.Optimizer], str], ...] = (
    (torch.optim.Adamax, "it keeps a maximum of |g|, which no gradient exceeds"),
    (torch.optim.Adafactor, "its second moment is factored into rows and columns"),
    (torch.optim.Adagrad, "it keeps a sum of g^2, not a mean"),
    (torch.optim.RMSprop, "its mean of g^2 is not corrected for its start from 0"),
    (torch.optim.SparseAdam, "its moments are of different ages within one parameter"),
)

_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq")

# Elements worked on at a time: on the CPU what stays in its cache from one pass to the next (three
# times as fast as whole tensors of 38 million), elsewhere what is worth a launch and little memory.
_CPU_ELEMENTS = 1 << 17
_DEVICE_ELEMENTS = 1 << 24


@dataclasses.dataclass(frozen=True, eq=False)
class SecondMomentRms:
    """RMS_t of each parameter that has a gradient and moments, in the order they were given."""

    index: tuple[int, ...]
    """Places of these parameters among those given."""
    numel: tuple[int, ...]
    """Elements of each; of a distributed tensor, of the shard in this process."""
    sumsq: Tensor
    """(P,) float64, sums of g^2 / max(v, eps^2): with `numel`, what ranks add up over shards."""

    @property
    def rms(self) -> Tensor:
        """(P,) RMS_t per parameter; about 1 when all is well."""
        numel = torch.tensor(self.numel, dtype=torch.float64).clamp(min=1.0)
        return (self.sumsq / numel.to(self.sumsq.device, non_blocking=True)).sqrt()

    @property
    def total(self) -> Tensor:
        """() RMS_t over all elements of all parameters together."""
        return (self.sumsq.sum() / max(sum(self.numel), 1)).sqrt()


class _Entry(NamedTuple):
    """One parameter with all that its RMS_t takes; tensors are flat."""

    place: int
    step: Tensor
    tensors: dict[str, Tensor]


class _Piece(NamedTuple):
    """A part of one parameter."""

    owner: int
    """Place of its entry in the batch."""
    start: int
    end: int


def why_no_second_moments(optimizer: torch.optim.Optimizer) -> str | None:
    """In plain words, why `second_moment_rms` cannot read this optimizer; None if it can.

    Subclasses of the known ones count as known.
    """
    name = type(optimizer).__name__
    if not isinstance(optimizer, _WITH_SECOND_MOMENTS):
        accepted = ", ".join(known.__name__ for known in _WITH_SECOND_MOMENTS)
        reasons = (why for known, why in _WHY_NOT if isinstance(optimizer, known))
        return f"{name} is not known: {next(reasons, 'not an Adam of torch')}; accepted: {accepted}"
    if any(isinstance(group["betas"][1], Tensor) for group in optimizer.param_groups):
        return f"{name} has a tensor as beta2; accepted: a float"
    return None


def second_moment_rms(
    optimizer: torch.optim.Optimizer,
    parameters: Iterable[Tensor],
    *,
    is_stepped: bool,
    grad_scale: Tensor | None = None,
) -> SecondMomentRms:
    """How far the gradients outgrow the second moments that are to tame them.

    RMS_t = sqrt(mean(g_t^2 / max(v_t, eps^2)))
    v_t = (beta2 u_{t-1} + (1 - beta2) g_t^2) / (1 - beta2^t), u the optimizer's exp_avg_sq

    v_t is the bias-corrected second moment WITH the present gradient in it (the paper folds the
    correction into beta2, which is the same number); with amsgrad, its running maximum, by which
    the optimizer divides. g_t is what the optimizer takes in: with coupled weight decay gradient +
    weight_decay * parameter (after the step with the parameter as it is then, which is off by one
    update of it). eps is the parameter group's.

    Args:
        optimizer: one that `why_no_second_moments` has nothing against.
        parameters: whose RMS_t; those without a gradient, in no group, or not stepped before are
            left out.
        is_stepped: whether the optimizer has taken in these gradients. Before the step, v_t is
            what the step will make of it: the number is the same, one step earlier.
        grad_scale: () what the gradients are still to be divided by. Fused optimizers divide by
            theirs, and write the quotient back: after their step there is nothing left to divide.
    Returns:
        Tensors on the gradients' device. 0 where every update so far was withheld; NaN where the
        gradient is not finite.
    Raises:
        TypeError: an optimizer that is not known, in the words of `why_no_second_moments`.
    Cost:
        Some six passes over gradient and second moment in multi-tensor kernels, no
        synchronisation. Working memory: up to four copies of 16 million elements.
    Source:
        Wortsman et al. 2023, arXiv 2304.13013, StableAdamW and what precedes loss spikes.
    """
    why = why_no_second_moments(optimizer)
    if why is not None:
        raise TypeError(f"optimizer: {why}")
    with torch.no_grad():
        batches = list(_batches(optimizer, parameters))
        sums = [_sums_of_ratios(g, entries, is_stepped, grad_scale) for g, entries in batches]
        together = _on_one_device(sums)
        entries = [entry for _, batch in batches for entry in batch]
        order = sorted(range(len(entries)), key=lambda i: entries[i].place)
        if order != list(range(len(order))):
            together = together[torch.tensor(order).to(together.device, non_blocking=True)]
    index = tuple(entries[i].place for i in order)
    numel = tuple(entries[i].tensors["gradient"].numel() for i in order)
    return SecondMomentRms(index, numel, together)


def weight_decays(
    optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor]
) -> tuple[float, ...]:
    """Weight decay of each parameter, from its own parameter group.

    Returns:
        0 for a parameter that the optimizer does not have; NaN where its group names no weight
        decay.
    """
    decay = {
        id(p): float(group.get("weight_decay", math.nan))
        for group in optimizer.param_groups
        for p in group["params"]
    }
    return tuple(decay.get(id(p), 0.0) for p in parameters)


def muon_ratio(sigma_max: Tensor | Sequence[float], weight_decay: Sequence[float]) -> Tensor:
    """How much of the room that weight decay leaves a matrix fills.

    rho = weight_decay * sigma_max

    An update of spectral norm lr against a decoupled decay of lr * weight_decay * sigma_max keeps
    sigma_max under 1 / weight_decay: rho is below 1 and rises to it. With coupled decay, or updates
    of another norm, only its trend means something.

    Args:
        sigma_max: (M,) largest singular values.
        weight_decay: (M,) decay of the same matrices, from `weight_decays`.
    Returns:
        (M,) on sigma_max's device; no synchronisation.
    Raises:
        ValueError: not as many of the one as of the other.
    Source:
        Chen, Li and Liu 2025, arXiv 2506.15054 (Muon holds |W|_2 <= 1 / weight_decay).
    """
    sigma = (
        sigma_max if isinstance(sigma_max, Tensor) else torch.tensor(sigma_max, dtype=torch.float64)
    )
    decay = torch.tensor(weight_decay, dtype=sigma.dtype)
    if decay.shape != sigma.shape:
        raise ValueError(
            f"weight_decay holds {len(weight_decay)} values; accepted: one per value of sigma_max, "
            f"whose shape is {tuple(sigma.shape)}"
        )
    return sigma * decay.to(sigma.device, non_blocking=True)


def _batches(
    optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor]
) -> Iterator[tuple[dict[str, Any], list[_Entry]]]:
    """The parameters that can be read, by group and device."""
    place = {id(p): i for i, p in enumerate(parameters)}
    for group in optimizer.param_groups:
        by_device: dict[torch.device, list[_Entry]] = {}
        for p in group["params"]:
            state = optimizer.state.get(p) or {}
            if id(p) not in place or p.grad is None or "exp_avg_sq" not in state:
                continue
            given = {"parameter": p, "gradient": p.grad}
            given |= {key: state[key] for key in _MOMENTS if key in state}
            flat = {name: local_numbers(tensor).reshape(-1) for name, tensor in given.items()}
            entry = _Entry(place[id(p)], torch.as_tensor(state["step"]), flat)
            by_device.setdefault(flat["gradient"].device, []).append(entry)
        for batch in by_device.values():
            yield group, batch


def _in_turns(batch: list[_Entry]) -> Iterator[list[_Piece]]:
    """The parameters of a batch in pieces, small enough a handful of them at a time."""
    is_on_cpu = batch[0].tensors["gradient"].device.type == "cpu"
    limit = _CPU_ELEMENTS if is_on_cpu else _DEVICE_ELEMENTS
    turn: list[_Piece] = []
    held = 0
    for owner, entry in enumerate(batch):
        numel = entry.tensors["gradient"].numel()
        for start in range(0, max(numel, 1), limit):  # an empty one too has a sum
            end = min(start + limit, numel)
            turn.append(_Piece(owner, start, end))
            held += end - start
            if held >= limit:
                yield turn
                turn, held = [], 0
    if turn:
        yield turn


def local_numbers(tensor: Tensor) -> Tensor:
    """Real numbers in this process: of a distributed tensor its shard."""
    distributed: Any = sys.modules.get("torch.distributed.tensor")
    if distributed is not None and isinstance(tensor, distributed.DTensor):
        tensor = tensor.to_local()
    return torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()


def _sums_of_ratios(
    group: dict[str, Any], batch: list[_Entry], is_stepped: bool, grad_scale: Tensor | None
) -> Tensor:
    """(len(batch),) sums of g^2 / max(v, eps^2), v = u / c, as c g^2 / max(u, c eps^2)."""
    is_double = any(entry.tensors["gradient"].dtype is torch.float64 for entry in batch)
    dtype = torch.float64 if is_double else torch.float32  # half precision does not hold eps^2
    beta2 = float(group["betas"][1])
    steps = torch.stack([entry.step for entry in batch]).double() + (0 if is_stepped else 1)
    # Against cancellation: 1 - beta2^t loses four digits of float32 in the first steps.
    correction = -torch.expm1(steps * math.log(max(beta2, sys.float_info.min)))
    correction = correction.to(batch[0].tensors["gradient"].device, non_blocking=True)
    # eps^2 may underflow, and 0 / 0 is no ratio.
    floors = (correction * float(group["eps"]) ** 2).clamp(min=torch.finfo(dtype).tiny)
    # No update was made yet: any finite sum will do, as it is multiplied by 0.
    floor = floors.masked_fill(correction == 0, 1.0).to(dtype).unbind()
    sums: list[Tensor] = []
    pieces_of = [0] * len(batch)
    for turn in _in_turns(batch):
        gradients = _gradients_taken_in(group, batch, turn, grad_scale, dtype)
        moments = _moments(group, batch, turn, gradients, is_stepped)
        divisors = torch._foreach_maximum(moments, [floor[piece.owner] for piece in turn])
        ratios = torch._foreach_div(gradients, divisors)
        sums.append(_sums_of_products(ratios, gradients))
        for piece in turn:
            pieces_of[piece.owner] += 1
    together = torch.cat(sums)
    if len(together) > len(batch):
        together = torch.stack([pieces.sum() for pieces in together.split(pieces_of)])
    return together * correction


def _gradients_taken_in(
    group: dict[str, Any],
    batch: list[_Entry],
    turn: list[_Piece],
    grad_scale: Tensor | None,
    dtype: torch.dtype,
) -> list[Tensor]:
    """The gradients as they enter the moments."""
    gradients = _cut("gradient", batch, turn, dtype)
    if grad_scale is not None:
        scale = grad_scale.to(gradients[0].device, dtype, non_blocking=True)
        gradients = list(torch._foreach_div(gradients, scale))
    if group.get("weight_decay") and not group.get("decoupled_weight_decay"):
        decay = float(group["weight_decay"]) * (-1.0 if group.get("maximize") else 1.0)
        parameters = _cut("parameter", batch, turn, dtype)
        gradients = list(torch._foreach_add(gradients, parameters, alpha=decay))
    return gradients


def _moments(
    group: dict[str, Any],
    batch: list[_Entry],
    turn: list[_Piece],
    gradients: list[Tensor],
    is_stepped: bool,
) -> list[Tensor]:
    """The second moments with these gradients in them, not corrected for their start from 0."""
    dtype = gradients[0].dtype
    moments = _cut("exp_avg_sq", batch, turn, dtype)
    if not is_stepped:
        beta2 = float(group["betas"][1])
        moments = list(torch._foreach_mul(moments, beta2))
        torch._foreach_addcmul_(moments, gradients, gradients, value=1.0 - beta2)
    if group.get("amsgrad"):
        largest = _cut("max_exp_avg_sq", batch, turn, dtype)
        moments = list(torch._foreach_maximum(moments, largest))
    return moments


def _cut(key: str, batch: list[_Entry], turn: list[_Piece], dtype: torch.dtype) -> list[Tensor]:
    return [batch[p.owner].tensors[key][p.start : p.end].to(dtype) for p in turn]


def _sums_of_products(ratios: tuple[Tensor, ...], gradients: list[Tensor]) -> Tensor:
    """(len(ratios),) float64, sums of what is never negative; the ratios are used up."""
    if ratios[0].device.type == "cpu":
        # A multi-tensor norm adds element by element in float32 there: 0.6 % off after 1e8.
        pairs = zip(ratios, gradients, strict=True)
        return torch.stack([torch.dot(ratio, gradient) for ratio, gradient in pairs]).double()
    torch._foreach_mul_(ratios, gradients)
    return torch.stack(list(torch._foreach_norm(ratios, 1))).double()


def _on_one_device(sums: list[Tensor]) -> Tensor:
    """All in one tensor, on an accelerator if any is: the way to there needs no wait."""
    if not sums:
        return torch.zeros(0, dtype=torch.float64)
    target = next((s.device for s in sums if s.device.type != "cpu"), sums[0].device)
    return torch.cat([s.to(target, non_blocking=True) for s in sums])
