"""scikit-learn's digits, and inputs that are none; nothing is downloaded.

Images are (N, 64) float32 in [0, 1]: 8 x 8 pixels in rows.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.ood.extras import imported

SIDE = 8
Images = NDArray[np.float64]


def digits() -> tuple[Tensor, Tensor]:
    """All 1797 digits, (N, 64), and which digit each is, (N,)."""
    datasets = imported("sklearn.datasets", "surprise")
    images, labels = datasets.load_digits(return_X_y=True)
    return _flat(images / 16), torch.from_numpy(labels).long()


def patches(count: int, seed: int) -> Tensor:
    """Patches of scikit-learn's two photographs, in grey, each photograph giving half of them."""
    imported("PIL", "plots")
    photographs = imported("sklearn.datasets", "surprise").load_sample_images().images
    rng = np.random.default_rng(seed)
    greys = [photograph.mean(2) / 255 for photograph in photographs]
    found = []
    for i in range(count):
        grey = greys[i % len(greys)]
        row, column = (rng.integers(size - SIDE + 1) for size in grey.shape)
        found.append(grey[row : row + SIDE, column : column + SIDE])
    return _flat(np.stack(found))


def noise(count: int, seed: int) -> Tensor:
    """Every pixel uniform and independent."""
    return _flat(np.random.default_rng(seed).random((count, SIDE, SIDE)))


def rotated(images: Tensor, seed: int) -> Tensor:
    """Each turned by its own angle, uniform from 45 to 315 degrees."""
    rotate = imported("scipy.ndimage", "surprise").rotate
    angles = iter(np.random.default_rng(seed).uniform(45, 315, len(images)))
    return _each(images, lambda image: rotate(image, next(angles), reshape=False, order=1))


def noised(images: Tensor, seed: int, sigma: float = 0.3) -> Tensor:
    """With Gaussian noise of this deviation, cut to [0, 1]."""
    rng = np.random.default_rng(seed)
    return _each(images, lambda image: image + rng.normal(0, sigma, image.shape))


def blurred(images: Tensor, sigma: float) -> Tensor:
    """By a Gaussian of this deviation, in pixels."""
    blur = imported("scipy.ndimage", "surprise").gaussian_filter
    return _each(images, lambda image: blur(image, sigma))


def _each(images: Tensor, change: Callable[[Images], Images]) -> Tensor:
    squares = images.double().numpy().reshape(-1, SIDE, SIDE)
    return _flat(np.stack([change(image) for image in squares]))


def _flat(images: Images) -> Tensor:
    clipped = np.clip(images, 0, 1).reshape(len(images), SIDE * SIDE)
    return torch.from_numpy(clipped.astype(np.float32))
