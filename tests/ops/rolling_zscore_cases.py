"""What the tests of rolling_zscore share: implementations, and the definition, done directly."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from foreshock.ops._backend import Choice, supported_isas
from foreshock.ops.rolling_zscore import cpu, reference
from foreshock.ops.rolling_zscore.state import Settings, State

Bind = Callable[[State, Settings], Callable[[Tensor, Tensor], object]]

CPU = torch.device("cpu")
IMPLEMENTATIONS: dict[str, Any] = {
    "reference": reference,
    **{
        f"cpu-{isa}": SimpleNamespace(
            **{
                name: functools.partial(getattr(cpu, name), isa=isa)
                for name in ("bind", "bind_rows", "bind_vector", "bind_float")
            }
        )
        for isa in supported_isas()
    },
}
COMPILED = [name for name in IMPLEMENTATIONS if name != "reference"]

# Against 80-bit floats, |z - expected| / (1 + |expected|). Measured over windows of 1 to 33, every
# instruction set and `troubled` values: 8e-13 in float64, 5.3e-8 in float32, which is its rounding.
# With outliers of 1e3, too small to have anything recomputed after them: 2e-11.
Z_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1.2e-7}


def use(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choice = Choice(name, IMPLEMENTATIONS[name], {})
    for module in ("foreshock.ops.rolling_zscore", "foreshock.ops.rolling_zscore.register"):
        monkeypatch.setattr(importlib.import_module(module), "choose", lambda *_: choice)


def run(
    bind: Bind, values: Tensor, window: int, settings: Settings, dtype: torch.dtype
) -> tuple[Tensor, State]:
    """z of (T, S) values that are pushed row by row, and the state after."""
    state = State.empty(values.shape[1], window, dtype, values.device)
    push = bind(state, settings)
    z = torch.full(values.shape, 7.0, dtype=dtype, device=values.device)
    for row, scores in zip(values, z, strict=True):
        push(row, scores)
    return z, state


class Direct:
    """The definition, of one series: everything anew at each push, in 80 bits where there are."""

    def __init__(self, window: int, settings: Settings, dtype: torch.dtype = torch.float64) -> None:
        self.values: list[float] = []
        self.nonfinite = 0
        self.window, self.settings = window, settings
        self.kept: Any = np.float64 if dtype is torch.float64 else np.float32

    @property
    def mean(self) -> Any:
        return np.mean(np.array(self.values, np.longdouble)) if self.values else np.nan

    @property
    def std(self) -> Any:
        freedom = len(self.values) - self.settings.ddof
        if freedom <= 0:
            return np.nan
        deviations = np.array(self.values, np.longdouble) - self.mean
        return np.sqrt(np.square(deviations).sum() / freedom)

    def push(self, value: float) -> float:
        x = self.kept(value)
        if not np.isfinite(x):
            self.nonfinite += 1
            return np.nan
        _, _, clip, z_cap = self.settings
        entering, z = float(x), 0.0
        if len(self.values) >= self.settings.min_count:
            mean, std = self.mean, self.std
            deviation = np.longdouble(x) - mean
            if std > 0:
                z = float(np.clip(deviation / std, -z_cap, z_cap))
                edge = np.clip(deviation, -clip * std, clip * std)
                entering = float(x) if edge == deviation else float(self.kept(mean + edge))
            else:
                z = float(z_cap * np.sign(deviation))
        self.values = [*self.values, entering][-self.window :]
        return z


def direct(values: Tensor, window: int, settings: Settings, dtype: torch.dtype) -> Tensor:
    """z of (T, S) values."""
    series = [Direct(window, settings, dtype) for _ in range(values.shape[1])]
    rows = [[one.push(x) for one, x in zip(series, row, strict=True)] for row in values.tolist()]
    return torch.tensor(rows, dtype=torch.float64).view(values.shape)


def assert_scores(found: Tensor, expected: Tensor) -> None:
    assert torch.equal(found.isnan(), expected.isnan())
    error = (found.double() - expected.double()).abs() / (1 + expected.double().abs())
    worst = error.nan_to_num(0).max().item() if error.numel() else 0
    assert worst <= Z_TOLERANCE[found.dtype], worst


def troubled(ticks: int, series: int, seed: int = 0) -> Tensor:
    """Values at an offset, with NaN, infinities, repeats, outliers, and a constant series."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(ticks, series, dtype=torch.float64, generator=generator) + 1e3
    draw = torch.rand(ticks, series, generator=generator)
    values[draw < 0.03] = torch.nan
    values[(draw > 0.03) & (draw < 0.04)] = torch.inf
    values[(draw > 0.04) & (draw < 0.05)] = -torch.inf
    values[(draw > 0.05) & (draw < 0.07)] = 1e8
    values[(draw > 0.07) & (draw < 0.1)] = 1e3
    values[:, 3:4] = -2.5
    return values
