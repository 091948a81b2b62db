"""State that is not torch's: arrays in nested containers, saved and put back by functions."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import torch

from foreshock.guard.containers import leaves_in
from foreshock.guard.inspection import can_scan

_Array = np.ndarray[Any, Any]


class FunctionState:
    """What two functions save and put back, as a part of a run's state.

    Arrays, tensors and bytes are copied, scanned and summed up with the snapshot; anything else is
    deep-copied with it.

    Args:
        save: gives the state: mappings, lists and tuples, nested. What is in it may be the live
            arrays themselves; they are copied before anybody can change them.
        load: given a copy of such a state, puts it back. Arrays of other libraries than NumPy and
            torch (JAX's, that is, what has `__array__` and `__dlpack__`) come as NumPy's.
    """

    def __init__(self, save: Callable[[], Any], load: Callable[[Any], object]) -> None:
        self._save = save
        self._load = load

    def live(self) -> Any:
        tensors: list[torch.Tensor] = []
        return {"form": _taken_apart(self._save(), tensors), "arrays": tensors}

    def restore(self, saved: Any) -> None:
        self._load(_put_together(saved["form"], saved["arrays"]))


def tensors_of(model: object) -> dict[str, torch.Tensor]:
    """The floating-point arrays of a model as tensors, by dotted path.

    Args:
        model: an array, or mappings, lists and tuples of them, nested; a torch.nn.Module; or any
            object whose attributes they are.
    Returns:
        Tensors that share the arrays' memory where the arrays are NumPy's, or on the host.
    Raises:
        TypeError: there are none.
    """
    found: Any = model
    if isinstance(model, torch.nn.Module):
        found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    elif not isinstance(model, Mapping | list | tuple) and not _is_array(model):
        found = getattr(model, "__dict__", {})
    named = {path or "model": _as_tensor(x) for path, x in leaves_in(found) if _is_array(x)}
    tensors = {path: t for path, t in named.items() if t is not None and can_scan(t)}
    if not tensors:
        raise TypeError(
            f"model is a {type(model).__name__} without floating-point arrays; accepted: arrays or "
            "tensors, in mappings, lists or tuples, or attributes of an object"
        )
    return tensors


@dataclasses.dataclass(frozen=True)
class _Taken:
    """Stands in the place of an array."""

    index: int
    kind: Literal["tensor", "array", "bytes", "bytearray"]
    shape: tuple[int, ...] = ()
    dtype: Any = None


def _taken_apart(value: Any, tensors: list[torch.Tensor]) -> Any:
    """The containers without their arrays, which are put into `tensors`."""
    if isinstance(value, Mapping):
        return {key: _taken_apart(item, tensors) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_make"):
        return value._make(_taken_apart(item, tensors) for item in value)
    if type(value) in (list, tuple):
        return type(value)(_taken_apart(item, tensors) for item in value)
    taken = _taken(value, len(tensors))
    if taken is None:
        return value
    stand_in, tensor = taken
    tensors.append(tensor)
    return stand_in


def _taken(value: Any, index: int) -> tuple[_Taken, torch.Tensor] | None:
    if isinstance(value, torch.Tensor):
        return _Taken(index, "tensor"), value
    if isinstance(value, bytes | bytearray):
        kind: Literal["bytes", "bytearray"] = "bytes" if isinstance(value, bytes) else "bytearray"
        return _Taken(index, kind), _shared(np.frombuffer(value, np.uint8))
    if not _is_array(value):
        return None
    array = np.asarray(value)
    if array.dtype.hasobject:
        return None
    tensor = _as_tensor(array) if array.dtype.isnative else None
    if tensor is None:
        tensor = _shared(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return _Taken(index, "array", array.shape, array.dtype), tensor


def _put_together(form: Any, tensors: list[torch.Tensor]) -> Any:
    """The state as it was, of copies."""
    if isinstance(form, _Taken):
        return _given_back(form, tensors[form.index])
    if isinstance(form, dict):
        return {key: _put_together(item, tensors) for key, item in form.items()}
    if isinstance(form, tuple) and hasattr(form, "_make"):
        return form._make(_put_together(item, tensors) for item in form)
    if type(form) in (list, tuple):
        return type(form)(_put_together(item, tensors) for item in form)
    return copy.deepcopy(form)


def _given_back(taken: _Taken, tensor: torch.Tensor) -> Any:
    if taken.kind == "tensor":
        return tensor.clone()
    raw = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    if taken.kind == "array":
        return raw.copy().view(taken.dtype).reshape(taken.shape)
    return raw.tobytes() if taken.kind == "bytes" else bytearray(raw.tobytes())


def _is_array(value: object) -> bool:
    if isinstance(value, np.ndarray | torch.Tensor):
        return True
    return hasattr(value, "__array__") and hasattr(value, "__dlpack__")


def _as_tensor(value: Any) -> torch.Tensor | None:
    """With the array's memory if it can be; None if torch has no such numbers."""
    if isinstance(value, torch.Tensor):
        return value
    array = np.asarray(value)
    if array.dtype.name == "bfloat16":  # of a package beside NumPy, whose own code torch ignores
        return _shared(array.view(np.int16)).view(torch.bfloat16)
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    try:
        return _shared(native)
    except TypeError:
        return None


def _shared(array: _Array) -> torch.Tensor:
    if any(stride < 0 for stride in array.strides):
        array = array.copy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of memory that is read-only: it is only read here
        return torch.from_numpy(array)
