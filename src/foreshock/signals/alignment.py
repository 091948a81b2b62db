"""Whether an update went where its gradient pointed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from foreshock.signals.optimizer_state import local_numbers

# Elements worked on at a time: what stays in a CPU's cache, and elsewhere what is worth a launch.
_CPU_ELEMENTS = 1 << 17
_DEVICE_ELEMENTS = 1 << 22

_Triple = tuple[Tensor, Tensor, Tensor]


@dataclasses.dataclass(frozen=True, eq=False)
class UpdateAlignment:
    """Three sums over all elements, g the gradient and u the update; with shards, add them up."""

    dot: Tensor
    """() float64, sum(-g * u)."""
    gradient_sumsq: Tensor
    """() float64, sum(g^2)."""
    update_sumsq: Tensor
    """() float64, sum(u^2)."""

    @property
    def cosine(self) -> Tensor:
        """() from -1 to 1; 0 if either is zero, NaN if either is not finite."""
        lengths = self.grad_norm * self.step_norm
        cosine = (self.dot / lengths).clamp(-1.0, 1.0)
        return torch.where(lengths == 0, torch.zeros_like(cosine), cosine)

    @property
    def grad_norm(self) -> Tensor:
        """() |g|."""
        return self.gradient_sumsq.sqrt()

    @property
    def step_norm(self) -> Tensor:
        """() |u|."""
        return self.update_sumsq.sqrt()


def update_alignment(
    before: Iterable[Tensor],
    after: Iterable[Tensor],
    gradients: Iterable[Tensor | None],
) -> UpdateAlignment:
    """Cosine between the step that was made and the step that the gradient asked for.

    cosine = sum(-g * (after - before)) / (|g| |after - before|), over all parameters together

    1 for plain gradient descent; what momentum, normalisation and weight decay make of it, and the
    rounding of parameters in half precision, show as less.

    Args:
        before: parameters as they were before the step, as copies: the optimizer works in place.
        after: the same parameters after it.
        gradients: those that the optimizer was given; where there is None, the parameter is left
            out. Of distributed tensors the shard in this process is read.
    Returns:
        Sums on the first parameter's device, without a synchronisation.
    Raises:
        TypeError, ValueError: naming the tensor, what was given and what is accepted.
    Cost:
        One read of the three, in pieces that are worked on in double precision: 100 MB of working
        memory on an accelerator, 3 MB on the CPU. The copy before the step is the caller's. It is
        meant for an interval: what it reads is three times the parameters.
    Source:
        foreshock's specification.
    """
    with torch.no_grad():
        batches = _by_device(_checked(list(before), list(after), list(gradients)))
        sums = [s for batch in batches for s in _sums(batch)]
        if not sums:
            return UpdateAlignment(*torch.zeros(3, dtype=torch.float64).unbind())
        target = sums[0].device
        total = torch.stack([s.to(target, non_blocking=True) for s in sums]).sum(0)
    return UpdateAlignment(*total.unbind())


def _sums(batch: Sequence[_Triple]) -> list[Tensor]:
    """(3,) the sums of each few pieces of one device's parameters."""
    limit = _CPU_ELEMENTS if batch[0][0].device.type == "cpu" else _DEVICE_ELEMENTS
    limit = min(limit, sum(len(before) for before, _, _ in batch))
    space = torch.empty((3, limit), dtype=torch.float64, device=batch[0][0].device)
    return [_sums_of_turn(turn, space) for turn in _in_turns(batch, limit)]


def _sums_of_turn(turn: Sequence[_Triple], space: Tensor) -> Tensor:
    sizes = [len(before) for before, _, _ in turn]
    space = space[:, : sum(sizes)]
    for row, tensors in zip(space, zip(*turn, strict=True), strict=True):
        torch._foreach_copy_(row.split(sizes), tensors)
    before, u, g = space
    u -= before
    return torch.stack([-torch.dot(g, u), torch.dot(g, g), torch.dot(u, u)])


def _in_turns(batch: Sequence[_Triple], limit: int) -> Iterator[list[_Triple]]:
    """Pieces of the parameters, a bounded number of elements at a time."""
    turn: list[_Triple] = []
    held = 0
    for triple in batch:
        numel = triple[0].numel()
        start = 0
        while start < numel:
            end = min(start + limit - held, numel)
            before, after, gradient = (t[start:end] for t in triple)
            turn.append((before, after, gradient))
            held += end - start
            start = end
            if held == limit:
                yield turn
                turn, held = [], 0
    if turn:
        yield turn


def _by_device(triples: Iterable[_Triple]) -> list[list[_Triple]]:
    batches: dict[torch.device, list[_Triple]] = {}
    for triple in triples:
        batches.setdefault(triple[0].device, []).append(triple)
    return list(batches.values())


def _checked(
    before: list[Tensor], after: list[Tensor], gradients: list[Tensor | None]
) -> Iterator[_Triple]:
    """The parameters that have a gradient, flat."""
    for name, given in (("after", after), ("gradients", gradients)):
        if len(given) != len(before):
            raise ValueError(
                f"{name} holds {len(given)} tensors; accepted: {len(before)}, as many as before"
            )
    for i, (b, a, g) in enumerate(zip(before, after, gradients, strict=True)):
        if g is None:
            continue
        for name, tensor in (("before", b), ("after", a), ("gradients", g)):
            _check(tensor, f"{name}[{i}]", b)
        flat_b, flat_a, flat_g = (local_numbers(t).reshape(-1) for t in (b, a, g))
        if len(flat_b) and flat_b.data_ptr() == flat_a.data_ptr():
            raise ValueError(
                f"before[{i}] is the memory of after[{i}]; accepted: a copy made before the step"
            )
        yield flat_b, flat_a, flat_g


def _check(tensor: object, name: str, like: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; accepted: a tensor")
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name} has layout {tensor.layout}; accepted: torch.strided")
    if tensor.shape != like.shape or tensor.device != like.device:
        raise ValueError(
            f"{name} is of shape {tuple(tensor.shape)} on {tensor.device}; accepted: "
            f"{tuple(like.shape)} on {like.device}"
        )
