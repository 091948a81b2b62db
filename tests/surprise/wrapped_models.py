"""Small models to be wrapped, and their data."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Twice(nn.Module):
    """Calls one layer twice, and has it under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.same = self.layer

    def forward(self, x: Tensor) -> Tensor:
        return self.same(self.layer(x).relu())


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(inplace=True), nn.Linear(16, 3))


def cnn() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 4, 3, stride=2),
        nn.Flatten(),
        nn.Linear(4 * 3 * 3, 3),
    )


def encoder(batch_first: bool = True) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first)


def rows(count: int = 40, seed: int = 0) -> Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))


def images(count: int = 10, seed: int = 0) -> Tensor:
    return torch.randn(count, 2, 8, 8, generator=torch.Generator().manual_seed(seed))


def sequences(count: int = 5, length: int = 7, seed: int = 0) -> Tensor:
    return torch.randn(count, length, 8, generator=torch.Generator().manual_seed(seed))
