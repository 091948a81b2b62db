"""The optimizer's step, through a gate that can stay shut."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch


class StepGate:
    """Wraps `optimizer.step` of one optimizer object until `remove` is called.

    To withhold an update the step is not called at all, so that parameters, moments and step counts
    stay bit-identical. (Zeroed gradients would not do: weight decay and momentum still move the
    weights, and 0 * NaN is NaN.)

    Args:
        optimizer: whose step is wrapped, as an attribute of the object, in front of whatever a
            scheduler or another tool has put there.
        admits: called before each step with whether it has a closure; the step runs if it is true.
        surrounding: context in which the step runs.
        passed: called after each call of step, run or withheld.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        admits: Callable[[bool], bool],
        surrounding: Callable[[], AbstractContextManager[None]],
        passed: Callable[[bool], None],
    ) -> None:
        self._optimizer = optimizer
        self._had_own_step = "step" in vars(optimizer)
        self._inner = inner = optimizer.step

        @functools.wraps(inner)  # keeps the mark by which schedulers know that they wrapped it
        def step(closure: Any = None, *args: Any, **kwargs: Any) -> Any:
            result = None
            has_closure = closure is not None
            is_admitted = admits(has_closure)
            if is_admitted:
                with surrounding():
                    given = (closure, *args) if has_closure or args else ()
                    result = inner(*given, **kwargs)
            passed(is_admitted)
            return result

        self._step = step
        optimizer.step = step  # type: ignore[method-assign]

    def remove(self) -> None:
        """Puts the wrapped step back, unless somebody has wrapped ours since."""
        if vars(self._optimizer).get("step") is not self._step:
            return
        if self._had_own_step:
            self._optimizer.step = self._inner  # type: ignore[method-assign]
        else:
            del self._optimizer.step
