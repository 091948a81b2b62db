"""What every GPU implementation needs: why it cannot run, tables in device memory, a launch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch

from foreshock.ops._backend import load_kernels

Int64s: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]


def why_no_device() -> str | None:
    """What keeps compiled kernels from the CUDA devices of this process; None if nothing does."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return "no CUDA device is visible"
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        if major < 8:
            name = torch.cuda.get_device_name(index)
            return f"{name} has compute capability {major}.{minor}; 8.0 is needed"
    return None


def why_no_triton(device_type: str, is_interpreted: bool) -> str | None:
    """What keeps Triton's kernels from tensors of a device; None if nothing does."""
    if device_type == "cpu":
        return None if is_interpreted else "reads host memory only under TRITON_INTERPRET=1"
    if device_type != "cuda":
        return "reads the memory of CUDA devices only"
    return "under TRITON_INTERPRET=1 reads host memory only" if is_interpreted else why_no_device()


def why_no_cuda(device_type: str) -> str | None:
    """What keeps the extension's CUDA kernels from tensors of a device; None if nothing does."""
    if device_type != "cuda":
        return "reads the memory of CUDA devices only"
    kernels = load_kernels()
    if isinstance(kernels, str):
        return kernels
    if not kernels.has_cuda():
        return "the compiled extension was built without CUDA (no nvcc, or FORESHOCK_CUDA=OFF)"
    return why_no_device()


def as_words(values: Int64s) -> Int64s:
    """Two int32 in each int64."""
    pairs = np.zeros(len(values) + len(values) % 2, np.int32)
    pairs[: len(values)] = values
    return pairs.view(np.int64)


def upload(words: Int64s, target: torch.Tensor) -> None:
    """Copies a table into a tensor, without waiting for the device."""
    source = torch.from_numpy(words)
    if target.device.type == "cuda":
        source = source.pin_memory()
    target.copy_(source, non_blocking=True)


def bind_launch(
    launch: Callable[[int], object], memory: Sequence[torch.Tensor], device: torch.device
) -> Callable[[], object]:
    """Makes `launch(stream)` a call for whichever stream is then the current one of a device.

    Args:
        launch: starts kernels that read and write `memory`.
        memory: what has been prepared on the stream that is the current one now. Another stream
            waits for it once, unless it is being captured: a graph's capture begins after that.
    """
    if device.type != "cuda":
        return lambda: launch(0)
    index = torch.cuda.current_device() if device.index is None else device.index
    home = torch.cuda.current_stream(index)
    known = {home.cuda_stream}
    current_stream = torch._C._cuda_getCurrentRawStream

    def meet(stream: int) -> None:
        if not torch.cuda.is_current_stream_capturing():
            current = torch.cuda.current_stream(index)
            current.wait_stream(home)
            for tensor in memory:
                tensor.record_stream(current)
            known.add(stream)

    def call() -> None:
        stream = current_stream(index)
        if torch.cuda.current_device() != index:
            with torch.cuda.device(index):
                call()
            return
        if stream not in known:
            meet(stream)
        launch(stream)

    return call
