"""SoftAssigner: the same centers, batch after batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from foreshock.ops._tensors import FLOATING_DTYPES, local_tensor
from foreshock.ops.soft_assign import register
from foreshock.ops.soft_assign.checks import check_number
from foreshock.ops.soft_assign.frame import Assignment, Frame


class SoftAssigner:
    """`soft_assign` to centers that stay, of rows that may have to be mapped to where these are.

    z = (x - offset) @ basis, then d2, b, L and H of `soft_assign(z, centers)`; no gradients.

    What is bound is copied and laid out for the kernel: after a change of centers, offset or basis
    in place call `refresh`. On the CPU a block of rows is read, mapped and compared while it is in
    the nearest cache, and z is never written unless it is wanted.

    >>> assigner = SoftAssigner(centers, offset=mean, basis=directions)
    >>> far = assigner.distance(x)            # each batch; no exponential is taken
    >>> length = assigner(x).length

    Args:
        centers: (K, E), float64, float32, bfloat16 or float16.
        temperature: of the softmax, in units of squared distance; above 0.
        eps: at least 0; bounds L by -log(eps).
        offset: (D,) on the device of the centers, or None: taken off x before anything is
            multiplied or rounded, so that no digits are lost to it.
        basis: (D, E), likewise, or None: then D is E.
    Raises:
        TypeError, ValueError: naming the argument, what it is and what is accepted.
    Cost:
        N D E + N K E multiply-adds, and for L and H N K exponentials; one read of x, whose rows may
        be any distance apart. The memory of the centers and of the basis, once more.
    Source:
        csrc/soft_assign.
    """

    def __init__(
        self,
        centers: Tensor,
        *,
        temperature: float = 1.0,
        eps: float = 1e-12,
        offset: Tensor | None = None,
        basis: Tensor | None = None,
    ) -> None:
        given = {"centers": centers, "offset": offset, "basis": basis}
        checked = {
            name: None if tensor is None and name != "centers" else _checked(tensor, name)
            for name, tensor in given.items()
        }
        check_number(temperature, "temperature", "a finite number above 0", temperature > 0)
        check_number(eps, "eps", "a finite number from 0 up", eps >= 0)
        _check_shapes(**checked)  # type: ignore[arg-type]
        self._given = checked
        self._settings = {"temperature": float(temperature), "eps": float(eps)}
        self._bind()

    def _bind(self) -> None:
        centers = self._given["centers"]
        assert centers is not None
        dtype = torch.float64 if centers.dtype == torch.float64 else torch.float32
        cast = {n: None if t is None else t.to(dtype) for n, t in self._given.items()}
        for name in ("centers", "offset"):
            if (tensor := cast[name]) is not None:
                cast[name] = tensor.contiguous()
        frame = Frame(**cast, **self._settings)  # type: ignore[arg-type]
        self._inputs, self._device, self._dtype = frame.inputs, centers.device, dtype
        self._is_of_copies = any(cast[n] is not t for n, t in self._given.items())
        self._bound = register.bind_assigner(frame)

    def refresh(self) -> None:
        """Takes over what the centers, the offset and the basis hold now; not during a call."""
        if self._is_of_copies:
            self._bind()
        else:
            self._bound.refresh()

    def __call__(self, x: Tensor, *, return_mapped: bool = False) -> Assignment:
        """The codes of every row.

        Args:
            x: (..., D) on the device of the centers, float64, float32, bfloat16 or float16.
            return_mapped: whether z is returned too.
        Returns:
            Assignment of float64 if the centers are, of float32 otherwise.
        Raises:
            TypeError, ValueError: naming what x is and what is accepted.
        """
        code = self._bound.assign(x, return_mapped) if self._can_look(x) else None
        if code is not None:
            return code
        code = self._bound.assign(self._rows(x), return_mapped)
        assert code is not None
        shape = x.shape[:-1]
        best_index, distance, length, entropy = (part.view(shape) for part in code[:4])
        mapped = code.mapped
        z = None if mapped is None else mapped.view(*shape, mapped.shape[1])
        return Assignment(best_index, distance, length, entropy, z)

    def distance(self, x: Tensor) -> Tensor:
        """(...): the squared distance of every row to the nearest center, and nothing else.

        Args, Raises:
            As for a call.
        """
        distance = self._bound.distance(x) if self._can_look(x) else None
        if distance is not None:
            return distance
        distance = self._bound.distance(self._rows(x))
        assert distance is not None
        return distance.view(x.shape[:-1])

    def writer(self, out: Tensor) -> Callable[[object], bool] | None:
        """For a loop that has no time: a function that writes `distance(x)` to a place.

        >>> write = assigner.writer(out)
        >>> if not write(x):                  # each batch
        ...     out = assigner.distance(x)

        Args:
            out: (...), contiguous, on the device of the centers and of the type that `distance`
                returns.
        Returns:
            A function that is false, and has done nothing, where x is not (..., D) with rows that
            can be read as they lie; None if the implementation here reads none so, as on CUDA.
        Raises:
            ValueError: naming what out is and what is accepted.
        """
        if out.dtype != self._dtype or out.device != self._device or not out.is_contiguous():
            raise ValueError(
                f"out is {out.dtype} on {out.device} with strides {out.stride()}; accepted: "
                f"{self._dtype} on {self._device}, contiguous"
            )
        return self._bound.writer(out)

    def _can_look(self, x: Tensor) -> bool:
        return type(x) is Tensor and self._bound.looks_first

    def _rows(self, x: Tensor) -> Tensor:
        """(N, D), each of whose rows is dense."""
        x = local_tensor(x, FLOATING_DTYPES[:4], "x")
        if x.dim() == 0 or x.shape[-1] != self._inputs or x.device != self._device:
            raise ValueError(
                f"x has shape {tuple(x.shape)} on {x.device}; accepted: (..., {self._inputs}) on "
                f"{self._device}, where the centers are"
            )
        x_ND = x.detach().as_subclass(Tensor).reshape(-1, self._inputs)
        if self._inputs == 1:  # one number is dense whatever its stride
            return x_ND.reshape(-1).unsqueeze(1)
        return x_ND if x_ND.stride(1) == 1 else x_ND.contiguous()

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[dict[str, Any]]]:
        # What is laid out lies at an address; a copy is bound to its own.
        return _bound_to, ({**self._given, **self._settings},)


def _bound_to(arguments: dict[str, Any]) -> SoftAssigner:
    return SoftAssigner(**arguments)


def _checked(tensor: Tensor | None, name: str) -> Tensor:
    local = local_tensor(tensor, FLOATING_DTYPES[:4], name)  # type: ignore[arg-type]
    return local.detach()


def _check_shapes(centers: Tensor, offset: Tensor | None, basis: Tensor | None) -> None:
    if centers.dim() != 2 or 0 in centers.shape:
        raise ValueError(f"centers has shape {tuple(centers.shape)}; accepted: (K, E) from 1 up")
    features = centers.shape[1]
    if basis is not None and (basis.dim() != 2 or len(basis) == 0 or basis.shape[1] != features):
        raise ValueError(
            f"basis has shape {tuple(basis.shape)}; accepted: (D, {features}) with D from 1 up, "
            f"for centers of shape {tuple(centers.shape)}"
        )
    inputs = features if basis is None else len(basis)
    if offset is not None and offset.shape != (inputs,):
        raise ValueError(f"offset has shape {tuple(offset.shape)}; accepted: ({inputs},)")
    for name, tensor in (("offset", offset), ("basis", basis)):
        if tensor is not None and tensor.device != centers.device:
            raise ValueError(
                f"{name} is on {tensor.device}; accepted: {centers.device}, where centers is"
            )
