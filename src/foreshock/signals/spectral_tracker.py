"""The spectral risk of a model: every weight matrix, and all of them together."""

from __future__ import annotations

import dataclasses
import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from foreshock.signals.configuration import SpectralSettings
from foreshock.signals.risk import RiskLevel, as_floats, risk_levels
from foreshock.signals.trend import Floats, SlidingWindows

_AGGREGATES: dict[str, Callable[[Floats], Any]] = {
    "max": np.max,
    "mean": np.mean,
    "median": np.median,
}

# The series of a matrix, in the order in which they are kept.
_KAPPA, _SIGMA, _RANK = range(3)


@dataclasses.dataclass(frozen=True)
class MatrixReading:
    """What is known of one matrix. None: fewer than 3 observations."""

    name: str
    kappa: float
    """Condition-number proxy as it came last."""
    slope: float | None
    """Change of kappa per step, in the settings' scale."""
    volatility: float | None
    """Spread of kappa, in the settings' scale."""
    level: RiskLevel
    """The level that has held for `patience` observations."""
    raw_level: RiskLevel | None
    """The level by slope and volatility of this moment."""
    sigma_max: float
    """Largest singular value as it came last."""
    sigma_growth: float | None
    """Slope of ln sigma_max: relative growth per step."""
    stable_rank: float
    """(frobenius / sigma_max)^2 as it came last."""
    stable_rank_fall: float | None
    """Slope of -ln stable_rank: relative fall per step."""


@dataclasses.dataclass(frozen=True)
class SpectralReading:
    """What one observation of all matrices showed. None: fewer than 3 observations."""

    step: int
    kappa: float
    """Aggregate over the matrices; NaN if there was none to be had."""
    slope: float | None
    """Change of the aggregate per step, in the settings' scale."""
    volatility: float | None
    """Spread of the aggregate, in the settings' scale."""
    level: RiskLevel
    """The model's level: the one that has held for `patience` observations, STABLE at first."""
    raw_level: RiskLevel | None
    """The level by slope and volatility of this moment."""
    worst: tuple[MatrixReading, ...]
    """The matrices at the highest risk, worst first."""
    sigma_growth: float | None
    """The fastest relative growth per step of any matrix's sigma_max."""
    sigma_growth_matrix: str | None
    """Whose it is."""
    stable_rank_fall: float | None
    """The fastest relative fall per step of any matrix's stable rank."""
    stable_rank_fall_matrix: str | None
    """Whose it is."""
    nonfinite: tuple[str, ...]
    """Matrices whose numbers were NaN or infinite, and did not enter their windows."""


