"""The parts of a training run's state: each can be copied out, and put back where it was."""

from __future__ import annotations

import copy
import random
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from foreshock.guard.containers import copy_out
from foreshock.host_read import read


@runtime_checkable
class Stateful(Protocol):
    """Schedulers, scalers, loaders, averaged models: anything that saves and loads itself."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state_dict: Any, /) -> Any: ...


class Part(Protocol):
    """One part of the state."""

    def capture(self) -> Any:
        """A copy, in host memory, that shares nothing with the live state."""
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
    return StatefulPart(owner)


def named_parameters(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, torch.Tensor]:
    """The model's parameters by name, then those that only the optimizer knows, by their place."""
    named: dict[str, torch.Tensor] = dict(model.named_parameters())
    known = {id(p) for p in named.values()}
    for g, group in enumerate(optimizer.param_groups):
        for i, p in enumerate(group["params"]):
            if id(p) not in known:
                named[f"param_groups.{g}.{i}"] = p
    return named


class NamedTensors:
    """Parameters and buffers, those included that `state_dict` leaves out.

    Args:
        get: gives the live tensors by name.
    """

    def __init__(self, get: Callable[[], Mapping[str, torch.Tensor]]) -> None:
        self._get = get

    def capture(self) -> Any:
        return copy_out(self._get())

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

    def capture(self) -> Any:
        present = {name: p.grad for name, p in self._parameters.items() if p.grad is not None}
        zero = _all_zero(present)
        saved: dict[str, Any] = {}
        for name, gradient in present.items():
            if name in zero:
                saved[name] = "zero"
            else:
                saved[name] = copy_out(gradient) if self.carries_values else "leftover"
        return saved

    def restore(self, saved: Any) -> None:
        with torch.no_grad():
            for name, p in self._parameters.items():
                kept = saved.get(name)
                if kept is None:
                    p.grad = None
                elif isinstance(kept, torch.Tensor):
                    _restore_gradient(p, kept)
                elif kept == "zero" and p.grad is not None:
                    p.grad.zero_()
                elif kept == "zero":
                    p.grad = torch.zeros_like(p)


def _restore_gradient(p: torch.Tensor, kept: torch.Tensor) -> None:
    if p.grad is None or p.grad.is_sparse or kept.is_sparse:
        p.grad = kept.to(p.device, copy=True)
    else:
        p.grad.copy_(kept)


def _all_zero(gradients: Mapping[str, torch.Tensor]) -> set[str]:
    """Names of the gradients without a value. One read; one synchronisation per device."""
    by_device: dict[torch.device, list[str]] = defaultdict(list)
    for name, gradient in gradients.items():
        by_device[gradient.device].append(name)
    zero: set[str] = set()
    for names in by_device.values():
        dense = [g._values() if g.is_sparse else g for g in map(gradients.__getitem__, names)]
        has_value = read(torch.stack([g.any() for g in dense]))
        zero |= {name for name, has in zip(names, has_value, strict=True) if not has}
    return zero


class OptimizerState:
    """Moments, step counts and hyperparameters of an optimizer.

    Args:
        optimizer: restored in place; never through its `load_state_dict`, which moves the moments.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer

    def _parameters(self) -> list[torch.Tensor]:
        return [p for group in self._optimizer.param_groups for p in group["params"]]

    def capture(self) -> Any:
        state = self._optimizer.state
        return {
            "groups": [
                copy_out({k: v for k, v in group.items() if k != "params"})
                for group in self._optimizer.param_groups
            ],
            "state": [copy_out(state[p]) if p in state else None for p in self._parameters()],
        }

    def restore(self, saved: Any) -> None:
        with torch.no_grad():
            # Not strict: a group that was added since then stays.
            for group, kept in zip(self._optimizer.param_groups, saved["groups"], strict=False):
                _restore_into(group, kept, keep=("params",))
            for p, kept in zip(self._parameters(), saved["state"], strict=False):
                if kept is None:
                    self._optimizer.state.pop(p, None)
                else:
                    _restore_into(self._optimizer.state[p], kept, device=p.device)


def _restore_into(
    live: dict[str, Any],
    saved: dict[str, Any],
    keep: tuple[str, ...] = (),
    device: torch.device | None = None,
) -> None:
    for key in [k for k in live if k not in saved and k not in keep]:
        del live[key]
    for key, value in saved.items():
        now = live.get(key)
        if isinstance(value, torch.Tensor) and isinstance(now, torch.Tensor):
            _copy_into(now, value)
        else:
            live[key] = _copy_to(value, device)


def _copy_into(live: torch.Tensor, kept: torch.Tensor) -> None:
    """In place, since optimizers, views and captured graphs hold on to the memory."""
    if live.shape == kept.shape:
        live.copy_(kept)
    else:  # a buffer that has grown
        live.data = kept.to(live.device, copy=True)


def _copy_to(value: Any, device: torch.device | None) -> Any:
    """Deep copy, of tensors on the device; but most optimizers keep step counts on the host."""
    if isinstance(value, torch.Tensor):
        return value.clone() if value.dim() == 0 else value.to(device, copy=True)
    if type(value) in (list, tuple):
        return type(value)(_copy_to(item, device) for item in value)
    if type(value) is dict:
        return {key: _copy_to(item, device) for key, item in value.items()}
    return copy.deepcopy(value)


class RandomState:
    """The generators of Python, NumPy and torch, on the host and on every CUDA device in use."""

    def capture(self) -> Any:
        return {
            "python": random.getstate(),
            "numpy": np.random.get_state(),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        }

    def restore(self, saved: Any) -> None:
        random.setstate(saved["python"])
        np.random.set_state(saved["numpy"])
        torch.set_rng_state(saved["torch"])
        if saved["cuda"]:
            torch.cuda.set_rng_state_all(saved["cuda"])


class StatefulPart:
    """Whatever has state_dict and load_state_dict.

    Args:
        owner: loads a copy, so that what it does with it later does not reach the snapshot.
    """

    def __init__(self, owner: Stateful) -> None:
        self._owner = owner

    def capture(self) -> Any:
        return copy_out(self._owner.state_dict())

    def restore(self, saved: Any) -> None:
        self._owner.load_state_dict(copy_out(saved))
