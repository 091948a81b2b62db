"""One step of training under hooks: where does it first go bad?"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from torch import nn
from torch.utils.hooks import RemovableHandle

from foreshock.distributed_part import local_part
from foreshock.guard.containers import leaves_in, tensors_in
from foreshock.guard.events import BatchSeen, Offender, Place, Reason, Symptoms, TensorSeen
from foreshock.guard.inspection import can_scan, readable
from foreshock.host_read import read
from foreshock.ops import health_scan

_MAX_DESCRIBED = 16
"""Tensors of one kind that are described; all are scanned."""
_NONFINITE = {Reason.NONFINITE_WEIGHTS, Reason.NONFINITE_GRADIENT, Reason.NONFINITE_LOSS}


class Look(NamedTuple):
    """What one scan found in a tensor."""

    path: str
    tensor: torch.Tensor
    """Dense and real."""
    is_constant: bool
    """Nothing is to be learned through it."""
    version: int | None
    nan: int
    inf: int
    absmax: float
    mean: float
    rms: float

    @property
    def is_bad(self) -> bool:
        """Whether it has a value that is not finite, and is no mask."""
        return self.nan + self.inf > 0 and not self._is_mask()

    def _is_mask(self) -> bool:
        """Of 0 and -inf, as is added to the scores of an attention; not a logarithm of them."""
        has_both = 0 < self.inf < self.tensor.numel()
        if not has_both or not self.is_constant or self.nan or self.absmax:
            return False
        return not bool(read((self.tensor == math.inf).any()))

    def described(self) -> TensorSeen:
        """In numbers; min and max only of a tensor that has not been changed since the scan."""
        has_finite = self.inf + self.nan < self.tensor.numel()
        low = high = None
        if has_finite and self.version == _version(self.tensor):
            low, high = _range_of(self.tensor)
        return TensorSeen(
            self.path,
            tuple(self.tensor.shape),
            str(self.tensor.dtype).removeprefix("torch."),
            self.nan,
            self.inf,
            low,
            high,
            self.mean if has_finite else None,
            self.rms if has_finite else None,
        )


def look_at(value: Any, path: str = "") -> list[Look]:
    """Scans the floating-point tensors of a nested container.

    Cost: one read of each, a synchronisation per device.
    """
    found = [(at, local_part(t)) for at, t in tensors_in(value, path) if can_scan(t)]
    places: dict[torch.device, list[int]] = {}
    for i, (_, tensor) in enumerate(found):
        places.setdefault(tensor.device, []).append(i)
    looks: dict[int, Look] = {}
    for where in places.values():
        dense = [readable(found[i][1].detach()) for i in where]
        for i, readable_as, row in zip(where, dense, read(health_scan(dense).packed), strict=True):
            if readable_as is not None:
                looks[i] = _look(*found[i], readable_as, row)
    return [looks[i] for i in sorted(looks)]


def _look(path: str, given: torch.Tensor, tensor: torch.Tensor, row: np.ndarray[Any, Any]) -> Look:
    numel, nan, inf = row.view(np.int64)[:3].tolist()
    absmax, total, sumsq = row[3:].tolist()
    count = max(1, numel - nan - inf)
    return Look(
        path,
        tensor,
        not given.requires_grad,
        _version(tensor),
        nan,
        inf,
        absmax,
        total / count,
        math.sqrt(sumsq / count),
    )


def _version(tensor: torch.Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _range_of(tensor: torch.Tensor) -> tuple[float, float]:
    values = tensor if tensor.element_size() > 1 else tensor.float()
    finite = values.isfinite()
    low = values.where(finite, math.inf).amin()
    high = values.where(finite, -math.inf).amax()
    return float(read(low)), float(read(high))


def described(looks: Iterable[Look]) -> tuple[TensorSeen, ...]:
    """The first of them in numbers, bad ones before all others."""
    first = sorted(looks, key=lambda look: not look.nan + look.inf)[:_MAX_DESCRIBED]
    return tuple([look.described() for look in first])


def hash_batch(batch: Any) -> str | None:
    """XXH3 (128 bits) of a batch's contents, the same wherever its tensors are.

    Args:
        batch: mappings, lists and tuples, nested, of tensors, arrays, numbers and texts; anything
            else in them is passed over.
    Returns:
        Hexadecimal digest of path, dtype, shape and bytes of each in order; None if there is none.
    Cost:
        One read, and a copy into host memory of what is elsewhere.
    """
    digest = xxhash.xxh3_128()
    is_empty = True
    for path, leaf in leaves_in(batch):
        array = _as_array(leaf)
        if array is not None:
            is_empty = False
            digest.update(f"{path}:{_dtype_of(leaf)}:{array.shape};".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
    return None if is_empty else digest.hexdigest()


def _as_array(leaf: Any) -> np.ndarray[Any, Any] | None:
    if isinstance(leaf, torch.Tensor):
        host = (leaf.detach().to_dense() if leaf.layout is not torch.strided else leaf).detach()
        host = host.cpu().contiguous()
        if host.dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2):
            host = host.view(torch.int16 if host.element_size() == 2 else torch.uint8)
        return host.numpy()
    if isinstance(leaf, np.ndarray):
        return None if leaf.dtype.hasobject else leaf
    if isinstance(leaf, str | bytes):
        return np.frombuffer(leaf.encode() if isinstance(leaf, str) else leaf, np.uint8)
    return np.asarray(leaf) if isinstance(leaf, int | float | complex) else None


def _dtype_of(leaf: Any) -> str:
    kind = leaf.dtype if isinstance(leaf, torch.Tensor | np.ndarray) else type(leaf).__name__
    return str(kind).removeprefix("torch.")


def batch_seen(index: int, batch: Any) -> BatchSeen:
    """What is told of a batch.

    Args:
        index: counted from 0 over all epochs.
        batch: as it was handed out.
    """
    return BatchSeen(index, hash_batch(batch), (*described(look_at(batch)), *_whole_numbers(batch)))


def _whole_numbers(batch: Any) -> tuple[TensorSeen, ...]:
    found = [
        (path, t) for path, t in tensors_in(batch) if not t.is_floating_point() and not can_scan(t)
    ]
    return tuple(
        dataclasses.replace(look.described(), dtype=str(t.dtype).removeprefix("torch."))
        for path, t in found[:_MAX_DESCRIBED]
        for look in look_at(t.double(), path)
    )


class _Call(NamedTuple):
    """A module that has been entered."""

    number: int
    """Of all calls of all modules, in the order in which they were entered."""
    name: str
    inputs: list[Look]

    @property
    def had_finite_inputs(self) -> bool:
        return not any(look.is_bad for look in self.inputs)


class _Suspect(NamedTuple):
    number: int
    place: Place
    hides_compiled: bool


class UncopiedHook:
    """A hook whose copies, in a model that is copied or saved in that step, do nothing."""

    def __init__(self, look: Callable[..., None]) -> None:
        self._look = look

    def __call__(self, *given: Any) -> None:
        self._look(*given)

    def __reduce__(self) -> tuple[Callable[[], Any], tuple[()]]:
        return _make_idle_hook, ()


def _make_idle_hook() -> Callable[..., None]:
    return _do_nothing


def _do_nothing(*given: Any) -> None:
    """What a copied hook does."""


class Examination:
    """Hooks on a model's modules and parameters for one step, until `remove` is called.

    They look, and leave everything as it is. Suspect is the first module whose output is not finite
    while its inputs were (of nested modules the innermost); not if a module round it gets rid of
    that, as a softmax does of scores of -inf. Masks of 0 and -inf count as finite.

    What runs under torch.compile has no hooks (they would be passed over, or break the graph), and
    no suspect is named where it could be hidden in there.

    Args:
        model: whose modules.
        parameters: by name.
        before: the first tensor of the state that is not finite already.
        failed: called when a hook fails; it looks no further then.
    Cost:
        One read of every input and output of every module and of every gradient, each waited for.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, torch.Tensor],
        before: Offender | None,
        failed: Callable[[], None],
    ) -> None:
        self._before = before
        self._failed = failed
        self._is_blind = False
        self._entered: list[_Call] = []
        self._num_entered = 0
        self._calls: Counter[str] = Counter()
        self._suspects: list[_Suspect] = []
        self._first_given: _Suspect | None = None
        """The first module with inputs that were not finite."""
        self._gradient: tuple[str, TensorSeen] | None = None
        self._compiled: list[str] = []
        self._handles: list[RemovableHandle] = []
        try:
            self._install(model, parameters)
        except BaseException:
            self.remove()
            raise

    def _install(self, model: nn.Module, parameters: Mapping[str, torch.Tensor]) -> None:
        for name, module in self._with_hooks(model, "", set()):
            enter = UncopiedHook(functools.partial(self._enter, name))
            leave = UncopiedHook(functools.partial(self._leave, name))
            self._handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            self._handles.append(module.register_forward_hook(leave))
        for name, p in parameters.items():
            if p.requires_grad:
                see = UncopiedHook(functools.partial(self._see_gradient, name))
                self._handles.append(p.register_hook(see))

    def _with_hooks(
        self, module: nn.Module, name: str, known: set[int]
    ) -> Iterator[tuple[str, nn.Module]]:
        """Modules, shared ones once, outside of what is compiled."""
        if id(module) in known:
            return
        known.add(id(module))
        is_wrapper = type(module).__name__ == "OptimizedModule"
        if is_wrapper or module._compiled_call_impl is not None:
            self._compiled.append(name)
            if is_wrapper and name:
                yield name, module  # of which only the inside is compiled
            return
        yield name, module
        for own, child in module.named_children():
            yield from self._with_hooks(child, f"{name}.{own}" if name else own, known)

    def remove(self) -> None:
        """Takes all hooks off; what they have seen stays."""
        handles, self._handles = self._handles, []
        for handle in handles:
            handle.remove()
        self._entered.clear()

    # ---- forward

    def _enter(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling():
            return  # traced: there is nothing to be seen, and nothing may be left in the graph
        self._look(lambda: self._note_entry(name, args, kwargs))

    def _leave(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        self._look(lambda: self._note_exit(name, module, output))

    def _look(self, work: Callable[[], None]) -> None:
        if self._is_blind:
            return
        try:
            if not is_capturing():
                work()
        except Exception:
            self._is_blind = True
            self._failed()

    def _note_entry(self, name: str, args: Any, kwargs: Any) -> None:
        self._num_entered += 1
        self._calls[name] += 1
        given = {**{str(i): value for i, value in enumerate(args)}, **kwargs}
        self._entered.append(_Call(self._num_entered, name, look_at(given)))

    def _note_exit(self, name: str, module: nn.Module, output: Any) -> None:
        # Calls that an exception has ended, as of a checkpoint that has recomputed enough, are
        # still there.
        while self._entered and self._entered[-1].name != name:
            self._entered.pop()
        if not self._entered:
            return
        call = self._entered.pop()
        outputs = look_at(output, "output")
        if self._first_given is None and not call.had_finite_inputs:
            self._first_given = self._suspect(call, module, outputs)
        if not outputs:
            return
        if any(look.is_bad for look in outputs):
            has_one = any(suspect.place.had_finite_inputs for suspect in self._suspects)
            if not has_one and (call.had_finite_inputs or not self._suspects):
                self._suspects.append(self._suspect(call, module, outputs))
        else:
            self._suspects = [s for s in self._suspects if not _is_absorbed(s, call)]

    def _suspect(self, call: _Call, module: nn.Module, outputs: list[Look]) -> _Suspect:
        own = dict(module.named_parameters(recurse=False))
        place = Place(
            "module",
            call.name,
            type(module).__name__,
            self._calls[call.name],
            call.had_finite_inputs,
            described(call.inputs),
            described(outputs),
            described(look_at(own)),
        )
        return _Suspect(call.number, place, self._hides_compiled(call.name))

    def _hides_compiled(self, name: str) -> bool:
        return any(c != name and (not name or c.startswith(f"{name}.")) for c in self._compiled)

    # ---- backward

    def _see_gradient(self, name: str, gradient: torch.Tensor) -> None:
        if self._gradient is None and not torch.compiler.is_compiling():
            self._look(lambda: self._note_gradient(name, gradient))

    def _note_gradient(self, name: str, gradient: torch.Tensor) -> None:
        (look,) = look_at(gradient) or (None,)
        if look is not None and look.nan + look.inf:
            self._gradient = name, look.described()

    # ---- what it comes to

    def locate(self, symptoms: Symptoms, batch: BatchSeen | None) -> Place | None:
        """Where the step first went bad.

        Args:
            symptoms: what the guard has found in it.
            batch: of the step, if it is known.
        Returns:
            The place; None if the guard has found nothing that was not finite.
        """
        reasons = _NONFINITE.intersection(symptoms.reasons)
        if not reasons:
            return None
        if self._before is not None:
            return Place("before", self._before.name, offender=self._before)
        first = self._first_suspect(batch is not None and batch.has_nonfinite)
        if first is not None and not first.hides_compiled:
            return first.place
        if first is not None:
            inside = first.place.name or "the model"
            return Place("not_located", why=f"{inside} does it, of which parts are compiled")
        why = self._why_unseen()
        if why is not None:
            return Place("not_located", why=why)
        if Reason.NONFINITE_LOSS in reasons:
            return Place("loss")
        if Reason.NONFINITE_GRADIENT in reasons:
            return self._located_gradient()
        found = symptoms.offender
        if found is not None and found.kind != "gradient":
            return Place("after", found.name, offender=found)
        return Place("not_located", why="forward and backward pass were finite")

    def _first_suspect(self, is_batch_bad: bool) -> _Suspect | None:
        for suspect in self._suspects:
            if suspect.place.had_finite_inputs:
                return suspect
        if is_batch_bad and self._first_given is not None:
            return self._first_given
        return self._suspects[0] if self._suspects else None

    def _why_unseen(self) -> str | None:
        if self._is_blind:
            return "a hook has failed"
        if not self._num_entered:
            return "no module was seen at work, as under torch.compile"
        return None

    def _located_gradient(self) -> Place:
        if self._compiled:
            return Place("not_located", why="compiled gradients come in no order")
        if self._gradient is None:
            return Place("not_located", why="no gradient was seen to go bad")
        name, seen = self._gradient
        return Place("gradient", name, gradient=seen)


def _is_absorbed(suspect: _Suspect, by: _Call) -> bool:
    """By a module round it, or one that was given infinities; whose output is finite."""
    is_inside = suspect.number > by.number
    has_nan = any(t.nan for t in suspect.place.outputs)
    return is_inside or (not has_nan and not by.had_finite_inputs)


def is_capturing() -> bool:
    """Into a CUDA graph, where nothing can be read."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
