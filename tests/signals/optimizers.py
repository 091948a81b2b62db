"""Optimizers that the room knows, and parameters for them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Make = Callable[[list[Tensor]], torch.optim.Optimizer]

# With coupled decay the step moves what enters g: a learning rate of 0 keeps numbers comparable.
KNOWN: dict[str, Make] = {
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "Adam-coupled-decay": lambda p: torch.optim.Adam(p, lr=0.0, weight_decay=0.3),
    "Adam-maximize": lambda p: torch.optim.Adam(p, lr=0.0, weight_decay=0.3, maximize=True),
    "Adam-amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "AdamW-amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "AdamW-fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "AdamW-large-eps": lambda p: torch.optim.AdamW(p, lr=1e-2, eps=0.5, betas=(0.9, 0.95)),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-3),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=1e-3),
}


def make_parameters(*, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(17, 5), (9,), (), (3, 4, 5)]
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def set_gradients(parameters: list[Tensor], size: float = 1.0) -> None:
    for p in parameters:
        p.grad = torch.randn(p.shape) * size
