"""A fault in what follows one part of a training ends that, and nothing else."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from foreshock.guard import Stateful
from foreshock.step_watch import shielded

PLACES = ["note_step", "telemetry", "state_dict", "close"]


class Watch:
    """Fails where it is told to, and notes what was asked of it."""

    def __init__(self, fails_in: str = "") -> None:
        self.fails_in = fails_in
        self.asked: list[str] = []

    def _ask(self, place: str) -> None:
        self.asked.append(place)
        if place == self.fails_in:
            raise RuntimeError("no")

    def note_step(self, step: int) -> None:
        self._ask("note_step")

    def telemetry(self) -> dict[str, object]:
        self._ask("telemetry")
        return {"seen": 1}

    def close(self) -> None:
        self._ask("close")


class StatefulWatch(Watch):
    def state_dict(self) -> dict[str, Any]:
        self._ask("state_dict")
        return {"count": 3}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._ask("load_state_dict")
        assert state_dict["count"] == 3


def use(watch: Any) -> dict[str, Any]:
    found = {"state": watch.state_dict()}
    watch.note_step(0)
    found["telemetry"] = watch.telemetry()
    watch.close()
    return found


def test_a_watch_without_faults_is_as_before() -> None:
    watch = StatefulWatch()
    shield: Any = shielded("x", watch)
    assert use(shield) == {"state": {"count": 3}, "telemetry": {"seen": 1}}
    shield.load_state_dict({"count": 3})
    assert watch.asked == ["state_dict", "note_step", "telemetry", "close", "load_state_dict"]


@pytest.mark.parametrize("place", PLACES)
def test_a_fault_is_logged_once_and_ends_the_watching(
    place: str, caplog: pytest.LogCaptureFixture
) -> None:
    watch = StatefulWatch(place)
    shield = shielded("the tides", watch)
    with caplog.at_level(logging.ERROR, "foreshock"):
        first, second = use(shield), use(shield)
    (record,) = caplog.records
    assert record.getMessage() == "foreshock no longer follows the tides; training goes on"
    assert record.exc_info is not None
    asked = ["state_dict", "note_step", "telemetry", "close"]
    assert watch.asked == [*asked[: asked.index(place) + 1], "close"]
    assert second == {"state": {}, "telemetry": {}}
    assert first["state"] == ({} if place == "state_dict" else {"count": 3})


def test_one_that_has_ended_loads_nothing() -> None:
    watch = StatefulWatch("note_step")
    shield: Any = shielded("x", watch)
    shield.note_step(0)
    shield.load_state_dict({})
    assert "load_state_dict" not in watch.asked


def test_a_state_that_does_not_fit_is_told_to_who_loads_it() -> None:
    shield: Any = shielded("x", StatefulWatch())
    with pytest.raises(KeyError):
        shield.load_state_dict({})


def test_only_one_with_a_state_has_one() -> None:
    assert isinstance(shielded("x", StatefulWatch()), Stateful)
    assert not isinstance(shielded("x", Watch()), Stateful)
