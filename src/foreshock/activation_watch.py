"""What the outputs of chosen modules look like, now and then."""

from __future__ import annotations

import difflib
import fnmatch
import functools
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from foreshock.guard.containers import tensors_in
from foreshock.guard.examination import UncopiedHook, is_capturing
from foreshock.host_read import Later
from foreshock.ops import health_scan

_log = logging.getLogger("foreshock")

MAX_MODULES = 256
_MOST_LISTED = 20


class _Activations(NamedTuple):
    """Of all outputs of a module in one step."""

    rms: float
    """Over the finite values; 0 where there are none."""
    absmax: float
    """Likewise."""
    nonfinite: int
    zeros: float
    """Share of all values that are 0."""


class ActivationWatch:
    """Hears the outputs of modules in one step of many.

    From the end of one step to the verdict on the next: an evaluation in between counts too. A
    module that is called more than once has all its outputs counted together. Of a compiled model
    nothing is heard, which is said once.

    Args:
        model: whose modules.
        patterns: shell patterns for their names.
        interval: judged steps between looks; the second step is looked at.
        record: told of each look, as the series "activations".
    Raises:
        ValueError: a pattern names no module, or they name too many; says what is accepted.
    Cost:
        In a step that is looked at, two reads of each output; the numbers are read at the next
        step, so as not to wait for a device. In others no hook is left.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        patterns: Sequence[str],
        interval: int,
        record: Callable[..., None],
    ) -> None:
        self._modules = chosen_modules(model, patterns)
        self._interval = interval
        self._record = record
        self._judged = 0
        self._hooks: list[Any] = []
        self._heard: list[tuple[str, torch.Tensor]] = []
        self._fault: Exception | None = None
        self._has_said_unheard = False
        self._found: tuple[int, list[str], Later] | None = None
        self._told: dict[str, float | int | str | None] = {}

    def note_step(self, step: int) -> None:
        """A step was judged."""
        self._take_in()
        if self._hooks:
            self._look(step)
        # Never in the first step: a graph that is compiled with hooks is compiled again without.
        if self._judged % self._interval == 0:
            self._hooks = [
                module.register_forward_hook(UncopiedHook(functools.partial(self._hear, name)))
                for name, module in self._modules.items()
            ]
        self._judged += 1

    def _hear(self, name: str, module: object, args: object, output: object) -> None:
        # Traced into a graph, it would be run in every step.
        if torch.compiler.is_compiling() or self._fault is not None or is_capturing():
            return
        try:
            self._heard += [
                (name, _measured(tensor.detach()))
                for _, tensor in tensors_in(output)
                if tensor.is_floating_point() and tensor.layout is torch.strided and tensor.numel()
            ]
        except Exception as error:  # the forward goes on; whoever asks what was heard is told
            self._fault = error

    def _look(self, step: int) -> None:
        self._stop_listening()
        heard, self._heard = self._heard, []
        if self._fault is not None:
            raise self._fault
        if heard:
            device = heard[0][1].device
            numbers = torch.stack([row.to(device, non_blocking=True) for _, row in heard])
            self._found = step, [name for name, _ in heard], Later(numbers)
        elif not self._has_said_unheard:
            self._has_said_unheard = True
            _log.info(
                "none of the activation_modules was heard in step %d: they were not called, or are "
                "part of a compiled model, where hooks do not run",
                step,
            )

    def _take_in(self) -> None:
        """Reads the last look, by now without waiting for a device."""
        found, self._found = self._found, None
        if found is None:
            return
        step, names, later = found
        seen = _by_module(names, later.get())
        self._told = {"activation_step": step, **_aggregated(seen)}
        by_statistic = {
            field: {name: getattr(one, field) for name, one in seen.items()}
            for field in _Activations._fields
        }
        self._record("activations", step, **by_statistic)

    def telemetry(self) -> dict[str, float | int | str | None]:
        """The last look that has been read; `activation_step` says when that was."""
        return dict(self._told)

    def close(self) -> None:
        """Stops listening, and reads the last look."""
        self._stop_listening()
        self._take_in()

    def _stop_listening(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def chosen_modules(model: torch.nn.Module, patterns: Sequence[str]) -> dict[str, torch.nn.Module]:
    """The modules whose names shell patterns match, in the order of the model.

    Args:
        model: whose; itself it has no name.
        patterns: each of which is to name one at least.
    Raises:
        ValueError: one does not, or they name too many; says what is accepted.
    """
    named = {name: module for name, module in model.named_modules() if name}
    for pattern in patterns:
        if not fnmatch.filter(named, pattern):
            raise ValueError(
                f"activation_modules has {pattern!r}, which matches no module; accepted: shell "
                f"patterns for {_listed(pattern, [*named])}"
            )
    chosen = {n: m for n, m in named.items() if any(fnmatch.fnmatchcase(n, p) for p in patterns)}
    if len(chosen) > MAX_MODULES:
        raise ValueError(
            f"activation_modules is {tuple(patterns)!r}, which matches {len(chosen)} modules; "
            f"accepted: patterns for up to {MAX_MODULES}"
        )
    return chosen


def _listed(pattern: str, names: list[str]) -> str:
    """The names that are most like a pattern, then the others."""
    near = difflib.get_close_matches(pattern, names, n=3)
    ordered = [*near, *(name for name in names if name not in near)]
    more = len(ordered) - _MOST_LISTED
    listed = ", ".join(map(repr, ordered[:_MOST_LISTED])) or "none, in this model"
    return listed + (f" and {more} more" if more > 0 else "")


def _measured(tensor: torch.Tensor) -> torch.Tensor:
    """(5,) float64: elements, those not finite, zeros, absmax, sum of squares."""
    stats = health_scan([tensor])
    num_zeros = tensor.numel() - torch.count_nonzero(tensor)
    counts = (stats.numel[0], stats.nonfinite[0], num_zeros)
    return torch.stack([*(c.double() for c in counts), stats.absmax[0], stats.sumsq[0]])


def _by_module(names: Sequence[str], rows: np.ndarray[Any, Any]) -> dict[str, _Activations]:
    seen: dict[str, _Activations] = {}
    calls: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        calls.setdefault(name, []).append(i)
    for name, places in calls.items():
        mine = rows[places]
        numel, nonfinite, zeros, _, sumsq = mine.sum(axis=0).tolist()
        rms = math.sqrt(sumsq / max(1, numel - nonfinite))
        seen[name] = _Activations(rms, float(mine[:, 3].max()), int(nonfinite), zeros / numel)
    return seen


def _aggregated(seen: dict[str, _Activations]) -> dict[str, float | int | str | None]:
    """The worst of all modules, and which that is."""
    rms = max(seen, key=lambda name: seen[name].rms)
    absmax = max(seen, key=lambda name: seen[name].absmax)
    zeros = max(seen, key=lambda name: seen[name].zeros)
    return {
        "activation_rms_max": seen[rms].rms,
        "activation_rms_max_module": rms,
        "activation_absmax": seen[absmax].absmax,
        "activation_absmax_module": absmax,
        "activation_zeros_max": seen[zeros].zeros,
        "activation_zeros_max_module": zeros,
        "activation_nonfinite": sum(one.nonfinite for one in seen.values()),
        # The first that was heard, which is the one that made them.
        "activation_nonfinite_module": next((n for n in seen if seen[n].nonfinite), None),
    }
