"""The parts of a training run's state: each can be copied out, and put back where it was."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch

from foreshock.distributed_part import local_part
from foreshock.guard.containers import copy_out


@runtime_checkable
class Stateful(Protocol):
    """Schedulers, scalers, loaders, averaged models: anything that saves and loads itself."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state_dict: Any, /) -> Any: ...


class Part(Protocol):
    """One part of the state."""

    def live(self) -> Any:
        """What it is now; its tensors may be those of the run itself.

        Cost: no tensor is copied, and no device is waited for.
        """
        ...

    def restore(self, saved: Any) -> None:
        """Makes the live state what it was; `saved` stays usable."""
        ...


def make_part(owner: Stateful) -> Part:
    """The part that copies and restores one thing.

    Args:
        owner: what the user has registered as belonging to the state of the run.
    """
    if isinstance(owner, torch.nn.Module):
        return NamedTensors(
            lambda: {**dict(owner.named_parameters()), **dict(owner.named_buffers())}
        )
    if isinstance(owner, torch.optim.Optimizer):
        return OptimizerState(owner)
    if isinstance(owner, torch.amp.GradScaler):
        return ScalerPart(owner)
    return StatefulPart(owner)


def named_parameters(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, *, only_trainable: bool = False
) -> dict[str, torch.Tensor]:
    """The model's parameters by name, then those that only the optimizer knows, by their place.

    Args:
        model, optimizer: whose.
        only_trainable: whether those are left out that require no gradient now.
    """
    named: dict[str, torch.Tensor] = dict(model.named_parameters())
    known = {id(p) for p in named.values()}
    for g, group in enumerate(optimizer.param_groups):
        for i, p in enumerate(group["params"]):
            if id(p) not in known:
                named[f"param_groups.{g}.{i}"] = p
    return {name: p for name, p in named.items() if p.requires_grad or not only_trainable}


_WRAPPERS = ("module.", "_orig_mod.")
"""What DistributedDataParallel and torch.compile put before the names of what they wrap."""


def bare(name: str) -> str:
    """The name of a parameter without what a wrapper of the model has put before it."""
    while name.startswith(_WRAPPERS):
        name = name.partition(".")[2]
    return name


class NamedTensors:
    """Parameters and buffers, those included that `state_dict` leaves out.

    Args:
        get: gives the live tensors by name.
    """

    def __init__(self, get: Callable[[], Mapping[str, torch.Tensor]]) -> None:
        self._get = get

    def live(self) -> Any:
        return dict(self._get())

    def capture(self) -> Any:
        """A copy, in host memory."""
        return copy_out(self.live())

    def restore(self, saved: Any) -> None:
        live = self._get()
        with torch.no_grad():
            for name in saved.keys() & live.keys():
                _copy_into(live[name], saved[name])


class GradientState:
    """Which parameters have a gradient, and the sums that gradient accumulation carries over.

    A gradient is None, all zero, or has values. Values count only in the middle of an accumulation;
    after an update they are leftovers that the training loop clears before it adds to them, not
    worth their memory.

    Args:
        parameters: whose gradients.
    """

    def __init__(self, parameters: Mapping[str, torch.Tensor]) -> None:
        self._parameters = parameters
        self.carries_values = False
        """Whether the next capture is in the middle of an accumulation."""

    def live(self) -> Any:
        present = {name: p.grad for name, p in self._parameters.items() if p.grad is not None}
        return {
            "present": list(present),
            "has_value": _has_values(list(present.values())),
            "values": present if self.carries_values else {},
        }

    def parameter_of(self, path: str) -> torch.Tensor | None:
        """Whose gradient is at a dotted path in `live`, whatever a wrapper calls it."""
        name = bare(path.removeprefix("values."))
        return next((p for other, p in self._parameters.items() if bare(other) == name), None)

    def capture(self) -> Any:
        """A copy, in host memory."""
        return copy_out(self.live())

    def restore(self, saved: Any) -> None:
        has_value = dict(zip(saved["present"], saved["has_value"].tolist(), strict=True))
        with torch.no_grad():
            for name, p in self._parameters.items():
                if name not in has_value:
                    p.grad = None
                elif name in saved["values"]:
                    _restore_gradient(p, saved["values"][name])
                elif not has_value[name] and p.grad is not None:
                    p.grad.zero_()
                elif not has_value[name]:
                    p.grad = torch.zeros_like(p)


def _restore_gradient(p: torch.Tensor, kept: torch.Tensor) -> None:
    if p.grad is None and local_part(p) is not p:
        p.grad = torch.zeros_like(p)
    if p.grad is None or p.grad.is_sparse or kept.is_sparse:
        p.grad = kept.to(p.device, copy=True)
    else:
        local_part(p.grad).copy_(kept)


def _has_values(gradients: list[torch.Tensor]) -> torch.Tensor:
    """(G,) bool: whether each gradient has a value other than 0. One read."""
    if not gradients:
        return torch.zeros(0, dtype=torch.bool)
    device = gradients[0].device
    dense = [g._values() if g.is_sparse else local_part(g) for g in gradients]
    return torch.stack([g.any().to(device, non_blocking=True) for g in dense])


