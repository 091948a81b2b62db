"""health_scan in CUDA C++ (csrc/health_scan/cuda.cu): one launch, whatever is in the list."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from foreshock.ops._backend import load_kernels
from foreshock.ops._device import bind_launch, why_no_cuda
from foreshock.ops.health_scan.device_table import DeviceTable


def why_unavailable(device_type: str) -> str | None:
    """What keeps this implementation from tensors of a device; None if nothing does."""
    return why_no_cuda(device_type)


@functools.cache
def _load_kernel(index: int) -> Any:
    """`scan_cuda`, its machine code loaded: that must not be left to a graph's capture."""
    kernels = load_kernels()
    if isinstance(kernels, str):
        raise RuntimeError(kernels)
    scan_cuda = kernels.health_scan_cuda
    with torch.cuda.device(index):
        scan_cuda(0, 0, 0, 0, 0, 0, 0)
    return scan_cuda


def bind(tensors: list[torch.Tensor | None], packed: torch.Tensor) -> Callable[[], object]:
    """Returns a call that scans these tensors into `packed`, (T, 6); see `HealthStats.packed`.

    The call owns what it needs but the tensors' memory, which the caller keeps alive. It launches
    one kernel on the current stream, and may be captured into a graph, for which it must be kept.
    Two calls at the same time on different streams would write to the same memory. A tensor of more
    than four dimensions that cannot be coalesced costs a device copy of its own at each call.
    """
    if not tensors:
        return lambda: None
    table = DeviceTable(tensors, packed.device)
    chunks = len(table.owners)
    partial_rows = torch.empty(chunks, 6, dtype=torch.float64, device=packed.device)
    scan_cuda = functools.partial(
        _load_kernel(packed.get_device()),
        table.rows.data_ptr(),
        table.owners.data_ptr(),
        chunks,
        partial_rows.data_ptr(),
        table.tickets.data_ptr(),
        packed.data_ptr(),
    )

    def launch(stream: int) -> None:
        table.refresh_copies()
        scan_cuda(stream)

    return bind_launch(launch, [*table.memory, partial_rows, packed], packed.device)
