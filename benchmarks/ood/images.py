"""CIFAR-10, CIFAR-100, SVHN and DTD from local folders, in the formats of their official sites.

Nothing is downloaded, and nothing is unpickled: of CIFAR it is the binary version that is read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.ood.extras import imported

SIDE = 32
Split = Literal["train", "test"]


class Images(NamedTuple):
    """N color images and their classes."""

    pixels: Tensor
    """(N, 3, 32, 32) uint8."""
    labels: Tensor
    """(N,) int64, from 0 up."""


def cifar10(folder: Path, split: Split) -> Images:
    """cifar-10-binary.tar.gz, or the folder inside it.

    Raises:
        FileNotFoundError, ValueError: naming the file and what is accepted.
    """
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] if split == "train" else ["test_batch.bin"]
    folder = _unpacked(folder, "cifar-10-batches-bin")
    parts = [_records(folder / name, label_bytes=1, num_classes=10) for name in names]
    return Images(*(torch.cat(part) for part in zip(*parts, strict=True)))


def cifar100(folder: Path, split: Split) -> Images:
    """cifar-100-binary.tar.gz, or the folder inside it; the labels are the fine ones.

    Raises:
        FileNotFoundError, ValueError: naming the file and what is accepted.
    """
    folder = _unpacked(folder, "cifar-100-binary")
    return _records(folder / f"{split}.bin", label_bytes=2, num_classes=100)


def svhn(folder: Path, split: Split) -> Images:
    """train_32x32.mat, test_32x32.mat: cropped digits, where class 10 is the digit 0.

    Raises:
        FileNotFoundError, ValueError: naming the file and what is accepted.
    """
    path = _existing(folder / f"{split}_32x32.mat", "cropped digits in MATLAB's format")
    read = imported("scipy.io", "surprise").loadmat(path, variable_names=["X", "y"])
    missing = {"X", "y"} - read.keys()
    if missing:
        raise ValueError(f"{path} lacks {sorted(missing)}; accepted: X and y")
    pixels, labels = read["X"], read["y"].ravel()
    if pixels.dtype != np.uint8 or pixels.shape[:3] != (SIDE, SIDE, 3) or pixels.ndim != 4:
        raise ValueError(f"X in {path} is {pixels.shape} {pixels.dtype}; accepted: (32, 32, 3, N)")
    _check_labels(path, labels, 1, 10)
    if len(labels) != pixels.shape[3]:
        raise ValueError(f"{path} has {pixels.shape[3]} images and {len(labels)} labels")
    as_stored = torch.from_numpy(np.ascontiguousarray(pixels.transpose(3, 2, 0, 1)))
    return Images(as_stored, torch.from_numpy(labels.astype(np.int64) % 10))


def dtd(folder: Path) -> Images:
    """images/CLASS/NAME.jpg: the middle of each texture, its shorter side made 32 pixels long.

    Raises:
        FileNotFoundError, ValueError: naming the file and what is accepted.
    """
    images = _existing(_unpacked(folder, "dtd") / "images", "the folder that dtd-r1.0.1 brings")
    files = sorted(images.glob("*/*.jpg"))
    if not files:
        raise FileNotFoundError(f"{images} holds no CLASS/NAME.jpg")
    classes = sorted({file.parent.name for file in files})
    labels = [classes.index(file.parent.name) for file in files]
    return Images(torch.stack([_middle(file) for file in files]), torch.tensor(labels))


def _middle(path: Path) -> Tensor:
    image_module, ops = imported("PIL.Image", "plots"), imported("PIL.ImageOps", "plots")
    try:
        with image_module.open(path, formats=["JPEG"]) as image:
            fitted = ops.fit(image.convert("RGB"), (SIDE, SIDE), image_module.Resampling.BICUBIC)
    except OSError as error:
        raise ValueError(f"{path} is no JPEG that can be read: {error}") from error
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1)


def _records(path: Path, label_bytes: int, num_classes: int) -> Images:
    """CIFAR's format: labels, of which the last is taken, then 3 x 32 x 32 bytes of color."""
    data = np.fromfile(_existing(path, "the binary version, which is not the Python one"), np.uint8)
    record = label_bytes + 3 * SIDE * SIDE
    if len(data) == 0 or len(data) % record:
        raise ValueError(f"{path} has {len(data)} bytes; accepted: a multiple of {record}")
    records = torch.from_numpy(data.reshape(-1, record))
    labels = records[:, label_bytes - 1].long()
    _check_labels(path, labels.numpy(), 0, num_classes - 1)
    return Images(records[:, label_bytes:].reshape(-1, 3, SIDE, SIDE), labels)


def _check_labels(path: Path, labels: np.typing.NDArray[np.integer], low: int, high: int) -> None:
    if len(labels) and not (low <= labels.min() and labels.max() <= high):
        found = f"{labels.min()} to {labels.max()}"
        raise ValueError(f"{path} has labels {found}; accepted: {low} to {high}")


def _unpacked(folder: Path, name: str) -> Path:
    """The folder that an archive unpacks to, whether it is this one or inside it."""
    return folder / name if (folder / name).is_dir() else folder


def _existing(path: Path, what: str) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected: {what}")
    return path
