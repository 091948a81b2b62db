"""From thetas to rotations: of one gate, or of all gates of a model in one computation."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from foreshock.gates.exponential import exponential, pulled_back

BLOCK = 8
"""Rows and columns of a rotation."""


class HasTheta(Protocol):
    """What rotations can be made for."""

    theta: nn.Parameter


def rotation_of(theta: Tensor) -> Tensor:
    """The rotations of skew-symmetric generators.

    R = expm(theta - theta^T), in float64, rounded to float32, or the dtype of theta if it is wider.

    In float32 the exponential itself would be off by more than 1e-6 in |R^T R - I|_F where theta
    is of norm 1, and by 1e-5 at 10; rounded, it is off by less than 5e-7 at any norm.

    Args:
        theta: (..., 8, 8).
    Returns:
        (..., 8, 8). Where theta is not finite, neither is its rotation.
    Cost:
        One `torch.linalg.matrix_exp`, and torch's derivative of it; gates that share their
        rotations have a cheaper one.
    Source:
        Rotations as exponentials of so(8).
    """
    rotation: Tensor = torch.linalg.matrix_exp(_skew(theta))
    return rotation.to(_dtype_for(theta))


def _dtype_for(theta: Tensor) -> torch.dtype:
    return torch.promote_types(theta.dtype, torch.float32)


def _skew(theta: Tensor) -> Tensor:
    theta = theta.double()
    return theta - theta.mT


class _Use:
    """Whether a backward pass has gone through a batch: then its thetas are about to change, and
    not every optimizer lets that be seen."""

    is_over = False


class _Rotations(torch.autograd.Function):
    """`rotation_of` of several thetas, through which backward may go as often as it likes.

    A graph of torch's own is gone after one backward pass. These rotations are used by all
    forwards until thetas change, each of which may have a backward pass of its own.
    """

    @staticmethod
    def forward(ctx: Any, use: _Use, *thetas: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.use, ctx.dtype = use, thetas[0].dtype
        ctx.sizes = [len(theta) for theta in thetas]
        ctx.skew = torch.cat([_skew(theta) for theta in thetas])  # ours, so nobody writes to it
        return tuple(exponential(ctx.skew).to(_dtype_for(thetas[0])).split(ctx.sizes))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.use.is_over = True
        found: list[Tensor | None] = [None] * len(grads)
        wanted = [
            (i, grad)
            for i, grad in enumerate(grads)
            if grad is not None and ctx.needs_input_grad[i + 1]
        ]
        if wanted:
            skews = ctx.skew.split(ctx.sizes)
            skew = torch.cat([skews[i] for i, _ in wanted])
            of_skew = pulled_back(skew, torch.cat([grad for _, grad in wanted]).double())
            of_thetas = (of_skew - of_skew.mT).split([ctx.sizes[i] for i, _ in wanted])
            for (i, _), of_theta in zip(wanted, of_thetas, strict=True):
                found[i] = of_theta.to(ctx.dtype)
        return None, *found


class _Mark(NamedTuple):
    """By which a theta is known to be what it was."""

    identity: int
    address: int
    version: int
    requires_grad: bool

    @classmethod
    def of(cls, theta: Tensor) -> _Mark:
        return cls(id(theta), theta.data_ptr(), theta._version, theta.requires_grad)


@dataclasses.dataclass(frozen=True)
class _Found:
    """Rotations as they were computed, by the identity of their gates."""

    rotations: dict[int, Tensor]
    marks: dict[int, _Mark]
    use: _Use
    has_graph: bool
    is_inference: bool

    def holds(self, gate: HasTheta) -> bool:
        """Whether the gate's theta is, as far as can be seen, what it was."""
        mark = self.marks.get(id(gate))
        return mark is not None and mark == _Mark.of(gate.theta)

    def serves(self, gate: HasTheta) -> bool:
        """Whether a forward of now may use them."""
        needs_graph = torch.is_grad_enabled() and gate.theta.requires_grad
        return (
            self.holds(gate)
            and not self.use.is_over
            and (self.has_graph or not needs_graph)
            and (not self.is_inference or torch.is_inference_mode_enabled())
        )


class SharedRotations:
    """The rotations of several gates, computed together, and kept until a theta changes.

    They are made anew when a theta was written to or replaced, and after each backward pass that
    went through them: an optimizer may write past torch's sight. What else writes so has to be
    followed by `renew`.

    A gate computes its own where the others' thetas cannot be had or the result cannot be kept:
    under torch.compile, in a CUDA graph, where theta is sharded or functional, in replicas. So does
    a copy in its first forward.
    """

    def __init__(self) -> None:
        self._gates: dict[int, weakref.ref[HasTheta]] = {}
        self._found: dict[tuple[torch.device, torch.dtype], _Found] = {}

    def __reduce__(self) -> tuple[type[SharedRotations], tuple[()]]:
        """A copy is empty, and shared by the gates that are copied together."""
        return SharedRotations, ()

    def add(self, gate: HasTheta) -> None:
        """Computes its rotation with those of the others from now on."""
        self._gates[id(gate)] = weakref.ref(gate)

    def renew(self) -> None:
        """Forgets what was computed."""
        self._found.clear()

    def rotation_of(self, gate: HasTheta) -> Tensor:
        """(D/8, 8, 8): the rotation of a gate for a forward of now."""
        if not _can_share(gate.theta):
            return rotation_of(gate.theta)
        if not self._has(gate):
            self.add(gate)
            return rotation_of(gate.theta)
        place = gate.theta.device, gate.theta.dtype
        found = self._found.get(place)
        if found is None or not found.serves(gate):
            found = self._found[place] = _compute(self._gates_at(place))
        return found.rotations[id(gate)]

    @torch.no_grad()
    def last_rotation_of(self, gate: HasTheta) -> Tensor:
        """(D/8, 8, 8), without a graph: as the last forward has used it, if there was one since."""
        if not _can_share(gate.theta):
            return rotation_of(gate.theta.detach())
        found = self._found.get((gate.theta.device, gate.theta.dtype))
        if found is not None and found.holds(gate):
            return found.rotations[id(gate)].detach()
        return self.rotation_of(gate)

    def _has(self, gate: HasTheta) -> bool:
        held = self._gates.get(id(gate))
        return held is not None and held() is gate

    def _gates_at(self, place: tuple[torch.device, torch.dtype]) -> list[HasTheta]:
        held = {key: gate() for key, gate in self._gates.items()}
        self._gates = {key: self._gates[key] for key, gate in held.items() if gate is not None}
        gates = [gate for gate in held.values() if gate is not None and _can_share(gate.theta)]
        return [gate for gate in gates if (gate.theta.device, gate.theta.dtype) == place]


def _compute(gates: Sequence[HasTheta]) -> _Found:
    thetas = [gate.theta for gate in gates]
    use = _Use()
    rotations: tuple[Tensor, ...] = _Rotations.apply(use, *thetas)  # type: ignore[no-untyped-call]
    keys = [id(gate) for gate in gates]
    return _Found(
        dict(zip(keys, rotations, strict=True)),
        {key: _Mark.of(theta) for key, theta in zip(keys, thetas, strict=True)},
        use,
        has_graph=any(rotation.requires_grad for rotation in rotations),
        is_inference=torch.is_inference_mode_enabled(),
    )


def _can_share(theta: Tensor) -> bool:
    if torch.compiler.is_compiling() or type(theta) is not nn.Parameter or theta.is_inference():
        return False
    return not (theta.is_cuda and torch.cuda.is_current_stream_capturing())
