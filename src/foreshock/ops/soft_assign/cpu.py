"""soft_assign in C++ (csrc/soft_assign/cpu.cpp), once for each instruction set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from foreshock.ops._backend import active_isa, load_kernels
from foreshock.ops._tensors import DTYPE_CODES
from foreshock.ops.soft_assign.reference import Saved

_ROWS_PER_TASK = 64
# Multiply-adds, a pair's exponential counted as 16 of them: some 0.1 ms. A second thread that has
# to be woken for less, between the layers of a model, costs more than it takes over.
_WORK_PER_TASK = 1 << 21
_TASKS_PER_THREAD = 4
# Backward, a task has a gradient of all centers. A number of tasks that depends on the rows alone
# makes the sum the same for any number of threads.
_BACKWARD_ROWS_PER_TASK = 512
_MOST_BACKWARD_TASKS = 16


def why_unavailable(device_type: str) -> str | None:
    """What keeps this implementation from tensors of a device; None if nothing does."""
    if device_type != "cpu":
        return "reads the memory of the host only"
    kernels = load_kernels()
    return kernels if isinstance(kernels, str) else None


def _bind(
    name: str,
    x: Tensor,
    centers: Tensor,
    temperature: float,
    eps: float,
    tasks: int,
    isa: str | None,
) -> tuple[Callable[..., Any], Tensor]:
    """A kernel that lacks where to write, and the scratch that it uses."""
    kernels = load_kernels()
    if isinstance(kernels, str):
        raise RuntimeError(kernels)
    code = DTYPE_CODES[x.dtype]
    (rows, features), codes = x.shape, len(centers)
    scratch_bytes = kernels.soft_assign_scratch_bytes(
        code, codes, features, tasks, name == "backward"
    )
    scratch = torch.empty(scratch_bytes, dtype=torch.uint8)
    kernel = getattr(kernels, f"soft_assign_{name}_{isa or active_isa()}")
    places = (x.data_ptr(), centers.data_ptr(), code, rows, codes, features)

    def call(*more: int) -> None:
        kernel(*places, temperature, eps, tasks, scratch.data_ptr(), *more)

    return call, scratch


def forward(
    x_ND: Tensor, centers_KD: Tensor, temperature: float, eps: float, *, isa: str | None = None
) -> Saved:
    """See `reference.forward`; centers are float64 if x is, float32 otherwise."""
    rows = len(x_ND)
    kernels = load_kernels()
    threads = 1 if isinstance(kernels, str) else kernels.thread_count()
    codes, features = centers_KD.shape
    worth = rows * codes * (features + 16) // _WORK_PER_TASK
    tasks = max(1, min(-(-rows // _ROWS_PER_TASK), _TASKS_PER_THREAD * threads, worth))
    call, _ = _bind("forward", x_ND, centers_KD, temperature, eps, tasks, isa)
    best = torch.empty(rows, dtype=torch.int64)
    scalars = torch.empty(4, rows, dtype=centers_KD.dtype)
    call(best.data_ptr(), scalars.data_ptr())
    distance, length, entropy, log_normaliser = scalars
    return best, distance, length, entropy, log_normaliser


def backward(
    grad_distance: Tensor,
    grad_length: Tensor,
    grad_entropy: Tensor,
    x: Tensor,
    centers: Tensor,
    temperature: float,
    eps: float,
    saved: Saved,
    *,
    needs: tuple[bool, bool] = (True, True),
    isa: str | None = None,
) -> tuple[Tensor, Tensor]:
    """See `reference.backward`; what is not needed is returned without elements."""
    tasks = max(1, min(-(-len(x) // _BACKWARD_ROWS_PER_TASK), _MOST_BACKWARD_TASKS))
    call, _ = _bind("backward", x, centers, temperature, eps, tasks, isa)
    grads = torch.stack((grad_distance, grad_length, grad_entropy)).to(centers.dtype)
    grad_x = centers.new_empty(x.shape if needs[0] else (0,))
    grad_centers = centers.new_empty(centers.shape if needs[1] else (0,))
    places = [
        g.data_ptr() if need else 0 for g, need in zip((grad_x, grad_centers), needs, strict=True)
    ]
    if any(needs):
        call(grads.data_ptr(), *places)
    return grad_x, grad_centers
