"""soft_assign in C++ (csrc/soft_assign/cpu.cpp), once for each instruction set."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from foreshock.ops._backend import active_isa, load_kernels
from foreshock.ops._tensors import DTYPE_CODES
from foreshock.ops.soft_assign.frame import Assignment, Frame
from foreshock.ops.soft_assign.reference import Saved

_ROWS_PER_TASK = 64
_EXPONENTIAL = 16  # what that of a pair of row and code counts as, in multiply-adds
# Multiply-adds: some 0.1 ms. A second thread that has
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


def _tasks(rows: int, work_per_row: int, threads: int) -> int:
    worth = rows * work_per_row // _WORK_PER_TASK
    return max(1, min(-(-rows // _ROWS_PER_TASK), _TASKS_PER_THREAD * threads, worth))


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
    tasks = _tasks(rows, codes * (features + _EXPONENTIAL), threads)
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


# What a call writes and nobody reads after it, with its address and its bytes: the next call, of
# any assigner, has it in its cache.
_spare: list[tuple[Tensor, int, int]] = []


def _scratch(needed: int) -> tuple[Tensor, int, int]:
    try:
        scratch = _spare.pop()  # in one step: another thread gets another one
    except IndexError:
        scratch = torch.empty(0), 0, -1
    if scratch[2] < needed:
        memory = torch.empty(needed, dtype=torch.uint8)
        return memory, memory.data_ptr(), needed
    return scratch


class Assigner:
    """A plan (csrc/soft_assign/kernel.h) of what a frame was when it was bound."""

    looks_first = True

    def __init__(self, frame: Frame, *, isa: str | None = None) -> None:
        kernels = load_kernels()
        if isinstance(kernels, str):
            raise RuntimeError(kernels)
        centers, basis = frame.centers, frame.basis
        (codes, features), inputs = centers.shape, frame.inputs
        shape = DTYPE_CODES[centers.dtype], codes, features, inputs
        isa = isa or active_isa()
        self._memory = torch.empty(kernels.soft_assign_plan_bytes(*shape), dtype=torch.uint8)
        plan = self._memory.data_ptr()
        places = (0 if tensor is None else tensor.data_ptr() for tensor in frame[:3])
        strides = (0, 0) if basis is None else basis.stride()
        bind = getattr(kernels, f"soft_assign_bind_{isa}")
        # Lays out what the frame's tensors hold now.
        numbers = frame.temperature, frame.eps
        self.refresh = functools.partial(bind, *places, *strides, *shape, *numbers, plan)
        self.refresh()
        self._frame = frame
        self._assign = getattr(kernels, f"soft_assign_assign_{isa}")
        exchange = torch.Tensor.__dlpack_c_exchange_api__
        self._reader = kernels.RowsReader(exchange, torch.Tensor, inputs, plan)
        self._thread_count = kernels.thread_count
        self._task_bytes = kernels.soft_assign_task_bytes(plan)
        self._dtype, self._features = centers.dtype, features
        mapping = 0 if basis is None else inputs * features
        self._work_of_distance = mapping + codes * features
        self._work_of_code = self._work_of_distance + codes * _EXPONENTIAL

    def distance(self, x: Tensor) -> Tensor | None:
        """See `BoundAssigner`."""
        distance = torch.empty(x.shape[:-1], dtype=self._dtype)
        rows = distance.numel()
        is_done = self._run(x, rows, self._work_of_distance, 0, distance.data_ptr(), 0)
        return distance if is_done else None

    def assign(self, x: Tensor, is_mapped_wanted: bool) -> Assignment | None:
        """See `BoundAssigner`."""
        shape = x.shape[:-1]
        best = torch.empty(shape, dtype=torch.int64)
        scalars = torch.empty(3, *shape, dtype=self._dtype)
        mapped = (
            torch.empty(*shape, self._features, dtype=self._dtype) if is_mapped_wanted else None
        )
        to_mapped = 0 if mapped is None else mapped.data_ptr()
        to = best.data_ptr(), scalars.data_ptr(), to_mapped
        if not self._run(x, best.numel(), self._work_of_code, *to):
            return None
        distance, length, entropy = scalars.unbind()
        return Assignment(best, distance, length, entropy, mapped)

    def writer(self, out: Tensor) -> Callable[[object], bool]:
        """See `BoundAssigner`."""
        shape, rows, place = out.shape, out.numel(), out.data_ptr()
        tasks = _tasks(rows, self._work_of_distance, self._thread_count())
        needed = tasks * self._task_bytes
        assign, reader = self._assign, self._reader

        def write(x: object) -> bool:
            if type(x) is not Tensor or x.shape[:-1] != shape:
                return False
            scratch = _scratch(needed)
            is_done: bool = assign(reader, x, rows, tasks, scratch[1], 0, place, 0)
            _spare.append(scratch)
            return is_done

        write.owns = self, out  # type: ignore[attr-defined]
        return write

    def _run(self, x: Tensor, rows: int, work: int, best: int, scalars: int, mapped: int) -> bool:
        tasks = _tasks(rows, work, self._thread_count())
        scratch = _scratch(tasks * self._task_bytes)
        is_done: bool = self._assign(
            self._reader, x, rows, tasks, scratch[1], best, scalars, mapped
        )
        _spare.append(scratch)
        return is_done