class SpectralTracker:
    """Follows the condition-number proxy of every matrix and tells when it starts to run or shake.

    kappa, slope and volatility are judged per matrix and for the aggregate
    kappa_t = max (or mean, median) over matrices of kappa_tilde

    - A level rises once `patience` observations in a row lay above it, to the lowest of them, and
      falls once as many lay below it, to the highest of them. A risk that changes between two
      levels counts as the one that is nearer to where it came from, and does not flap.
    - Numbers that are not finite enter no window, change no level, and are reported: a NaN weight
      is the guard's business. While a matrix that was finite before is not, the aggregate stands
      still, since what is left is another quantity.
    - A matrix of zeros (kappa 0, as LoRA starts with) is not observed. When the set of observed
      matrices changes, the aggregate's window starts anew and its level stays.

    >>> tracker = SpectralTracker(["attention.weight", "head.weight"])
    >>> reading = tracker.update(step=100, kappa=[31.0, 12.5], sigma_max=[2.0, 1.1],
    ...                          stable_rank=[9.8, 64.0])
    >>> reading.level, [m.name for m in reading.worst]
    (<RiskLevel.STABLE: 0>, ['attention.weight', 'head.weight'])

    Args:
        names: of the M matrices, all different.
        settings: default `SpectralSettings()`.
    Raises:
        TypeError, ValueError: naming the argument, what was given and what is accepted.
    Cost:
        O(M window) per update, without a loop over matrices; 40 M window bytes of memory.
    """

    def __init__(self, names: Sequence[str], settings: SpectralSettings | None = None) -> None:
        self._names = _checked_names(names)
        self._settings = _checked_settings(settings)
        matrices = len(self._names)
        rows = matrices + 1  # the last one is the aggregate's
        self._windows = SlidingWindows(3, rows, self._settings.window)
        self._recent = np.zeros((self._settings.patience, rows), dtype=np.int8)
        self._judged = np.zeros(rows, dtype=np.int64)
        self._levels = np.zeros(rows, dtype=np.int8)
        self._members = np.zeros(matrices, dtype=np.bool_)
        self._latest = np.full((3, matrices), np.nan)
        self._step: int | None = None
        self._measure()

    @property
    def level(self) -> RiskLevel:
        """The model's level."""
        return RiskLevel(int(self._levels[-1]))

    @property
    def raw_level(self) -> RiskLevel | None:
        """The model's level by slope and volatility of this moment."""
        return self._raw_level(-1)

    @property
    def nbytes(self) -> int:
        """Memory that the windows hold; it does not grow."""
        return self._windows.nbytes

    def update(
        self, step: int, kappa: ArrayLike, sigma_max: ArrayLike, stable_rank: ArrayLike
    ) -> SpectralReading:
        """Takes in one observation of every matrix.

        Args:
            step: training step, greater than that of the observation before; steps may be left
                out.
            kappa: (M,) condition-number proxies, not negative, in host memory.
            sigma_max: (M,) largest singular values.
            stable_rank: (M,) stable ranks.
        Raises:
            TypeError, ValueError: naming the argument, what was given and what is accepted; nothing
                was taken in.
        Cost:
            O(M window).
        """
        step = self._checked_step(step)
        latest = self._checked(kappa=kappa, sigma_max=sigma_max, stable_rank=stable_rank)
        is_finite: NDArray[np.bool_] = np.logical_and.reduce(np.isfinite(latest))
        is_seen = is_finite & np.logical_and.reduce(latest > 0)
        is_nonfinite = ~is_finite & (latest[_KAPPA] != 0)
        aggregate = self._aggregate(latest[_KAPPA], is_seen, is_nonfinite)
        rows = np.flatnonzero(np.append(is_seen, np.isfinite(aggregate)))
        self._windows.push(step, self._observations(latest, is_seen, aggregate), rows)
        self._step, self._latest = step, latest
        self._measure()
        self._judge(rows)
        return self._reading(step, aggregate, is_nonfinite)

    def worst(self, k: int = 1) -> tuple[MatrixReading, ...]:
        """The k matrices at the highest risk at this moment, worst first.

        Ordered by raw level, then by max(volatility / thresholds.instability,
        |slope| / thresholds.danger), then by kappa; those not judged yet come last.

        Raises:
            ValueError: k is not a positive integer.
        """
        if not isinstance(k, int) or k < 1:
            raise ValueError(f"k is {k!r}; accepted: a positive integer")
        if self._step is None:
            return ()
        limits = self._settings.thresholds
        size, volatility = np.abs(self._lines.slope[_KAPPA, :-1]), self._lines.spread[:-1]
        with np.errstate(all="ignore"):
            excess = np.fmax(volatility / limits.instability, size / limits.danger)
        # A NaN is sorted last.
        order = np.lexsort((-self._latest[_KAPPA], -excess, -self._raw[:-1]))
        return tuple(self._matrix(int(i)) for i in order[:k])

    def state_dict(self) -> dict[str, Any]:
        """Everything that later readings depend on, as copies.

        Returns:
            Tensors in host memory, numbers, strings, and containers of them.
        """
        return {
            "names": list(self._names),
            "settings": self._shape(),
            "step": self._step,
            **{name: torch.from_numpy(array.copy()) for name, array in self._arrays().items()},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Makes later readings, bit for bit, those that the saved tracker would have given.

        Args:
            state_dict: from a tracker of the same names, window, span, patience, scale and
                aggregate;
                thresholds are this tracker's own.
        Raises:
            KeyError: an entry is missing.
            ValueError: it is another tracker's; nothing was loaded.
        """
        for key, mine in (("names", list(self._names)), ("settings", self._shape())):
            if state_dict[key] != mine:
                raise ValueError(f"state_dict[{key!r}] is {state_dict[key]!r}; accepted: {mine!r}")
        live = self._arrays()
        saved = {name: np.asarray(state_dict[name]) for name in live}
        for name, array in live.items():
            if saved[name].shape != array.shape or saved[name].dtype != array.dtype:
                given = f"{saved[name].dtype} of shape {saved[name].shape}"
                raise ValueError(
                    f"state_dict[{name!r}] is {given}; accepted: {array.dtype} of {array.shape}"
                )
        self._step = state_dict["step"]
        for name, array in live.items():
            array[...] = saved[name]
        self._measure()

    def _shape(self) -> dict[str, Any]:
        """The settings without which saved windows would mean something else."""
        return self._settings.model_dump(
            include={"window", "span", "patience", "scale", "aggregate"}
        )

    def _arrays(self) -> dict[str, NDArray[Any]]:
        return {
            **self._windows.arrays(),
            "recent": self._recent,
            "judged": self._judged,
            "levels": self._levels,
            "members": self._members,
            "latest": self._latest,
        }

    def _checked_step(self, step: int) -> int:
        try:
            step = operator.index(step)
        except TypeError:
            raise TypeError(f"step is {step!r}; accepted: an integer") from None
        if self._step is not None and step <= self._step:
            raise ValueError(f"step is {step}; accepted: more than {self._step}, the one before")
        return step

    def _checked(self, **columns: ArrayLike) -> Floats:
        """(3, M) the arguments in one array."""
        checked = np.empty((3, len(self._names)))
        for row, (name, values) in zip(checked, columns.items(), strict=True):
            floats = as_floats(values, name)
            if len(floats) != len(row):
                raise ValueError(
                    f"{name} holds {len(floats)} values; accepted: {len(row)}, one per matrix"
                )
            row[:] = floats
        if (checked < 0).any():
            c, i = np.argwhere(checked < 0)[0].tolist()
            raise ValueError(
                f"{list(columns)[c]}[{i}] ({self._names[i]}) is {checked[c, i]}; accepted: numbers "
                "from 0 up"
            )
        return checked

    def _aggregate(
        self, kappa: Floats, is_seen: NDArray[np.bool_], is_nonfinite: NDArray[np.bool_]
    ) -> float:
        """The aggregate of the matrices seen; NaN while it cannot be compared with those before.

        When other matrices are seen than before, its window starts anew.
        """
        if (is_nonfinite & self._members).any() or not is_seen.any():
            return float("nan")
        if not np.array_equal(is_seen, self._members):
            self._members[:] = is_seen
            self._windows.clear(-1)
        with np.errstate(over="ignore"):
            return float(_AGGREGATES[self._settings.aggregate](kappa[is_seen]))

    def _observations(self, latest: Floats, is_seen: NDArray[np.bool_], aggregate: float) -> Floats:
        """(3, M + 1) what enters the windows; of rows that are passed over, anything finite."""
        safe = np.ones((3, len(self._names) + 1))
        np.copyto(safe[:, :-1], latest, where=is_seen)
        if np.isfinite(aggregate):
            safe[_KAPPA, -1] = aggregate
        logs = np.log(safe)
        if self._settings.scale == "absolute":
            logs[_KAPPA] = safe[_KAPPA]
        return logs

    def _measure(self) -> None:
        """Slopes, volatilities and raw levels (-1: not known) of the windows as they are."""
        is_relative = self._settings.scale == "relative"
        self._lines = self._windows.fit(self._step or 0, self._settings.span, is_relative)
        slope, volatility = self._lines.slope[_KAPPA], self._lines.spread
        self._raw = risk_levels(slope, volatility, self._settings.thresholds)
        self._raw[~self._lines.is_known] = -1

    def _judge(self, rows: NDArray[np.intp]) -> None:
        """Moves levels as far as the last `patience` observations agree."""
        rows = rows[self._lines.is_known[rows]]
        self._recent[self._judged[rows] % len(self._recent), rows] = self._raw[rows]
        self._judged[rows] += 1
        # Places not written yet hold STABLE, which the levels start from.
        np.maximum(self._levels, self._recent.min(axis=0), out=self._levels)
        np.minimum(self._levels, self._recent.max(axis=0), out=self._levels)

    def _reading(
        self, step: int, aggregate: float, is_nonfinite: NDArray[np.bool_]
    ) -> SpectralReading:
        growth, grower = self._fastest(self._lines.slope[_SIGMA, :-1])
        fall, faller = self._fastest(-self._lines.slope[_RANK, :-1])
        return SpectralReading(
            step=step,
            kappa=aggregate,
            slope=self._if_known(self._lines.slope[_KAPPA], -1),
            volatility=self._if_known(self._lines.spread, -1),
            level=self.level,
            raw_level=self._raw_level(-1),
            worst=self.worst(self._settings.worst),
            sigma_growth=growth,
            sigma_growth_matrix=grower,
            stable_rank_fall=fall,
            stable_rank_fall_matrix=faller,
            nonfinite=tuple(self._names[i] for i in np.flatnonzero(is_nonfinite)),
        )

    def _matrix(self, i: int) -> MatrixReading:
        kappa, sigma, rank = self._latest[:, i].tolist()
        fall = self._if_known(-self._lines.slope[_RANK], i)
        return MatrixReading(
            name=self._names[i],
            kappa=kappa,
            slope=self._if_known(self._lines.slope[_KAPPA], i),
            volatility=self._if_known(self._lines.spread, i),
            level=RiskLevel(int(self._levels[i])),
            raw_level=self._raw_level(i),
            sigma_max=sigma,
            sigma_growth=self._if_known(self._lines.slope[_SIGMA], i),
            stable_rank=rank,
            stable_rank_fall=fall,
        )

    def _fastest(self, rates: Floats) -> tuple[float | None, str | None]:
        is_known = self._lines.is_known[:-1]
        if not is_known.any():
            return None, None
        i = int(np.where(is_known, rates, -np.inf).argmax())
        return float(rates[i]), self._names[i]

    def _if_known(self, values: Floats, row: int) -> float | None:
        return float(values[row]) if self._lines.is_known[row] else None

    def _raw_level(self, row: int) -> RiskLevel | None:
        return RiskLevel(int(self._raw[row])) if self._lines.is_known[row] else None


def _checked_names(names: Sequence[str]) -> tuple[str, ...]:
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"names is {names!r}; accepted: a sequence of strings")
    repeated = [name for name, times in Counter(names).items() if times > 1]
    if repeated:
        raise ValueError(f"names holds {repeated[0]!r} more than once; accepted: different names")
    return tuple(names)


def _checked_settings(settings: Any) -> SpectralSettings:
    if settings is None:
        return SpectralSettings()
    if not isinstance(settings, SpectralSettings):
        given = type(settings).__name__
        raise TypeError(f"settings is a {given}; accepted: SpectralSettings or None")
    return settings
