"""Small models, and data they know."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from foreshock.surprise import SurpriseProbe, fit


def mlp() -> nn.Module:
    """16 -> 24 -> 24 -> 4, with dropout, which a probe has to switch off."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(16, 24),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(24, 24),
        nn.ReLU(),
        nn.Linear(24, 4),
    )


def data(samples: int = 400, seed: int = 0) -> Tensor:
    """(samples, 16): two thirds of it near one of 4 places."""
    random = torch.Generator().manual_seed(seed)
    places = 3 * torch.randn(4, 16, generator=torch.Generator().manual_seed(7))
    which = torch.randint(4, (samples,), generator=random)
    return places[which] + torch.randn(samples, 16, generator=random)


def fitted(model: nn.Module | None = None, **options: object) -> SurpriseProbe:
    """A probe of few codes."""
    return fit(model or mlp().eval(), data().split(50), **{"codes": 8, **options})  # type: ignore[arg-type]


class Tagger(nn.Module):
    """Tokens (N, T) to classes of each; with `is_sequence_first` (T, N)."""

    def __init__(self, *, is_sequence_first: bool = False) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.embedding = nn.Embedding(20, 12)
        self.mixer = nn.GRU(12, 12, batch_first=not is_sequence_first)
        self.inner = nn.Linear(12, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden: Tensor = self.head(self.inner(self.mixer(self.embedding(input_ids))[0]).relu())
        return hidden


def tokens(samples: int = 300, length: int = 10, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(N, T) of the first 10 tokens of 20, and where they are not padding."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(10, (samples, length), generator=random)
    lengths = torch.randint(3, length + 1, (samples, 1), generator=random)
    mask = torch.arange(length) < lengths
    return ids.where(mask, 19), mask
