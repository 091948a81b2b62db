"""Same-process probes of what the machine can do."""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch


@functools.cache
def _library() -> ctypes.CDLL:
    folder = tempfile.mkdtemp(prefix="foreshock-probe-")
    built = Path(folder) / "probe.so"
    source = Path(__file__).parent / "probe.cpp"
    compiler = os.environ.get("CXX", "c++")
    flags = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, str(source), "-o", str(built)], check=True)
    library = ctypes.CDLL(str(built))
    library.read_all.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    library.read_all.restype = ctypes.c_uint64
    library.multiply_and_exponentiate.argtypes = [ctypes.c_int64] * 3
    library.multiply_and_exponentiate.restype = ctypes.c_float
    return library


def read_probe(tensors: list[torch.Tensor]) -> Callable[[], object]:
    """Reads every byte of contiguous host tensors, on torch's threads."""
    library = _library()
    spans = [(t.data_ptr(), t.nbytes // 8) for t in tensors]
    numbers = tensors[0].flatten().view(torch.uint8)[: tensors[0].nbytes // 8 * 8].view(torch.int64)
    expected = int(numbers.sum()) % 2**64
    assert library.read_all(spans[0][0], len(numbers)) == expected

    def read() -> None:
        for address, words in spans:
            library.read_all(address, words)

    return read


def multiply_and_exponentiate_probe(
    n: int, d: int, k: int, passes: int, exponentials: int
) -> Callable[[], object]:
    """For N x K pairs, so many passes of a subtraction and an FMA for each of D features, and so
    many exponentials; on torch's threads, without memory."""
    call = _library().multiply_and_exponentiate
    return lambda: call(n * k, passes * d, exponentials)


def copy_probe(num_bytes: int, device: str) -> Callable[[], object]:
    """Copies on a device; moves twice `num_bytes` (read and written)."""
    source = torch.randint(0, 255, (num_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)
