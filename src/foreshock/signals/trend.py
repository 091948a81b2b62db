"""Least-squares lines over sliding windows of observations, many series at once.

Shapes: S series of each of R rows, W places in a window.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

MIN_OBSERVATIONS = 3
"""Two points always lie on a line: only a third one says how well."""


class Lines(NamedTuple):
    """The line through each window, and how far its observations lie from it."""

    slope: Floats
    """(S, R) change per step; NaN with fewer than 3 observations."""
    spread: Floats
    """(R,) standard deviation (ddof 0) of the first series; NaN as above."""
    is_known: NDArray[np.bool_]
    """(R,) whether there were 3 observations."""


def fit_lines(
    x_RW: Floats,
    y_SRW: Floats,
    weight_RW: Floats,
    count_R: NDArray[Any],
    is_around_line: bool,
) -> Lines:
    """Fits a line to each window.

    slope = sum dx dy / sum dx^2, dx = x - mean x, dy = y - mean y
    spread = sqrt(mean (dy - slope dx)^2) around the line, or sqrt(mean dy^2) around the mean

    No sum of large squares is ever subtracted from another.

    Args:
        x_RW: steps, counted from anywhere near them.
        y_SRW: observations, 0 where there is none; of the series after the first only the slope is
            asked, and they are expected to be logarithms.
        weight_RW: 1 where there is an observation, 0 elsewhere.
        count_R: observations per row, the sum of its weights.
        is_around_line: whether the spread is that around the line.
    Cost:
        O(S R W), no loop in Python.
    """
    with np.errstate(all="ignore"):
        dx = (x_RW - (np.einsum("rw,rw->r", x_RW, weight_RW) / count_R)[:, None]) * weight_RW
        dy = (y_SRW[0] - (np.einsum("rw->r", y_SRW[0]) / count_R)[:, None]) * weight_RW
        slope = np.empty(y_SRW.shape[:2])
        np.einsum("rw,rw->r", dx, dy, out=slope[0])
        # The sum of dx is 0, so that a mean left in y drops out; of logarithms it costs no digits.
        np.einsum("rw,srw->sr", dx, y_SRW[1:], out=slope[1:])
        slope /= np.einsum("rw,rw->r", dx, dx)
        if is_around_line:
            dy -= slope[0][:, None] * dx
        spread = np.sqrt(np.einsum("rw,rw->r", dy, dy) / count_R)
    is_known = count_R >= MIN_OBSERVATIONS
    if not is_known.all():
        slope[:, ~is_known] = spread[~is_known] = np.nan
    return Lines(slope, spread, is_known)


class SlidingWindows:
    """The last observations of R rows, each with its own steps, S series to a row.

    A row that is passed over keeps its window as it is: the windows of two rows may reach back to
    different steps.

    Args:
        series: S.
        rows: R.
        size: W, observations kept per row.
    """

    def __init__(self, series: int, rows: int, size: int) -> None:
        self._steps_RW = np.zeros((rows, size), dtype=np.int64)
        self._values_SRW = np.zeros((series, rows, size))
        self._weight_RW = np.zeros((rows, size))
        self._pushed_R = np.zeros(rows, dtype=np.int64)

    @property
    def nbytes(self) -> int:
        """Memory held, which does not grow."""
        return sum(array.nbytes for array in self.arrays().values())

    def push(self, step: int, values_SR: Floats, rows: NDArray[np.intp]) -> None:
        """Enters one observation into each of the given rows, over the oldest of a full one."""
        places = self._pushed_R[rows] % self._steps_RW.shape[1]
        self._steps_RW[rows, places] = step
        self._values_SRW[:, rows, places] = values_SR[:, rows]
        self._weight_RW[rows, places] = 1.0
        self._pushed_R[rows] += 1

    def clear(self, row: int) -> None:
        """Forgets a row's observations."""
        self._values_SRW[:, row] = 0.0
        self._weight_RW[row] = 0.0
        self._pushed_R[row] = 0

    def fit(self, step: int, span: int | None, is_around_line: bool) -> Lines:
        """The lines through the windows as they are.

        Args:
            step: a recent one, from which steps are counted: a difference of integers is exact.
            span: observations of this many steps up to `step` count, and the last 3; None: all.
            is_around_line: as for `fit_lines`.
        """
        x_RW = (self._steps_RW - step).astype(np.float64)
        values_SRW, weight_RW = self._values_SRW, self._weight_RW
        if span is not None:
            is_in_span = (x_RW > -span) | (self._ages() < MIN_OBSERVATIONS)
            if not (is_in_span | (weight_RW == 0)).all():
                values_SRW, weight_RW = values_SRW * is_in_span, weight_RW * is_in_span
        count_R = weight_RW.sum(axis=1)
        return fit_lines(x_RW, values_SRW, weight_RW, count_R, is_around_line)

    def _ages(self) -> NDArray[np.int64]:
        """How many observations came after the one in each place."""
        size = self._steps_RW.shape[1]
        return (self._pushed_R[:, None] - 1 - np.arange(size)) % size

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The live arrays, by name: what a copy of the windows is made of."""
        return {
            "steps": self._steps_RW,
            "values": self._values_SRW,
            "weight": self._weight_RW,
            "pushed": self._pushed_R,
        }
