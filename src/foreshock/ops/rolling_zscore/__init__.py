"""rolling_zscore: how far each series' value is from the values before it, in one tick for all."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from foreshock.ops._backend import choose
from foreshock.ops._tensors import FLOATING_DTYPES, is_plain, local_tensors
from foreshock.ops.rolling_zscore import register as register
from foreshock.ops.rolling_zscore.state import DTYPES, M2, MEAN, NONFINITE, Settings, State

__all__ = ["RollingZScore"]

_is_traced = torch.compiler.is_dynamo_compiling


class RollingZScore:
    """z of each of S series' values against the up to `window` finite values before it.

        z = (value - mean) / std,   std = sqrt(sum (x - mean)^2 / (count - ddof))

    over the x in the window, then the value enters it. z is 0 until `min_count` values are in; at a
    std of 0 it is 0 for a value equal to the mean; it is never beyond +-z_cap. A value that is not
    finite has the z NaN, is counted in `nonfinite`, and never enters: the window is as it was. With
    `clip`, once `min_count` values are in and their std is above 0, a value enters no further from
    the mean than clip * std: a row of outliers does not raise its own threshold.

    >>> zscore = RollingZScore(2, window=128)
    >>> z = zscore.push([loss, gradient_norm])             # each step; valid until the next push

    Args:
        num_series: S, 0 or more.
        window: W, values that are remembered of each series; 1 or more.
        min_count: values before the first z; None for min(32, window).
        ddof: taken off the count in std: 0 (population), 1 (sample), or any below `min_count`.
        device: where the series are; None for the CPU. On CUDA a push is one kernel, waits for
            nothing and may be captured into a graph.
        dtype: of z, and of what is remembered of a value: float64 or float32. Values are rounded to
            it before anything else; mean and std are float64 all the same.
        clip: None, or a number of standard deviations above 0.
        z_cap: largest magnitude of z, above 0.
    Attributes:
        push_float: takes a Python number and returns its z as one, where there is one series and it
            is on the CPU: the way to push one that costs least. Elsewhere it raises a ValueError.
    Raises:
        TypeError, ValueError: naming the argument, what it is and what is accepted.
    Cost:
        O(1) for each value; 8 (W + 8) S bytes in float64. mean and std are within 1e-6 relative of
        what the window's values give directly, after any number of pushes, and as soon as an
        outlier has left, of any size whose square float64 holds.
    Source:
        Welford's update, with removal; csrc/rolling_zscore for why it does not drift.
    """

    def __init__(
        self,
        num_series: int,
        window: int,
        *,
        min_count: int | None = None,
        ddof: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float64,
        clip: float | None = None,
        z_cap: float = 1e6,
    ) -> None:
        _check_int("num_series", num_series, 0)
        _check_int("window", window, 1)
        _check_int("ddof", ddof, 0)
        min_count = min(32, window) if min_count is None else min_count
        _check_int("min_count", min_count, 1)
        if not ddof < min_count <= window:
            raise ValueError(
                f"min_count is {min_count}; accepted: more than ddof, {ddof}, "
                f"and not more than window, {window}"
            )
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype}; accepted: torch.float64, torch.float32")
        for name, value in (("clip", clip), ("z_cap", z_cap)):
            if not (name == "clip" and value is None):
                _check_above_zero(name, value)
        self._settings = Settings.of(min_count, ddof, clip, float(z_cap))
        place = _with_index(torch.device("cpu" if device is None else device))
        self._state = State.empty(num_series, window, dtype, place)
        self._shape = torch.Size([num_series])
        self._z = torch.zeros(num_series, dtype=dtype, device=place)
        module = choose("rolling_zscore", place.type).module
        self._push = module.bind(self._state, self._settings)
        self._push_vector = self._bind_vector(module)
        self.push_float: Callable[[float], float] = self._bind_float(module)

    def push(self, values: Tensor | Sequence[float] | float) -> Tensor:
        """Takes one value of each series and returns their z.

        Args:
            values: (S,) of any floating-point dtype, on the device of the series; for one series
                () as well; on the CPU also a sequence of S numbers, or for one series a number. Of
                a DTensor the local shard is read.
        Returns:
            (S,) of `dtype`, which the next push overwrites; under torch.compile a new tensor.
        Raises:
            TypeError, ValueError: naming `values`, what came and what is accepted.
        """
        if not _is_traced() and self._push_vector(values):
            return self._z
        return self._push_any(values)

    def _push_any(self, values: Tensor | Sequence[float] | float) -> Tensor:
        x = self._as_vector(values)
        if torch.compiler.is_compiling():
            min_count, ddof, clip, z_cap = self._settings
            clipped = None if clip == math.inf else clip
            z: Tensor = torch.ops.foreshock.rolling_zscore(
                x, *self._state, min_count, ddof, clipped, z_cap
            )
            return z
        if self.num_series:
            self._push(x, self._z)
        return self._z

    def _as_vector(self, values: Tensor | Sequence[float] | float) -> Tensor:
        """(S,) floating-point values on the device of the series."""
        device = self._z.device
        if not isinstance(values, Tensor):
            if device.type != "cpu":
                raise TypeError(
                    f"values is a {type(values).__name__}; accepted on {device}: a tensor there"
                )
            try:
                values = torch.tensor(values, dtype=self._z.dtype)
            except (TypeError, ValueError):
                raise TypeError(
                    f"values is a {type(values).__name__}; accepted: a floating-point tensor "
                    f"or {self.num_series} numbers"
                ) from None
        elif not is_plain(values):
            (local,) = local_tensors([values], name="values")
            assert local is not None
            values = local
        if values.dtype not in FLOATING_DTYPES:
            accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATING_DTYPES)
            raise TypeError(f"values has dtype {values.dtype}; accepted: {accepted}")
        if values.layout is not torch.strided:
            raise TypeError(f"values has layout {values.layout}; accepted: torch.strided")
        if values.device != device:
            raise ValueError(f"values is on {values.device}; accepted: {device}")
        if values.shape != self._shape and not (values.dim() == 0 and self.num_series == 1):
            raise ValueError(
                f"values has shape {tuple(values.shape)}; accepted: ({self.num_series},)"
            )
        return values.detach() if values.dim() else values.detach()[None]

    def _bind_vector(self, module: ModuleType) -> Callable[[object], bool]:
        """A push of what can be read in place; False says that this cannot."""
        if not hasattr(module, "bind_vector"):
            return lambda values: False
        bound: Callable[[object], bool] = module.bind_vector(self._state, self._settings, self._z)
        return bound

    def _bind_float(self, module: ModuleType) -> Callable[[float], float]:
        if self.num_series != 1 or self._z.device.type != "cpu":
            return self._refuse_float
        if hasattr(module, "bind_float"):
            bound: Callable[[float], float] = module.bind_float(self._state, self._settings)
            return bound
        return lambda value: self._push_any(float(value)).item()

    def _refuse_float(self, value: float) -> float:
        raise ValueError(
            f"push_float: there are {self.num_series} series on {self._z.device}; "
            "accepted: one on the CPU"
        )

    @property
    def num_series(self) -> int:
        """S."""
        return self._state.num_series

    @property
    def window(self) -> int:
        """W."""
        return self._state.window

    @property
    def count(self) -> Tensor:
        """int64 (S,): values in the window."""
        return self._state.filled

    @property
    def nonfinite(self) -> Tensor:
        """int64 (S,): values that were NaN or infinite."""
        return self._state.counts[NONFINITE].clone()

    @property
    def mean(self) -> Tensor:
        """float64 (S,): of the values in the window; NaN where there are none."""
        ring, moments, _ = self._state
        return torch.where(self.count > 0, ring[0] + moments[MEAN], torch.nan)

    @property
    def std(self) -> Tensor:
        """float64 (S,): of the values in the window; NaN where there are `ddof` or fewer."""
        freedom = self.count - self._settings.ddof
        variance = self._state.moments[M2] / freedom
        return torch.where(freedom > 0, variance, torch.nan).sqrt()

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that pushes change, for a checkpoint; shares no memory."""
        return {name: tensor.clone() for name, tensor in self._state._asdict().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts back what `state_dict` took, bit for bit, into the memory that is there.

        Raises:
            ValueError: naming the key that is missing, or what does not fit and what would.
        """
        mine = self._state._asdict()
        missing = set(mine) - set(state)
        if missing:
            raise ValueError(f"state has no {', '.join(sorted(missing))}; accepted: a state_dict()")
        for name, tensor in mine.items():
            came = state[name]
            if not isinstance(came, Tensor):
                raise ValueError(f"state[{name!r}] is a {type(came).__name__}; accepted: a tensor")
            if (came.shape, came.dtype) != (tensor.shape, tensor.dtype):
                raise ValueError(
                    f"state[{name!r}] is {tuple(came.shape)} {came.dtype}; "
                    f"accepted here: {tuple(tensor.shape)} {tensor.dtype}"
                )
        for name, tensor in mine.items():
            tensor.copy_(state[name])


def _check_int(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} is a {type(value).__name__}; accepted: an int")
    if value < least:
        raise ValueError(f"{name} is {value}; accepted: {least} or more")


def _check_above_zero(name: str, value: object) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} is a {type(value).__name__}; accepted: a number")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is {value}; accepted: a finite number above 0")


def _with_index(device: torch.device) -> torch.device:
    """The device that tensors made on it say they are on."""
    return torch.empty(0, device=device).device
