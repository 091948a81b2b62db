"""Tiny data sets, written byte by byte in the formats of their official sites."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from PIL import Image

PLANE = 32 * 32


def cifar_record(labels: list[int], pixels: np.ndarray) -> bytes:
    """Label bytes, then the red plane, the green, the blue; pixels is (3, 32, 32)."""
    return bytes(labels) + b"".join(plane.astype(np.uint8).tobytes() for plane in pixels)


def striped(label: int, rng: np.random.Generator) -> np.ndarray:
    """(3, 32, 32): a class that can be learned from its color."""
    noise = rng.integers(0, 60, (3, 32, 32))
    noise[label % 3] += 60 + 30 * (label // 3)
    return noise


def write_cifar10(folder: Path, per_file: int = 40, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for name in [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]:
        labels = [i % 10 for i in range(per_file)]
        data = b"".join(cifar_record([label], striped(label, rng)) for label in labels)
        (folder / name).write_bytes(data)
    return folder


def write_cifar100(folder: Path, count: int = 30) -> Path:
    rng = np.random.default_rng(1)
    folder.mkdir(parents=True)
    for name in ("train.bin", "test.bin"):
        records = (cifar_record([i % 20, i % 100], striped(i, rng)) for i in range(count))
        (folder / name).write_bytes(b"".join(records))
    return folder


def mat_element(kind: int, data: bytes) -> bytes:
    """A data element of a level 5 MAT-file: type, size, data, padding to 8 bytes."""
    return struct.pack("<II", kind, len(data)) + data + b"\0" * (-len(data) % 8)


def mat_array(name: str, array: np.ndarray) -> bytes:
    """A numeric array of bytes: flags, dimensions, name, then the data by columns."""
    flags = mat_element(6, struct.pack("<II", 9, 0))  # miUINT32: class mxUINT8
    shape = mat_element(5, struct.pack(f"<{array.ndim}i", *array.shape))
    title = mat_element(1, name.encode())
    values = mat_element(2, array.astype(np.uint8).tobytes(order="F"))
    return mat_element(14, flags + shape + title + values)


def write_mat(path: Path, **arrays: np.ndarray) -> None:
    """An uncompressed level 5 MAT-file."""
    header = b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack("<H", 0x0100) + b"IM"
    path.write_bytes(header + b"".join(mat_array(name, a) for name, a in arrays.items()))


def write_svhn(folder: Path, count: int = 30) -> Path:
    rng = np.random.default_rng(2)
    folder.mkdir(parents=True)
    pixels = rng.integers(0, 256, (32, 32, 3, count))
    labels = np.arange(count)[:, None] % 10 + 1
    write_mat(folder / "test_32x32.mat", X=pixels, y=labels)
    return folder


def write_dtd(folder: Path, per_class: int = 10) -> Path:
    rng = np.random.default_rng(3)
    for name in ("banded", "dotted", "woven"):
        (folder / "images" / name).mkdir(parents=True)
        for i in range(per_class):
            texture = rng.integers(0, 256, (48, 80, 3), dtype=np.uint8)
            Image.fromarray(texture).save(folder / "images" / name / f"{name}_{i:04}.jpg")
    return folder