class OptimizerState:
    """Moments, step counts and hyperparameters of an optimizer.

    Args:
        optimizer: restored in place; never through its `load_state_dict`, which moves the moments.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer

    def _parameters(self) -> list[torch.Tensor]:
        return [p for p, _ in self._owners()]

    def _owners(self) -> list[tuple[torch.Tensor, dict[str, Any]]]:
        return [(p, group) for group in self._optimizer.param_groups for p in group["params"]]

    def live(self) -> Any:
        state = self._optimizer.state
        return {
            "groups": [
                {k: v for k, v in group.items() if k != "params"}
                for group in self._optimizer.param_groups
            ],
            "state": [state.get(p) for p in self._parameters()],
        }

    def parameter_of(self, path: str) -> torch.Tensor | None:
        """Whose state is at a dotted path in `live`."""
        kind, _, rest = path.partition(".")
        index = rest.partition(".")[0]
        parameters = self._parameters()
        is_known = kind == "state" and index.isdecimal() and int(index) < len(parameters)
        return parameters[int(index)] if is_known else None

    def capture(self) -> Any:
        """A copy, in host memory."""
        return copy_out(self.live())

    def restore(self, saved: Any) -> None:
        with torch.no_grad():
            # Not strict: a group that was added since then stays, and what was put into one, as by
            # a scheduler that reads it at its next step.
            for group, kept in zip(self._optimizer.param_groups, saved["groups"], strict=False):
                _restore_into(group, kept, keep=tuple(group))
            for (p, group), kept in zip(self._owners(), saved["state"], strict=False):
                if kept is None:
                    self._optimizer.state.pop(p, None)
                else:
                    like = _MomentLike(p, bool(group.get("capturable") or group.get("fused")))
                    _restore_into(self._optimizer.state[p], kept, like=like)


class _MomentLike(NamedTuple):
    """What an optimizer would make state for."""

    parameter: torch.Tensor
    counts_on_device: bool
    """Whether step counts are where the parameter is, not on the host."""


def _restore_into(
    live: dict[str, Any],
    saved: dict[str, Any],
    keep: tuple[str, ...] = (),
    like: _MomentLike | None = None,
) -> None:
    for key in [k for k in live if k not in saved and k not in keep]:
        del live[key]
    for key, value in saved.items():
        now = live.get(key)
        if isinstance(value, torch.Tensor) and isinstance(now, torch.Tensor):
            _copy_into(now, value)
        else:
            live[key] = _made_anew(value, like)


def _copy_into(live: torch.Tensor, kept: torch.Tensor) -> None:
    """In place, since optimizers, views and captured graphs hold on to the memory."""
    live = local_part(live)
    if live.shape == kept.shape:
        live.copy_(kept)
    else:  # a buffer that has grown
        live.data = kept.to(live.device, copy=True)


def _made_anew(value: Any, like: _MomentLike | None) -> Any:
    """Deep copy, tensors where and how an optimizer would have made them."""
    if isinstance(value, torch.Tensor):
        return value.clone() if like is None else _tensor_made_anew(value, like)
    if type(value) in (list, tuple):
        return type(value)(_made_anew(item, like) for item in value)
    if type(value) is dict:
        return {key: _made_anew(item, like) for key, item in value.items()}
    return copy.deepcopy(value)


def _tensor_made_anew(value: torch.Tensor, like: _MomentLike) -> torch.Tensor:
    p = like.parameter
    if value.dim() == 0 and not like.counts_on_device:
        return value.clone()
    if value.shape != local_part(p).shape:
        return value.to(p.device, copy=True)
    # In the parameter's own order of memory: fused kernels walk through both at once.
    made = torch.empty_like(p, dtype=value.dtype, requires_grad=False)
    local_part(made).copy_(value)
    return made


class RandomState:
    """The generators of Python, NumPy and torch, on the host and on every CUDA device in use."""

    def live(self) -> Any:
        return self.capture()

    def capture(self) -> Any:
        """A copy, in host memory."""
        return {
            "python": random.getstate(),
            "numpy": np.random.get_state(),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        }

    def restore(self, saved: Any) -> None:
        random.setstate(saved["python"])
        np.random.set_state(saved["numpy"])
        # Generators read words of eight bytes, which memory shared with others need not begin at.
        torch.set_rng_state(saved["torch"].clone())
        # Not strict: a run may be taken up on a machine with fewer devices.
        for i, state in enumerate(saved["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(state.clone(), i)


class StatefulPart:
    """Whatever has state_dict and load_state_dict.

    Args:
        owner: loads a copy, so that what it does with it later does not reach the snapshot.
    """

    def __init__(self, owner: Stateful) -> None:
        self._owner = owner

    def live(self) -> Any:
        return self._owner.state_dict()

    def capture(self) -> Any:
        """A copy, in host memory."""
        return copy_out(self.live())

    def restore(self, saved: Any) -> None:
        self._owner.load_state_dict(copy_out(saved))


class ScalerPart:
    """A GradScaler, whose `state_dict` would wait for the device.

    Args:
        scaler: as registered.
    """

    def __init__(self, scaler: torch.amp.GradScaler) -> None:
        self._scaler = scaler

    def live(self) -> Any:
        scaler = self._scaler
        if scaler._scale is None or scaler._growth_tracker is None:
            return scaler.state_dict()  # not on a device yet
        return {
            "scale": scaler._scale,
            "growth_factor": scaler.get_growth_factor(),
            "backoff_factor": scaler.get_backoff_factor(),
            "growth_interval": scaler.get_growth_interval(),
            "_growth_tracker": scaler._growth_tracker,
        }

    def capture(self) -> Any:
        """A copy, in host memory."""
        return copy_out(self.live())

    def restore(self, saved: Any) -> None:
        if saved:
            numbers = {
                key: value.item() if isinstance(value, torch.Tensor) else value
                for key, value in saved.items()
            }
            self._scaler.load_state_dict(numbers)
