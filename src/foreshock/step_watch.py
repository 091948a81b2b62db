"""What the monitor asks of whatever follows one part of a training, and what a fault in it does."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

from foreshock.guard import Stateful

_log = logging.getLogger("foreshock")

T = TypeVar("T")


class StepWatch(Protocol):
    """Follows one part of a training, and says what it has seen.

    It may raise: the monitor has it `shielded`. One that also has `state_dict` and
    `load_state_dict` is rolled back with the run.
    """

    def note_step(self, step: int) -> None:
        """A step was judged; its update has not been made yet."""

    def telemetry(self) -> Mapping[str, object]:
        """What a telemetry record is to have of it, by name; empty before the first look."""

    def close(self) -> None:
        """Stops watching, and leaves nothing on the model."""


def shielded(name: str, watch: StepWatch) -> StepWatch:
    """The same watch, of which a fault ends the watching, is logged once, and reaches nobody else.

    Args:
        name: of what it follows, for the log.
        watch: what may fail.
    Returns:
        A StepWatch that has `state_dict` and `load_state_dict` if the watch has. Loading a state
        that does not fit still raises: whoever loads it decides what to do about that.
    """
    if isinstance(watch, Stateful):
        return _StatefulShield(name, watch, watch)
    return _Shield(name, watch)


class _Shield:
    def __init__(self, name: str, watch: StepWatch) -> None:
        self._name = name
        self._watch = watch
        self._is_ended = False

    def note_step(self, step: int) -> None:
        self._safely(lambda: self._watch.note_step(step), None)

    def telemetry(self) -> Mapping[str, object]:
        return self._safely(self._watch.telemetry, {})

    def close(self) -> None:
        self._safely(self._watch.close, None)

    def _safely(self, work: Callable[[], T], otherwise: T) -> T:
        if self._is_ended:
            return otherwise
        try:
            return work()
        except Exception:
            self._is_ended = True
            _log.exception("foreshock no longer follows %s; training goes on", self._name)
        try:
            self._watch.close()
        except Exception:
            _log.debug("closing what followed %s failed too", self._name, exc_info=True)
        return otherwise


class _StatefulShield(_Shield):
    def __init__(self, name: str, watch: StepWatch, stateful: Stateful) -> None:
        super().__init__(name, watch)
        self._stateful = stateful

    def state_dict(self) -> Any:
        return self._safely(self._stateful.state_dict, {})

    def load_state_dict(self, state_dict: Any) -> None:
        if not self._is_ended:
            self._stateful.load_state_dict(state_dict)
