"""The parts of a training run's state: each can be copied out, and put back where it was."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch


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


def copy_out(value: Any) -> Any:
    """Deep copy of nested containers, tensors detached and in host memory."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: copy_out(item) for key, item in value.items()}
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(copy_out(item) for item in value)
    return copy.deepcopy(value)


def tensors_in(value: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a nested container, with the dotted path to it."""
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from tensors_in(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from tensors_in(item, f"{path}.{i}" if path else str(i))


class ModelState:
    """Parameters and buffers, those included that `state_dict` leaves out."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {**dict(self._model.named_parameters()), **dict(self._model.named_buffers())}

    def capture(self) -> Any:
        return copy_out(self._tensors())

    def restore(self, saved: Any) -> None:
        live = self._tensors()
        with torch.no_grad():
            for name, tensor in saved.items():
                live[name].copy_(tensor)  # in place: optimizers and captured graphs hold the memory


class OptimizerState:
    """Moments, step counts and hyperparameters of an optimizer."""

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
            for group, kept in zip(self._optimizer.param_groups, saved["groups"], strict=True):
                _restore_into(group, kept, keep=("params",))
            for p, kept in zip(self._parameters(), saved["state"], strict=True):
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
            now.copy_(value)  # in place: load_state_dict would move the moments to new memory
        elif isinstance(value, torch.Tensor):
            # Step counts are kept on the host by most optimizers; moments are with the parameter.
            live[key] = value.clone() if value.dim() == 0 else value.to(device, copy=True)
        else:
            live[key] = copy.deepcopy(value)


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
    """Whatever has state_dict and load_state_dict."""

    def __init__(self, owner: Stateful) -> None:
        self._owner = owner

    def capture(self) -> Any:
        return copy_out(self._owner.state_dict())

    def restore(self, saved: Any) -> None:
        self._owner.load_state_dict(copy_out(saved))
