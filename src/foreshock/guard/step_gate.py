"""The optimizer's step, through a gate that can stay shut."""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable
from typing import Any

import torch

from foreshock.guard.learning_rate import LearningRateBackoff


class StepGate:
    """Wraps `optimizer.step` of one optimizer object until `remove` is called.

    To withhold an update the step is not called at all, so that parameters, moments and step counts
    stay bit-identical. (Zeroed gradients would not do: weight decay and momentum still move the
    weights, and 0 * NaN is NaN.)

    Args:
        optimizer: whose step is wrapped, as an attribute of the object, in front of whatever a
            scheduler or another tool has put there.
        learning_rate: in force on the updates that run.
        scaled: asked, before each step that runs, for what is to be in force while it does.
        admits: called before each step with whether it has a closure; the step runs if it is true.
        passed: called after each call of step with whether it ran.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        learning_rate: LearningRateBackoff,
        scaled: Callable[[], contextlib.AbstractContextManager[None]],
        admits: Callable[[bool], bool],
        passed: Callable[[bool], None],
    ) -> None:
        self._optimizer = optimizer
        self._learning_rate = learning_rate
        self._scaled = scaled
        self._admits = admits
        self._passed = passed
        self._is_removed = False
        self._had_own_step = "step" in vars(optimizer)
        self._inner = inner = optimizer.step

        @functools.wraps(inner)  # keeps the mark by which schedulers know that they wrapped it
        def step(_: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
            return self._step(*args, **kwargs)

        # A bound method, as a scheduler that wraps it later expects.
        self._installed = types.MethodType(step, optimizer)
        optimizer.step = self._installed  # type: ignore[method-assign]

    def _step(self, closure: Any = None, *args: Any, **kwargs: Any) -> Any:
        # A closure goes on only if there is one: some optimizers' steps take none.
        given = (closure, *args) if closure is not None or args else ()
        if self._is_removed:
            return self._inner(*given, **kwargs)
        is_admitted = self._admits(closure is not None)
        result = None
        if is_admitted:
            with contextlib.ExitStack() as during:
                if self._learning_rate.factor != 1.0:
                    during.enter_context(self._learning_rate.applied_to(self._optimizer))
                during.enter_context(self._scaled())
                result = self._inner(*given, **kwargs)
        self._passed(is_admitted)
        return result

    def remove(self) -> None:
        """Puts the wrapped step back; where somebody has wrapped ours since, ours lets all pass."""
        if self._is_removed:
            return
        self._is_removed = True
        if vars(self._optimizer).get("step") is not self._installed:
            return
        if self._had_own_step:
            self._optimizer.step = self._inner  # type: ignore[method-assign]
        else:
            del self._optimizer.step
