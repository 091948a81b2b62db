"""ResNet-18 for images of 32 x 32 pixels, and how it is trained.

The first convolution is 3 x 3 with stride 1 and no pooling follows it, as usual for CIFAR. The
model takes bytes: scaling them is its first act, so that nothing that looks at it can forget.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MEAN = (0.4914, 0.4822, 0.4465)  # of CIFAR-10's training images, by channel
DEVIATION = (0.2470, 0.2435, 0.2616)


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut, a 1 x 1 convolution where shapes differ."""

    def __init__(self, width_in: int, width_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width_out, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width_out)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or width_in != width_out:
            projection = nn.Conv2d(width_in, width_out, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(width_out))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(inner + self.shortcut(x))


class ResNet18(nn.Module):
    """Four stages of two blocks; `width` channels in the first, twice as many in each that follows.

    Args:
        num_classes: C.
        width: 64 for ResNet-18 proper.
    """

    def __init__(self, num_classes: int, width: int = 64) -> None:
        super().__init__()
        self.register_buffer("mean", 255 * torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        scale = 255 * torch.tensor(DEVIATION).view(3, 1, 1)
        self.register_buffer("deviation", scale, persistent=False)
        self.conv = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        self.stage1, self.stage2, self.stage3, self.stage4 = (
            nn.Sequential(
                ResidualBlock(width_in, width_out, stride=1 if i == 0 else 2),
                ResidualBlock(width_out, width_out, stride=1),
            )
            for i, (width_in, width_out) in enumerate(itertools.pairwise(widths))
        )
        self.head = nn.Linear(8 * width, num_classes)

    def features(self, pixels: Tensor) -> Tensor:
        """(N, 8 width): the head's input, from (N, 3, 32, 32) bytes."""
        x = (pixels.float() - self.mean) / self.deviation
        x = F.relu(self.norm(self.conv(x)))
        for stage in (self.stage1, self.stage2, self.stage3, self.stage4):
            x = stage(x)
        return x.mean((2, 3))

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, C) logits, from (N, 3, 32, 32) bytes."""
        return self.head(self.features(pixels))


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a model is made. SGD with Nesterov momentum 0.9, weight decay 5e-4, a cosine."""

    width: int
    epochs: int
    batch_size: int = 128
    learning_rate: float = 0.1


def trained(
    pixels: Tensor, labels: Tensor, recipe: Recipe, seed: int, device: torch.device
) -> ResNet18:
    """A model in eval mode, trained with random crops and flips."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = ResNet18(int(labels.max()) + 1, recipe.width).to(device)
        rate, decay = recipe.learning_rate, 5e-4
        optimizer = torch.optim.SGD(
            model.parameters(), rate, momentum=0.9, nesterov=True, weight_decay=decay
        )
        steps = recipe.epochs * -(-len(labels) // recipe.batch_size)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: share(step, steps))
        for _ in range(recipe.epochs):
            for chosen in torch.randperm(len(labels)).split(recipe.batch_size):
                logits = model(augmented(pixels[chosen]).to(device))
                optimizer.zero_grad()
                F.cross_entropy(logits, labels[chosen].to(device)).backward()
                optimizer.step()
                schedule.step()
    return model.eval()


def share(step: int, steps: int) -> float:
    """Of the learning rate: up in a line for a tenth of the steps, then down in a cosine to 0."""
    warm_up = max(1, steps // 10)
    if step < warm_up:
        return (step + 1) / warm_up
    return (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up))) / 2


def augmented(pixels: Tensor, margin: int = 4) -> Tensor:
    """Each image cropped at its own place from a wider, black one, and half of them mirrored."""
    count, _, height, width = pixels.shape
    padded = F.pad(pixels, [margin] * 4)
    top, left = torch.randint(2 * margin + 1, (2, count, 1))
    columns = left + torch.arange(width)
    columns = torch.where(torch.rand(count, 1) < 0.5, columns, columns.flip(1))
    rows = top + torch.arange(height)
    image = torch.arange(count)[:, None, None]
    return padded.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)


@torch.no_grad()
def looked_at(model: ResNet18, pixels: Tensor, batch_size: int = 500) -> tuple[Tensor, Tensor]:
    """(N, D) features and (N, C) logits, on the CPU."""
    device = model.head.weight.device
    features = torch.cat([model.features(x.to(device)).cpu() for x in pixels.split(batch_size)])
    return features, F.linear(features, model.head.weight.cpu(), model.head.bias.cpu())
