"""The statistics of the noise fingerprint, taken from a run as it goes.

Plain numbers in the host's memory: nothing here touches a device. `update` only takes in, and
costs about a microsecond; `read` computes. Values that are not finite enter no window.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Mapping
from typing import Any

from foreshock.signals.given_numbers import as_count, as_number
from foreshock.signals.noise_statistics import (
    as_beta,
    entropy_rate,
    processivity,
    theta_consistency,
)
from foreshock.signals.saved_state import check_settings, saved_floats

MIN_MEDIAN_OF = 8
"""Fewer values than this say too little of quartiles."""

# Tukey's outer fences: for normal noise 4.7 standard deviations off.
_FENCE = 3.0


class NoiseSeries:
    """What is left of a series without its course: each value less the running median.

    y = x, or ln x (logarithmic); r = clip(y - median, q1 - 3 (q3 - q1) - median,
    q3 + 3 (q3 - q1) - median), median and quartiles q1, q3 of the last values of y before this one

    - Not the successive differences: these take the low frequencies away, where an oscillation
      that builds up is seen. Not an average: a single spike would hang in it.
    - Outliers come out winsorised, or one spike in a reference would be its whole spectrum. A
      series that did not vary at all has no fences.
    - Gradient norms are taken as logarithms, so that their noise is relative; losses, which may be
      negative, as they are.

    Args:
        median_of: values of which the median is taken, at least 8.
        is_logarithmic: whether ln x is looked at; values not over 0 are then left out.
    Raises:
        TypeError, ValueError: naming the argument, what was given and what is accepted.
    Cost:
        O(median_of) per update with a very small factor; memory O(median_of).
    Source:
        Tukey 1977 for the fences.
    """

    def __init__(self, median_of: int = 31, *, is_logarithmic: bool = False) -> None:
        self._median_of = as_count(median_of, "median_of", at_least=MIN_MEDIAN_OF)
        self._is_logarithmic = bool(is_logarithmic)
        self._recent: deque[float] = deque(maxlen=self._median_of)
        self._sorted: list[float] = []

    def update(self, value: float) -> float | None:
        """Takes in one value.

        Returns:
            Its noise; None until there are 8 values before it, and for one that cannot be used.
        """
        value = as_number(value, "value")
        if not math.isfinite(value) or (self._is_logarithmic and value <= 0):
            return None
        y = math.log(value) if self._is_logarithmic else value
        residual = self._residual(y) if len(self._sorted) >= MIN_MEDIAN_OF else None
        if len(self._recent) == self._median_of:
            del self._sorted[bisect_left(self._sorted, self._recent[0])]
        self._recent.append(y)
        insort(self._sorted, y)
        return residual

    def state_dict(self) -> dict[str, Any]:
        """Everything that later noise depends on: numbers and lists of them, as JSON has them."""
        return {"settings": self._settings(), "recent": list(self._recent)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Makes later noise, bit for bit, that which the saved one would have given.

        Raises:
            KeyError: an entry is missing.
            TypeError, ValueError: it is another one's; nothing was loaded.
        """
        check_settings(state_dict, self._settings())
        recent = saved_floats(state_dict, "recent", self._median_of)
        self._recent = deque(recent, maxlen=self._median_of)
        self._sorted = sorted(recent)

    def _settings(self) -> dict[str, Any]:
        return {"median_of": self._median_of, "is_logarithmic": self._is_logarithmic}

    def _residual(self, y: float) -> float | None:
        ranks, n = self._sorted, len(self._sorted)
        median, low, high = ranks[n // 2], ranks[n // 4], ranks[3 * n // 4]
        reach = _FENCE * (high - low)
        if reach > 0:
            y = min(max(y, low - reach), high + reach)
        residual = y - median
        return residual if math.isfinite(residual) else None


class NoiseReference:
    """The noise of a healthy run: the first of it, or that of an earlier run.

    Args:
        steps: values that make it up, at least 2.
    """

    def __init__(self, steps: int = 128) -> None:
        self.steps = as_count(steps, "steps", at_least=2)
        """Values that make it up."""
        self._values: list[float] = []

    @property
    def is_complete(self) -> bool:
        """Whether it can be compared with; from then on it does not change."""
        return len(self._values) == self.steps

    @property
    def values(self) -> tuple[float, ...]:
        """What was recorded so far, oldest first."""
        return tuple(self._values)

    def update(self, value: float) -> None:
        """Records one value, unless it is complete."""
        value = as_number(value, "value")
        if math.isfinite(value) and not self.is_complete:
            self._values.append(value)

    def self_consistency(self, beta: float = 3.0) -> float | None:
        """Theta of its second half against its first: what healthy noise is at, by this reference.

        None until it is complete.
        """
        half = self.steps // 2
        if not self.is_complete:
            return None
        return theta_consistency(self._values[-half:], self._values[:half], beta)

    def state_dict(self) -> dict[str, Any]:
        """The values, as JSON has them."""
        return {"settings": {"steps": self.steps}, "values": list(self._values)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over a recorded reference.

        Raises:
            KeyError: an entry is missing.
            TypeError, ValueError: it is one of another length; nothing was loaded.
        """
        check_settings(state_dict, {"steps": self.steps})
        self._values = saved_floats(state_dict, "values", self.steps)


class ThetaStream:
    """`theta_consistency` of the last values of a noise against a reference.

    Values go to the reference until it is complete, and to the window thereafter: the two never
    share one.

    Args:
        window: values compared, at least 2.
        reference_steps: values of the reference; best as many as in the window.
        beta: as for `theta_consistency`.
    Raises:
        TypeError, ValueError: naming the argument, what was given and what is accepted.
    """

    def __init__(self, window: int = 128, reference_steps: int = 128, beta: float = 3.0) -> None:
        self._window: deque[float] = deque(maxlen=as_count(window, "window", at_least=2))
        self._beta = as_beta(beta)
        self.reference = NoiseReference(reference_steps)
        """What is compared with."""

    def update(self, value: float) -> None:
        """Takes in one value of the noise, from `NoiseSeries`."""
        value = as_number(value, "value")
        if not math.isfinite(value):
            return
        if self.reference.is_complete:
            self._window.append(value)
        else:
            self.reference.update(value)

    def read(self) -> float | None:
        """Theta; None until reference and window are complete."""
        if len(self._window) < (self._window.maxlen or 0):
            return None
        return theta_consistency(list(self._window), self.reference.values, self._beta)

    def load_reference(self, state_dict: Mapping[str, Any]) -> None:
        """Compares from now on with another reference, and with none of the values so far.

        Args:
            state_dict: from a `NoiseReference` of as many steps, complete.
        """
        held, needed = len(state_dict["values"]), self.reference.steps
        if held != needed:
            raise ValueError(f"state_dict['values'] holds {held} values; accepted: {needed}")
        self.reference.load_state_dict(state_dict)
        self._window.clear()

    def state_dict(self) -> dict[str, Any]:
        """Everything that later readings depend on: numbers and lists of them, as JSON has them."""
        return {
            "settings": self._settings(),
            "reference": self.reference.state_dict(),
            "window": list(self._window),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Makes later readings, bit for bit, those that the saved one would have given.

        Raises:
            KeyError: an entry is missing.
            TypeError, ValueError: it is another one's; nothing was loaded.
        """
        check_settings(state_dict, self._settings())
        window = saved_floats(state_dict, "window", self._window.maxlen or 0)
        self.reference.load_state_dict(state_dict["reference"])
        self._window = deque(window, maxlen=self._window.maxlen)

    def _settings(self) -> dict[str, Any]:
        return {"window": self._window.maxlen, "beta": self._beta}


class EntropyRateStream:
    """`entropy_rate` of the last two windows of a series.

    Args:
        window, shared_range: as for `entropy_rate`.
    Raises:
        TypeError, ValueError: naming the argument, what was given and what is accepted.
    """

    def __init__(self, window: int = 32, *, shared_range: bool = True) -> None:
        self._size = as_count(window, "window")
        self._shared_range = bool(shared_range)
        self._values: deque[float] = deque(maxlen=2 * self._size)

    def update(self, value: float) -> None:
        """Takes in one value."""
        value = as_number(value, "value")
        if math.isfinite(value):
            self._values.append(value)

    def read(self) -> float | None:
        """The entropy rate; None until both windows are full."""
        if len(self._values) < 2 * self._size:
            return None
        return entropy_rate(list(self._values), self._size, shared_range=self._shared_range)

    def state_dict(self) -> dict[str, Any]:
        """Everything that later readings depend on: numbers and lists of them, as JSON has them."""
        return {"settings": self._settings(), "values": list(self._values)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Makes later readings, bit for bit, those that the saved one would have given.

        Raises:
            KeyError: an entry is missing.
            TypeError, ValueError: it is another one's; nothing was loaded.
        """
        check_settings(state_dict, self._settings())
        values = saved_floats(state_dict, "values", 2 * self._size)
        self._values = deque(values, maxlen=2 * self._size)

    def _settings(self) -> dict[str, Any]:
        return {"window": self._size, "shared_range": self._shared_range}


class ProcessivityStream:
    """`processivity` of the last gradient norms and step norms, and the true alignment beside it.

    The cosine of two series of norms only says whether they rise and fall together; the alignment
    of a step, cos(-gradient, update) over all parameters, is given by `update_alignment`.

    Args:
        window: steps of which the cosine and the mean alignment are taken.
    Raises:
        TypeError, ValueError: naming the argument, what was given and what is accepted.
    """

    def __init__(self, window: int = 64) -> None:
        self._size = as_count(window, "window")
        self._grad_norms: deque[float] = deque(maxlen=self._size)
        self._step_norms: deque[float] = deque(maxlen=self._size)
        self._alignments: deque[float] = deque(maxlen=self._size)

    @property
    def alignment(self) -> float | None:
        """Mean of the last alignments that were known; None if none was."""
        if not self._alignments:
            return None
        return math.fsum(self._alignments) / len(self._alignments)

    def update(
        self,
        grad_norm: float | None = None,
        step_norm: float | None = None,
        alignment: float | None = None,
    ) -> None:
        """Takes in one step; None is what is not known of it.

        Args:
            grad_norm, step_norm: not negative; they enter only together.
            alignment: from -1 to 1.
        Raises:
            TypeError, ValueError: naming the argument, what was given and what is accepted; nothing
                was taken in.
        """
        grad_norm = checked_norm(grad_norm, "grad_norm")
        step_norm = checked_norm(step_norm, "step_norm")
        alignment = checked_alignment(alignment)
        if math.isfinite(grad_norm) and math.isfinite(step_norm):
            self._grad_norms.append(grad_norm)
            self._step_norms.append(step_norm)
        if math.isfinite(alignment):
            self._alignments.append(alignment)

    def read(self) -> float | None:
        """The processivity; None until the window is full."""
        if len(self._grad_norms) < self._size:
            return None
        return processivity(list(self._grad_norms), list(self._step_norms))

    def state_dict(self) -> dict[str, Any]:
        """Everything that later readings depend on: numbers and lists of them, as JSON has them."""
        return {
            "settings": {"window": self._size},
            "grad_norms": list(self._grad_norms),
            "step_norms": list(self._step_norms),
            "alignments": list(self._alignments),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Makes later readings, bit for bit, those that the saved one would have given.

        Raises:
            KeyError: an entry is missing.
            TypeError, ValueError: it is another one's; nothing was loaded.
        """
        check_settings(state_dict, {"window": self._size})
        grad_norms = saved_floats(state_dict, "grad_norms", self._size)
        step_norms = saved_floats(state_dict, "step_norms", self._size, exactly=len(grad_norms))
        alignments = saved_floats(state_dict, "alignments", self._size)
        self._grad_norms = deque(grad_norms, maxlen=self._size)
        self._step_norms = deque(step_norms, maxlen=self._size)
        self._alignments = deque(alignments, maxlen=self._size)


def checked_norm(norm: float | None, name: str) -> float:
    """The norm; NaN if it is not known."""
    number = math.nan if norm is None else as_number(norm, name)
    if number < 0:
        raise ValueError(f"{name} is {number}; accepted: numbers from 0 up, and None")
    return number


def checked_alignment(alignment: float | None) -> float:
    """The alignment; NaN if it is not known."""
    number = math.nan if alignment is None else as_number(alignment, "alignment")
    # A cosine in single precision may end a little beyond.
    if abs(number) > 1.0 + 1e-5:
        raise ValueError(f"alignment is {number}; accepted: numbers from -1 to 1, and None")
    return number if math.isnan(number) else min(max(number, -1.0), 1.0)
