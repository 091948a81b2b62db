"""How gates open while a model warms up."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import nn

from foreshock.gates.attachment import gates_of
from foreshock.gates.gate import SO8RotationGate

_STEEPNESS = 10.0


class AlphaSchedule:
    """Raises sigmoid(alpha) of all gates to a target, by the end of the warm-up.

    m(t) = m(0) + (target - m(0)) f(t / warmup_steps), from each gate's own m(0)

    f(u) = u, or with shape="sigmoid" an S from 0 to 1, (s(u) - s(0)) / (s(1) - s(0)) with
    s(u) = 1 / (1 + exp(-10 (u - 1/2))). Alphas stay parameters: in the warm-up what the optimizer
    has made of them is written over by `step`.

    >>> schedule = AlphaSchedule(model, warmup_steps=1000, optimizer=optimizer)
    >>> monitor = Monitor(model, optimizer, "runs/first", gate_schedule=schedule)

    The monitor holds the gates against it, and takes it back in a rollback. A guard that looks for
    changes between two updates (`verify_state`) accepts those that are made with the optimizer's.

    Args:
        model: with gates, or some gates.
        warmup_steps: calls of `step` until the target is reached.
        target: of sigmoid(alpha), between 0 and 1.
        shape: "linear" or "sigmoid", in steps.
        after: "learn" leaves alphas to the optimizer after the warm-up, "hold" keeps them.
        optimizer: each of whose updates is a step, unless it was withheld; None: `step` is to be
            called after each.
    Raises:
        TypeError, ValueError: naming the argument, what was given and what is accepted.
    """

    def __init__(
        self,
        model: nn.Module | Iterable[SO8RotationGate],
        warmup_steps: int,
        target: float = 0.1,
        shape: Literal["linear", "sigmoid"] = "linear",
        after: Literal["learn", "hold"] = "learn",
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        gates = gates_of(model).values() if isinstance(model, nn.Module) else model
        self._gates = list(gates)
        _check(self._gates, warmup_steps, target, shape, after)
        self._starts = [float(gate.mix().detach()) for gate in self._gates]
        self._warmup_steps = warmup_steps
        self._target = target
        self._shape = shape
        self._after = after
        self._step = 0
        if optimizer is not None:
            if not isinstance(optimizer, torch.optim.Optimizer):
                raise TypeError(
                    f"optimizer is a {type(optimizer).__name__}; accepted: a torch.optim.Optimizer"
                )
            optimizer.register_step_post_hook(lambda *_: self.step())

    def step(self) -> None:
        """An update was made: sets the alphas for the next. The optimizer, if given, calls it."""
        self._step += 1
        self._set()

    def planned(self, gate: SO8RotationGate) -> float | None:
        """What sigmoid(alpha) of a gate should be now; None if it is the optimizer's, or the gate
        is not of this schedule."""
        if self._after == "learn" and self._step > self._warmup_steps:
            return None
        places = [i for i, one in enumerate(self._gates) if one is gate]
        return self._mixes()[places[0]] if places else None

    def state_dict(self) -> dict[str, Any]:
        """Where it is, and where the gates began."""
        return {"step": self._step, "starts": list(self._starts)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on from a saved state; alphas are the model's, and are saved with it.

        Raises:
            ValueError: it is of another number of gates.
        """
        starts = list(state_dict["starts"])
        if len(starts) != len(self._gates):
            raise ValueError(
                f"state_dict is of {len(starts)} gates; accepted: of {len(self._gates)}"
            )
        self._step, self._starts = int(state_dict["step"]), starts

    def _mixes(self) -> list[float]:
        way = _way(self._shape, min(1.0, self._step / self._warmup_steps))
        return [start + (self._target - start) * way for start in self._starts]

    @torch.no_grad()
    def _set(self) -> None:
        if self._after == "learn" and self._step > self._warmup_steps:
            return
        for gate, mix in zip(self._gates, self._mixes(), strict=True):
            gate.alpha.fill_(math.log(mix / (1 - mix)))


def _way(shape: str, u: float) -> float:
    """f(u): how much of the way is behind."""
    if shape == "linear":
        return u
    low, here, high = (1 / (1 + math.exp(-_STEEPNESS * (v - 0.5))) for v in (0.0, u, 1.0))
    return (here - low) / (high - low)


def _check(gates: list[Any], warmup_steps: Any, target: Any, shape: Any, after: Any) -> None:
    if not gates or not all(isinstance(gate, SO8RotationGate) for gate in gates):
        raise ValueError("model has no gates; accepted: one after attach(model), or some gates")
    if not isinstance(warmup_steps, int) or isinstance(warmup_steps, bool) or warmup_steps < 1:
        raise ValueError(f"warmup_steps is {warmup_steps!r}; accepted: a positive integer")
    if not isinstance(target, int | float) or not 0 < target < 1:
        raise ValueError(f"target is {target!r}; accepted: a number between 0 and 1")
    if shape not in ("linear", "sigmoid"):
        raise ValueError(f"shape is {shape!r}; accepted: 'linear', 'sigmoid'")
    if after not in ("learn", "hold"):
        raise ValueError(f"after is {after!r}; accepted: 'learn', 'hold'")
