"""A module that turns vectors, eight numbers at a time, and mixes in what it has turned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from foreshock.gates.rotation import BLOCK, SharedRotations, rotation_of

ALPHA_AT_START = -5.0


class SO8RotationGate(nn.Module):
    """Mixes a rotation of its input into it.

    out = x + sigmoid(alpha) (x R - x),  R = expm(theta - theta^T) for each 8 of the last dimension

    R keeps norms and has determinant 1. With theta = 0, as it starts by default, the output is the
    input, bit for bit. theta and alpha stay in float32 where the model is cast to less, and the
    turning is done in float32 at least, under autocast too.

    Args:
        dim: D, the size of the last dimension of inputs; a multiple of 8.
        alpha: where the mixing starts; sigmoid(-5) is 0.0067.
        theta_std: standard deviation of the normal distribution that theta is drawn from.
        device: of the parameters.
        dtype: of the parameters, float32 or float64.
    Attributes:
        theta: (D/8, 8, 8).
        alpha: ().
    Raises:
        ValueError: dim is not a positive multiple of 8, theta_std is below 0, or dtype is another.
    """

    def __init__(
        self,
        dim: int,
        alpha: float = ALPHA_AT_START,
        *,
        theta_std: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        check_dim(dim)
        if not theta_std >= 0:
            raise ValueError(f"theta_std is {theta_std!r}; accepted: 0 or more")
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype is {dtype}; accepted: torch.float32, torch.float64")
        self.dim = dim
        theta = torch.zeros(dim // BLOCK, BLOCK, BLOCK, device=device, dtype=dtype)
        self.theta = nn.Parameter(theta.normal_(std=theta_std) if theta_std else theta)
        self.alpha = nn.Parameter(torch.tensor(float(alpha), device=device, dtype=dtype))
        self.shared = SharedRotations()
        self.shared.add(self)

    def rotation(self) -> Tensor:
        """R (D/8, 8, 8), from which gradients flow to theta."""
        if torch.compiler.is_compiling():
            return rotation_of(self.theta)
        return self.shared.rotation_of(self)

    def mix(self) -> Tensor:
        """(), sigmoid(alpha): how much of the output is turned."""
        return torch.sigmoid(self.alpha)

    def matrix(self) -> Tensor:
        """(D/8, 8, 8): what the gate multiplies by, I + sigmoid(alpha) (R - I)."""
        rotation = self.rotation()
        eye = torch.eye(BLOCK, device=rotation.device, dtype=rotation.dtype)
        return eye + self.mix() * (rotation - eye)

    def forward(self, x: Tensor) -> Tensor:
        """The mixture.

        Args:
            x: (..., D), floating point.
        Returns:
            Like x.
        Raises:
            ValueError: the last dimension of x is not D, or x is not of floating point.
        """
        check_input(x, self.dim)
        with torch.autocast(x.device.type, enabled=False):
            return times_blocks(x, self.matrix())

    def join(self, shared: SharedRotations) -> None:
        """Computes its rotation together with those of other gates."""
        self.shared = shared
        shared.add(self)

    def train(self, mode: bool = True) -> SO8RotationGate:
        """As of any module; what was computed before is forgotten, since averaged weights may be
        put in the place of others where the mode changes."""
        self.shared.renew()
        return super().train(mode)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SO8RotationGate:
        """A cast to a type of less than 32 bits is not followed; a move is."""

        def at_least_float32(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            is_narrow = result.is_floating_point() and result.element_size() < 4
            return tensor.to(result.device) if is_narrow else result

        self.shared.renew()
        super()._apply(at_least_float32, recurse)  # type: ignore[no-untyped-call]
        return self


class ConstantGate(nn.Module):
    """A gate that no longer learns: y = x M for each 8 of the last dimension.

    Args:
        matrix: (D/8, 8, 8); a buffer, which is cast with the model, while products are in float32
            at least.
    """

    matrix: Tensor

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.dim = len(matrix) * BLOCK
        self.register_buffer("matrix", matrix)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D): the product."""
        check_input(x, self.dim)
        wide = torch.promote_types(self.matrix.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return times_blocks(x, self.matrix.to(wide))

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


def check_dim(dim: Any, of: str = "dim") -> None:
    """Raises ValueError unless there are blocks of 8."""
    if not isinstance(dim, int) or isinstance(dim, bool) or dim < BLOCK or dim % BLOCK:
        raise ValueError(f"{of} is {dim!r}, not divisible by {BLOCK}; accepted: a multiple of it")


def check_input(x: Tensor, dim: int) -> None:
    """Raises ValueError unless a gate of this width can turn x."""
    if x.ndim == 0 or x.shape[-1] != dim:
        raise ValueError(f"x has the shape {tuple(x.shape)}; accepted: (..., {dim})")
    if not x.is_floating_point():
        raise ValueError(f"x is {x.dtype}; accepted: floating point")


def times_blocks(x: Tensor, blocks: Tensor) -> Tensor:
    """x (..., K*8) times a matrix with blocks (K, 8, 8) on its diagonal, in the wider dtype."""
    wide = x.to(torch.promote_types(x.dtype, blocks.dtype)).unflatten(-1, (-1, BLOCK))
    product = torch.einsum("...ki,kij->...kj", wide, blocks.to(wide.dtype))
    return product.flatten(-2).to(x.dtype)
