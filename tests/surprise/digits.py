"""Half of the digits to learn, the other half to be surprised at."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

EPOCHS = 40


@dataclasses.dataclass(frozen=True)
class Trained:
    """A network for five classes, and who has seen what."""

    model: nn.Module
    train: Tensor
    test: Tensor
    near: Tensor
    """The other five classes."""

    @property
    def loader(self) -> list[Tensor]:
        """The training data in batches."""
        return list(self.train.split(64))

    def far(self, seed: int) -> dict[str, Tensor]:
        """What is no digit."""
        random = torch.Generator().manual_seed(seed)
        return {
            "uniform": torch.rand(400, 64, generator=random),
            "gaussian": torch.randn(400, 64, generator=random),
            "inverted": 1 - self.test,
        }


def auroc(normal: Tensor, strange: Tensor) -> float:
    """In percent; strange samples are the positives."""
    labels = np.repeat([0, 1], [len(normal), len(strange)])
    return 100 * float(roc_auc_score(labels, torch.cat([normal, strange]).numpy()))


@functools.cache
def train(seed: int, *, is_random: bool = False) -> Trained:
    """MLP 64-128-128-5 on classes 0 to 4, or on five at random; 70 % of their samples."""
    random = np.random.default_rng(seed)
    classes = np.sort(random.permutation(10)[:5]) if is_random else np.arange(5)
    images, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(images / 16, dtype=torch.float32)
    known = random.permutation(np.flatnonzero(np.isin(labels, classes)))
    begin = int(0.7 * len(known))
    targets = torch.from_numpy(np.searchsorted(classes, labels[known[:begin]]))
    x = pixels[known[:begin]]
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 5)
    )
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), targets[batch]).backward()
            optimizer.step()
    near = pixels[~np.isin(labels, classes)]
    return Trained(model.eval(), x, pixels[known[begin:]], near)
