"""Whether the last two seconds lie too high, by the clock and not by steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from foreshock.signals.given_numbers import as_count, as_finite, as_number, as_positive
from foreshock.signals.noise_statistics import Precursor, as_threshold, rise
from foreshock.signals.saved_state import check_settings, saved_floats, saved_number


class TwoSecondPrecursor:
    """The precursor of a series that comes with timestamps, at whatever rate.

    score = (mean(recent) - mean(rest)) / (std(rest, ddof 0) + 1e-12), alert = score > z
    recent: the values later than timestamp - window_sec, the newest one among them
    rest: those before them, back to timestamp - window_sec - baseline_sec

    - At a steady rate this is `two_second_precursor` of the values held.
    - Slow steps are no reason for a rest of two values: `min_count` of them are kept, however old,
      and nothing is judged with fewer, or with fewer than there are recent ones.
    - A value that is not finite is an alert of its own, (True, inf), and enters no window.
    - A clock that was set back, as after a resumed run, stands still for one step: what is held
      keeps its distances.

    >>> precursor = TwoSecondPrecursor()
    >>> alert, score = precursor.update(time.monotonic(), loss)

    Args:
        window_sec: seconds that count as the present.
        z: score above which there is an alert.
        baseline_sec: seconds before them that the present is held against.
        min_count: values without which nothing is judged.
        max_values: kept at most; with more than half as many in `window_sec` nothing is judged.
    Raises:
        TypeError, ValueError: naming the argument, what was given and what is accepted.
    Cost:
        O(values held) per update; 32 max_values bytes of memory.
    """

    def __init__(
        self,
        window_sec: float = 2.0,
        z: float = 2.5,
        *,
        baseline_sec: float = 60.0,
        min_count: int = 32,
        max_values: int = 8192,
    ) -> None:
        self._window_sec = as_positive(window_sec, "window_sec")
        self._z = as_threshold(z)
        self._baseline_sec = as_positive(baseline_sec, "baseline_sec")
        self._min_count = as_count(min_count, "min_count")
        self._max_values = as_count(max_values, "max_values", at_least=self._min_count + 1)
        # Held in one piece, which moves on and is now and then brought back to the start.
        self._times = np.zeros(2 * self._max_values)
        self._values = np.zeros(2 * self._max_values)
        self._first = self._split = self._end = 0
        self._clock_s: float | None = None
        self._shift_s = 0.0

    @property
    def has_history(self) -> bool:
        """Whether enough is held for a score."""
        recent, rest = self._end - self._split, self._split - self._first
        return rest >= max(recent, self._min_count)

    @property
    def nbytes(self) -> int:
        """Memory that the windows hold; it does not grow."""
        return self._times.nbytes + self._values.nbytes

    def update(self, timestamp_s: float, value: float) -> Precursor:
        """Takes in one value.

        Args:
            timestamp_s: when it was seen, of any clock that runs on, in seconds.
            value: of the series.
        Returns:
            (alert, score); (False, 0.0) while there is too little history.
        Raises:
            TypeError, ValueError: naming the argument, what was given and what is accepted; nothing
                was taken in.
        """
        timestamp_s = as_finite(timestamp_s, "timestamp_s")
        value = as_number(value, "value")
        now = self._advance(timestamp_s)
        if not math.isfinite(value):
            return Precursor(True, math.inf)
        self._push(now, value)
        self._let_age(now)
        if not self.has_history:
            return Precursor(False, 0.0)
        held = self._values
        score = rise(held[self._split : self._end], held[self._first : self._split])
        return Precursor(score > self._z, score)

    def state_dict(self) -> dict[str, Any]:
        """Everything that later scores depend on: numbers and lists of them, as JSON has them."""
        return {
            "settings": self._settings(),
            "times_s": self._times[self._first : self._end].tolist(),
            "values": self._values[self._first : self._end].tolist(),
            "recent": self._end - self._split,
            "clock_s": self._clock_s,
            "shift_s": self._shift_s,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Makes later scores, bit for bit, those that the saved one would have given.

        Raises:
            KeyError: an entry is missing.
            TypeError, ValueError: it is another one's; nothing was loaded.
        """
        check_settings(state_dict, self._settings())
        times = saved_floats(state_dict, "times_s", self._max_values)
        values = saved_floats(state_dict, "values", self._max_values, exactly=len(times))
        recent = as_count(state_dict["recent"], "state_dict['recent']", at_least=0)
        if recent > len(times):
            raise ValueError(f"state_dict['recent'] is {recent}; accepted: up to {len(times)}")
        clock_s = saved_number(state_dict, "clock_s")
        self._shift_s = as_finite(state_dict["shift_s"], "state_dict['shift_s']")
        self._clock_s = clock_s
        self._first, self._end = 0, len(times)
        self._split = self._end - recent
        self._times[: self._end] = times
        self._values[: self._end] = values

    def _settings(self) -> dict[str, Any]:
        return {
            "window_sec": self._window_sec,
            "z": self._z,
            "baseline_sec": self._baseline_sec,
            "min_count": self._min_count,
            "max_values": self._max_values,
        }

    def _advance(self, timestamp_s: float) -> float:
        """The time on a clock that never goes back."""
        now = timestamp_s + self._shift_s
        if self._clock_s is not None and now < self._clock_s:
            self._shift_s += self._clock_s - now
            now = self._clock_s
        self._clock_s = now
        return now

    def _push(self, now: float, value: float) -> None:
        if self._end - self._first == self._max_values:
            self._first += 1
            self._split = max(self._split, self._first)
        if self._end == len(self._times):
            self._bring_back()
        self._times[self._end] = now
        self._values[self._end] = value
        self._end += 1

    def _bring_back(self) -> None:
        """No more than half the memory is held: the copy does not overlap what it reads."""
        held = self._end - self._first
        for kept in (self._times, self._values):
            kept[:held] = kept[self._first : self._end]
        self._split -= self._first
        self._first, self._end = 0, held

    def _let_age(self, now: float) -> None:
        oldest_recent = now - self._window_sec
        times, split, first = self._times, self._split, self._first
        while split < self._end - 1 and times[split] <= oldest_recent:
            split += 1
        oldest_rest = oldest_recent - self._baseline_sec
        while split - first > self._min_count and times[first] <= oldest_rest:
            first += 1
        self._split, self._first = split, first
