"""How long a rank is at work by itself, and whether that is longer than the others are."""

from __future__ import annotations

import time
from typing import Any

import torch

_INTERVAL = 10
_PATIENCE = 3
_LEAST_S = 5e-3
"""Differences under this are those of a machine that has other things to do too."""


class Pace:
    """Measures in some steps how long this rank takes for what it does without the others.

    That is what the loader took for the batch, and what the innermost modules took in the forward.
    The step as a whole takes all ranks as long as the slowest of them, since they wait for it.

    Args:
        model: modules that are compiled are left alone.
        ratio: a rank is slow that takes so many times as long as the others do on average, in three
            measured steps in a row.
    Cost:
        In one step of ten, two hooks on every innermost module; some microseconds each.
    """

    def __init__(self, model: torch.nn.Module, ratio: float) -> None:
        self._modules = _innermost(model)
        self._ratio = ratio
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._seconds = 0.0
        self._fetch_seconds = 0.0
        self._entered: dict[int, float] = {}
        self._slow_in_a_row = 0
        self._is_told = False
        self.ratio_now = 1.0
        """To the others' mean, in the step that was measured last."""

    def note_fetch(self, seconds: float) -> None:
        """What the loader took for the batch of the step that begins."""
        self._fetch_seconds = seconds

    def begin(self, step: int) -> None:
        """A step begins; it may be one that is measured."""
        self.end()
        if (step + 1) % _INTERVAL:
            return  # nor the first one, in which models are compiled
        self._seconds = 0.0
        for module in self._modules:
            self._handles.append(module.register_forward_pre_hook(self._enter))
            self._handles.append(module.register_forward_hook(self._leave, prepend=True))

    @property
    def is_measured(self) -> bool:
        """Whether the present step is measured."""
        return bool(self._handles)

    def end(self) -> float:
        """Stops to measure; seconds that this rank was at work by itself."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._entered.clear()
        return self._seconds + self._fetch_seconds

    def is_news(self, mine: float, of_all: float, size: int) -> bool:
        """Compares with the others; whether this rank has turned out to be slow.

        Args:
            mine: seconds.
            of_all: those of all ranks together.
            size: ranks.
        """
        others = (of_all - mine) / (size - 1)
        self.ratio_now = mine / others if others > 0 else 1.0
        is_slow = mine > self._ratio * others and mine - others > _LEAST_S
        self._slow_in_a_row = self._slow_in_a_row + 1 if is_slow else 0
        is_news = self._slow_in_a_row >= _PATIENCE and not self._is_told
        self._is_told = is_slow and (self._is_told or is_news)
        return is_news

    def _enter(self, module: torch.nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling():
            self._entered[id(module)] = time.perf_counter()

    def _leave(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        begun = self._entered.pop(id(module), None)
        if begun is not None:
            self._seconds += time.perf_counter() - begun


def _innermost(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Those without modules in them; none of a model that is compiled in part."""
    modules = list(model.modules())
    if any(m._compiled_call_impl or type(m).__name__ == "OptimizedModule" for m in modules):
        return []
    return [m for m in modules if not any(m.children())]
