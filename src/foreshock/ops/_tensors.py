"""What an op accepts as a tensor, and how its memory is described."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch

# The position is the code that kernels know an element type by (csrc/common/tensor_view.h).
FLOATING_DTYPES: tuple[torch.dtype, ...] = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)
DTYPE_CODES = {dtype: code for code, dtype in enumerate(FLOATING_DTYPES)}

_PLAIN_OR_NONE = frozenset({torch.Tensor, torch.nn.Parameter, type(None)})


def is_plain(tensor: object) -> bool:
    """Whether this is a tensor whose own memory holds its elements, or a place without one."""
    return type(tensor) in _PLAIN_OR_NONE


def _local(tensor: Any, name: str) -> torch.Tensor:
    """The tensor itself, or the part of a distributed one that this process holds."""
    distributed = sys.modules.get("torch.distributed.tensor")
    if distributed is not None and isinstance(tensor, distributed.DTensor):
        with torch.no_grad():
            return _local(tensor.to_local(), name)
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; accepted: tensors and None")
    has_own_memory = type(tensor).__torch_dispatch__ is torch._C._disabled_torch_dispatch_impl
    if not is_plain(tensor) and not has_own_memory:
        raise TypeError(
            f"{name} is a {type(tensor).__name__}, which keeps its elements elsewhere; "
            "accepted: torch.Tensor, torch.nn.Parameter, DTensor and None"
        )
    return tensor


def as_list(
    tensors: Iterable[torch.Tensor | None] | torch.Tensor, name: str = "tensors"
) -> list[torch.Tensor | None]:
    """The argument as a new list; one tensor counts as a list of one.

    Raises:
        TypeError: neither a tensor nor iterable.
    """
    if isinstance(tensors, torch.Tensor):
        return [tensors]
    try:
        return list(tensors)
    except TypeError:
        raise TypeError(
            f"{name} is a {type(tensors).__name__}; accepted: a tensor or an iterable of tensors"
        ) from None


def local_tensors(
    tensors: Iterable[torch.Tensor | None] | torch.Tensor,
    dtypes: Sequence[torch.dtype] = FLOATING_DTYPES,
    name: str = "tensors",
) -> list[torch.Tensor | None]:
    """Checks an op's list of tensors and returns those that this process holds, None kept.

    Args:
        tensors: the argument as given; one tensor counts as a list of one.
        dtypes: element types that the op accepts.
        name: the argument's name, for the message.
    Raises:
        TypeError: not a list of tensors, or an element type, layout or kind of tensor that no
            implementation reads.
        ValueError: tensors on more than one device, or on one without memory.
    """
    given = as_list(tensors, name)
    return given if _are_acceptable(given, dtypes) else _check_each(given, dtypes, name)


def local_tensor(tensor: torch.Tensor, dtypes: Sequence[torch.dtype], name: str) -> torch.Tensor:
    """The same for an argument that is one tensor; gradients flow through what is no DTensor."""
    if tensor is None:
        raise TypeError(f"{name} is None; accepted: a tensor")
    local = _local(tensor, name)
    _check(local, dtypes, name)
    return local


def _are_acceptable(given: list[torch.Tensor | None], dtypes: Sequence[torch.dtype]) -> bool:
    """The usual case, looked at a property at a time: a third of the price of tensor by tensor."""
    if not {type(t) for t in given} <= _PLAIN_OR_NONE:
        return False
    present = [t for t in given if t is not None]
    return (
        {t.dtype for t in present} <= set(dtypes)
        and {t.layout for t in present} <= {torch.strided}
        and len(devices := {t.device for t in present}) <= 1
        and not any(d.type == "meta" for d in devices)
        and not any(t.is_neg() for t in present)
    )


def _check_each(
    given: list[torch.Tensor | None], dtypes: Sequence[torch.dtype], name: str
) -> list[torch.Tensor | None]:
    """Goes through the list tensor by tensor, to unwrap what is distributed or name what is bad."""
    checked: list[torch.Tensor | None] = []
    device: torch.device | None = None
    for i, item in enumerate(given):
        tensor = None if item is None else _local(item, f"{name}[{i}]")
        if tensor is not None:
            _check(tensor, dtypes, f"{name}[{i}]")
            device = device or tensor.device
            if tensor.device != device:
                raise ValueError(
                    f"{name}[{i}] is on {tensor.device}, others are on {device}; "
                    "accepted: tensors of one device"
                )
        checked.append(tensor)
    return checked


def _check(tensor: torch.Tensor, dtypes: Sequence[torch.dtype], name: str) -> None:
    if tensor.dtype not in dtypes:
        accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(
            f"{name} has dtype {str(tensor.dtype).removeprefix('torch.')}; accepted: {accepted}"
        )
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name} has layout {tensor.layout}; accepted: torch.strided")
    if tensor.is_neg():
        raise TypeError(f"{name} is a lazy negation; accepted: resolve_neg() of it")
    if tensor.device.type == "meta":
        raise ValueError(f"{name} is on the meta device, where there is nothing to read")


def device_of(tensors: Iterable[torch.Tensor | None]) -> torch.device:
    """Device of the first tensor; the CPU if there is none."""
    return next((t.device for t in tensors if t is not None), torch.device("cpu"))
