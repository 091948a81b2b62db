"""Every weight matrix of a model, looked at now and then while it is trained."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from foreshock.distributed_part import how_split, is_split
from foreshock.host_read import Later
from foreshock.ops import PowerIterator
from foreshock.ops.power_iteration import why_not_summed
from foreshock.signals.configuration import SpectralSettings
from foreshock.signals.optimizer_state import (
    second_moment_rms,
    weight_decays,
    why_no_second_moments,
)
from foreshock.signals.risk import RiskLevel
from foreshock.signals.spectral_tracker import SpectralReading, SpectralTracker

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_READ_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_MOST_PASSES = 14
_MOMENT_STEPS = 50
"""Fewest steps between looks at the second moments, which cost some ten passes."""
# Columns of SpectralStats.packed.
_SIGMA_MAX, _KAPPA, _STABLE_RANK = 0, 2, 3


@dataclasses.dataclass(frozen=True)
class SpectralObservation:
    """What one look at all matrices showed."""

    reading: SpectralReading
    muon_ratio: float | None
    """The largest weight_decay * sigma_max of any matrix; None if there is no decay."""
    muon_ratio_matrix: str | None
    """Whose it is."""
    second_moment_rms: float | None
    """RMS_t over all parameters; None if it was not looked at, or the optimizer keeps none."""


@dataclasses.dataclass
class _Begun:
    """A look whose numbers are on their way to the host."""

    step: int
    packed: list[tuple[list[int], Later]]
    """By device: which matrices, and `SpectralStats.packed` of them."""
    rms: Later | None


class SpectralWatch:
    """Follows the spectra of a model's weights with a `PowerIterator` and a `SpectralTracker`.

    Between two looks k steps apart the weights are read min(k, 14) times: never more than once a
    step, and often enough that sigma_max is that of now.

    >>> watch = SpectralWatch(dict(model.named_parameters()), optimizer, interval=50)
    >>> if watch.is_due(step):
    ...     reading = watch.observe(step, is_stepped=False).reading

    Args:
        parameters: by name. Those of fewer than two dimensions, that are not trained, or of an
            element type that is not read are passed over, and `passed_over` says why.
        optimizer: asked for weight decay and second moments.
        interval: steps between looks. While the level or the last reading is WARNING or more,
            every step is looked at.
        include: shell patterns for the names of the matrices that are watched.
        exclude: shell patterns for those that are not, though `include` names them.
        settings: of the tracker.
        group: of the ranks on which the parameters are split, all of which look at the same steps;
            what is seen is of the whole matrices, and the same on every rank. None: of what this
            process holds.
    Raises:
        ValueError: a pattern that fits no name, with the nearest one.
    Cost:
        At construction O(m + n) memory a matrix; see `observe` and `is_due`. With a group one
        all_reduce a pass.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer,
        interval: int = 50,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        settings: SpectralSettings | None = None,
        group: ProcessGroup | None = None,
    ) -> None:
        _check_patterns("include", [p for p in include if p != "*"], parameters)
        _check_patterns("exclude", exclude, parameters)
        self.passed_over: dict[str, str] = {}
        """Parameters of two or more dimensions that are not watched, and why not."""
        self._matrices: dict[str, Tensor] = {}
        for name, parameter in parameters.items():
            why_not = _why_not_read(parameter, group)
            if why_not is None and not _fits(name, include, exclude):
                why_not = "left out by spectral_include and spectral_exclude"
            if why_not is None:
                self._matrices[name] = parameter
            elif why_not:
                self.passed_over[name] = why_not
        self._parameters = list(parameters.values())
        self._optimizer = optimizer
        self._interval = interval
        self._group = group
        self._tracker = SpectralTracker(list(self._matrices), settings)
        self._last_step: int | None = None
        self._begun: _Begun | None = None
        self._bind()

    def _bind(self) -> None:
        """Cold iterators, one for the matrices of each device."""
        places: dict[torch.device, list[int]] = {}
        matrices = list(self._matrices.values())
        for i, matrix in enumerate(matrices):
            places.setdefault(matrix.device, []).append(i)
        self._iterators = [
            (where, PowerIterator([matrices[i] for i in where], group=self._group))
            for where in places.values()
        ]

    @property
    def names(self) -> tuple[str, ...]:
        """The matrices that are watched."""
        return tuple(self._matrices)

    @property
    def level(self) -> RiskLevel:
        """The model's level: the one that has held for `patience` observations."""
        return self._tracker.level

    @property
    def is_restless(self) -> bool:
        """Whether the level, or what was seen last, is WARNING or more."""
        return max(self.level, self._tracker.raw_level or RiskLevel.STABLE) >= RiskLevel.WARNING

    def is_due(self, step: int) -> bool:
        """Whether the matrices are to be looked at in this step."""
        return self.can_begin(step) and (step % self._interval == 0 or self.is_restless)

    def can_begin(self, step: int) -> bool:
        """Whether there is anything to look at, and no look at this step or a later one."""
        return bool(self._matrices) and (self._last_step is None or self._last_step < step)

    def observe(
        self, step: int, *, is_stepped: bool, grad_scale: Tensor | None = None
    ) -> SpectralObservation:
        """Looks at all matrices as they are now.

        Args:
            step: training step, greater than that of the observation before.
            is_stepped: whether the optimizer has taken in the gradients that there are.
            grad_scale: () what it is still to divide them by, if anything.
        Cost:
            min(k, 14) reads of the matrices, k steps after the last look; 14 the first time. Some
            hundred microseconds on the host, and one synchronisation per device. At the interval,
            but at most every 50 steps, also the passes of `second_moment_rms`.
        """
        self.begin(step, is_stepped=is_stepped, grad_scale=grad_scale)
        observation = self.collect()
        assert observation is not None
        return observation

    def begin(self, step: int, *, is_stepped: bool, grad_scale: Tensor | None = None) -> None:
        """The first half of `observe`: what waits for no device. One at a time."""
        gap = 1 if self._last_step is None else step - self._last_step
        self._last_step = step
        passes = min(max(gap, 1), _MOST_PASSES)
        found = [(where, Later(it(warm_iters=passes).packed)) for where, it in self._iterators]
        is_due = step % max(self._interval, _MOMENT_STEPS) == 0
        rms = self._second_moment_rms(is_stepped, grad_scale) if is_due else None
        self._begun = _Begun(step, found, rms)

    def collect(self) -> SpectralObservation | None:
        """The second half: reads what was begun; None if nothing was."""
        begun, self._begun = self._begun, None
        if begun is None:
            return None
        packed = np.empty((len(self._matrices), 5))
        for where, found in begun.packed:
            packed[where] = found.get()
        sigma_max, rank = packed[:, _SIGMA_MAX], packed[:, _STABLE_RANK]
        reading = self._tracker.update(begun.step, packed[:, _KAPPA], sigma_max, rank)
        ratio, owner = self._largest_muon_ratio(sigma_max)
        rms = None if begun.rms is None else float(begun.rms.get())
        return SpectralObservation(reading, ratio, owner, rms)

    def _largest_muon_ratio(
        self, sigma_max: np.ndarray[Any, Any]
    ) -> tuple[float | None, str | None]:
        ratios = sigma_max * weight_decays(self._optimizer, self._matrices.values())
        if not (ratios > 0).any():
            return None, None
        largest = int(np.nanargmax(ratios))
        return float(ratios[largest]), self.names[largest]

    def _second_moment_rms(self, is_stepped: bool, grad_scale: Tensor | None) -> Later | None:
        if why_no_second_moments(self._optimizer) is not None:
            return None
        found = second_moment_rms(
            self._optimizer, self._parameters, is_stepped=is_stepped, grad_scale=grad_scale
        )
        return Later(found.total) if found.index else None

    def state_dict(self) -> dict[str, Any]:
        """Everything that later observations depend on, but the weights; shares no memory."""
        return {
            "last_step": self._last_step,
            "split": self._split(),
            "tracker": self._tracker.state_dict(),
            "iterators": [iterator.state.state_dict() for _, iterator in self._iterators],
        }

    def _split(self) -> list[str]:
        return [how_split(matrix) for matrix in self._matrices.values()]

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Makes later observations those that the saved watch would have made, bit for bit.

        Directions saved for another memory layout, other devices, or matrices that were split over
        ranks in another way, are started anew.

        Raises:
            KeyError, ValueError: it is another watch's; nothing was loaded.
        """
        self._tracker.load_state_dict(state_dict["tracker"])
        self._last_step = state_dict["last_step"]
        self._begun = None
        saved = state_dict["iterators"]
        if state_dict.get("split", self._split()) != self._split():
            # On all ranks, or some would begin with more passes, and wait in them for the others.
            self._bind()
            return
        try:
            for (_, iterator), state in zip(self._iterators, saved, strict=True):
                iterator.state.load_state_dict(state)
        except ValueError:
            self._bind()


def _why_not_read(parameter: Tensor, group: ProcessGroup | None) -> str | None:
    """None for a matrix that is read; empty for what is no matrix."""
    if torch.nn.parameter.is_lazy(parameter):
        return "not initialised yet"
    if parameter.dim() < 2:
        return ""
    if not parameter.requires_grad:
        return "not trained"
    if parameter.dtype not in _READ_DTYPES or parameter.layout is not torch.strided:
        return f"{str(parameter.dtype).removeprefix('torch.')}, {parameter.layout} is not read"
    if group is not None:
        return why_not_summed(parameter, group)
    return "split over ranks" if is_split(parameter) else None


def _fits(name: str, include: Iterable[str], exclude: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, p) for p in include) and not any(
        fnmatch.fnmatchcase(name, p) for p in exclude
    )


def _check_patterns(argument: str, patterns: Iterable[str], names: Iterable[str]) -> None:
    """A misspelt pattern would be a choice that silently does nothing."""
    known = list(names)
    for pattern in patterns:
        if not fnmatch.filter(known, pattern):
            near = difflib.get_close_matches(pattern, known, n=1, cutoff=0.0)
            hint = f"; the nearest name is {near[0]!r}" if near else ""
            raise ValueError(
                f"{argument} has {pattern!r}, which fits no parameter{hint}; "
                "accepted: shell patterns for names of parameters"
            )
