"""How far the rotations of gates are from being rotations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from foreshock.gates.attachment import gates_of
from foreshock.gates.exponential import by_parts
from foreshock.gates.gate import SO8RotationGate
from foreshock.gates.rotation import BLOCK, SharedRotations


def orthogonality_loss(model: nn.Module | Iterable[SO8RotationGate]) -> Tensor:
    """The mean over all blocks of all gates of |R^T R - I|_F^2.

    Made of exponentials rotations are orthogonal whatever theta is: this is a tripwire more than a
    regulariser, some 1e-14, and its gradient is rounding.

    Args:
        model: with gates, or some gates.
    Returns:
        (), float64, on the device of the first gate; gradients flow to the thetas.
    Raises:
        ValueError: there are no gates.
    Cost:
        A product of the blocks; the rotations are those of the forward.
    """
    gates = _listed(model)
    share(gates)
    blocks = torch.cat([gate.rotation().to(gates[0].theta.device).double() for gate in gates])
    return _excess(blocks).square().sum((-2, -1)).mean()


@torch.no_grad()
def measure(gates: Sequence[SO8RotationGate]) -> Tensor:
    """Four numbers of each gate, from one computation for all of them.

    orthogonality_max and orthogonality_mean of |R^T R - I|_F over its blocks, the det(R) that is
    furthest from 1, sigmoid(alpha).

    Args:
        gates: at least one; best those that share their rotations, see `share`.
    Returns:
        (G, 4), float64, on the device of the first gate; NaN where theta is not finite.
    Cost:
        A product and a determinant of the blocks of all gates; the rotations are those that the
        last forward has used, if there was one since thetas changed. Nothing is waited for.
    """
    device = gates[0].theta.device
    rotations = [gate.shared.last_rotation_of(gate).to(device) for gate in gates]
    errors, dets = by_parts(_errors_and_dets, torch.cat(rotations)).unbind(1)
    sizes = torch.tensor([len(one) for one in rotations], device=device)
    owner = torch.repeat_interleave(torch.arange(len(gates), device=device), sizes)

    def over_blocks(values: Tensor, reduction: str) -> Tensor:
        none = values.new_zeros(len(gates))
        return none.scatter_reduce(0, owner, values, reduction, include_self=False)

    low, high = over_blocks(dets, "amin"), over_blocks(dets, "amax")
    alphas = torch.stack([gate.alpha.detach().to(device).double() for gate in gates])
    found = [
        over_blocks(errors, "amax"),
        over_blocks(errors, "mean"),
        torch.where((low - 1).abs() > (high - 1).abs(), low, high),
        torch.sigmoid(alphas),
    ]
    return torch.stack(found, 1)


def share(gates: Sequence[SO8RotationGate]) -> None:
    """Has gates compute their rotations together, which those of one `attach` do already."""
    if len({id(gate.shared) for gate in gates}) > 1:
        shared = SharedRotations()
        for gate in gates:
            gate.join(shared)


def _errors_and_dets(blocks: Tensor) -> Tensor:
    blocks = blocks.double()
    errors = torch.linalg.vector_norm(_excess(blocks), dim=(-2, -1))
    return torch.stack([errors, torch.linalg.det(blocks)], 1)


def _excess(blocks: Tensor) -> Tensor:
    eye = torch.eye(BLOCK, device=blocks.device, dtype=blocks.dtype)
    return blocks.mT @ blocks - eye


def _listed(model: nn.Module | Iterable[SO8RotationGate]) -> list[SO8RotationGate]:
    gates = list(gates_of(model).values() if isinstance(model, nn.Module) else model)
    if not gates:
        raise ValueError("model has no gates; accepted: one after attach(model)")
    return gates
