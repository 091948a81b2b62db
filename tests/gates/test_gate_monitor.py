"""What is seen of gates, and when it is a risk."""

from __future__ import annotations

import dataclasses
import gc
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from foreshock import gates
from foreshock.gates import AlphaLeftSchedule, AlphaSchedule, GateSettings, OrthogonalityRose
from tests.gates.models import decoder, turned


def monitored(**given: Any) -> tuple[dict[str, gates.SO8RotationGate], gates.GateMonitor]:
    model = turned(decoder()).model
    return gates.gates_of(model), gates.GateMonitor(model, settings=GateSettings(**given))


def bent(monitor: gates.GateMonitor, step: int, error: float) -> gates.GateReading:
    """A look at gates whose blocks all have this error, as no theta can make it."""
    gate = next(iter(monitor.gates.values()))
    eye = torch.eye(8, dtype=torch.float64).expand(len(gate.theta), 8, 8)
    made = eye * (1 + error / 2 / 8**0.5)
    gate.shared.last_rotation_of = lambda _: made  # type: ignore[method-assign]
    return monitor.look(step)


def test_a_reading_says_what_there_is_to_say_and_cannot_be_changed() -> None:
    _, monitor = monitored()
    reading = monitor.look(7)
    assert reading.step == 7
    assert [state.name for state in reading.gates] == ["blocks.1", "blocks.2"]
    for state in reading.gates:
        assert 0 < state.orthogonality_mean <= state.orthogonality_max < 1e-6
        assert state.det == pytest.approx(1, abs=1e-6)
        assert state.mix == pytest.approx(0.5)
    assert reading.events == ()
    with pytest.raises(dataclasses.FrozenInstanceError):
        reading.step = 8  # type: ignore[misc]


def test_its_two_halves_see_the_gates_as_they_were_at_the_first() -> None:
    attached, monitor = monitored()
    before = monitor.look(1).gates
    monitor.begin(2)
    with torch.no_grad():
        attached["blocks.1"].alpha.fill_(3.0)
    reading = monitor.finish()
    assert reading is not None
    assert (reading.step, reading.gates) == (2, before)
    assert monitor.finish() is None


def test_an_error_over_the_threshold_is_told_of_once_until_it_is_well_again() -> None:
    _, monitor = monitored()
    errors = [3e-7, 1e-3, 1e-3, 3e-7, 1e-3]
    told = [bent(monitor, step, error).events for step, error in enumerate(errors)]
    assert [len(events) for events in told] == [0, 2, 0, 0, 2]
    event, other = told[1]
    assert isinstance(event, OrthogonalityRose)
    assert (event.step, event.gate, event.limit) == (1, "blocks.1", 1e-5)
    assert event.error == pytest.approx(1e-3, rel=0.01)
    assert other.gate == "blocks.2"


def test_a_rise_over_what_is_usual_is_told_of_before_the_threshold() -> None:
    _, monitor = monitored()
    for step in range(10):
        assert not bent(monitor, step, 3e-7).events
    assert not bent(monitor, 10, 2e-6).events
    events = bent(monitor, 11, 4e-6).events
    assert [event.gate for event in events] == ["blocks.1", "blocks.2"]
    assert events[0].limit == pytest.approx(3e-6, rel=0.01)


def test_what_has_risen_does_not_become_usual() -> None:
    _, monitor = monitored()
    for step in range(10):
        bent(monitor, step, 3e-7)
    told = [bent(monitor, step, 8e-6).events for step in range(10, 70)]
    assert [len(events) for events in told] == [2] + 59 * [0]
    assert not bent(monitor, 70, 3e-7).events
    assert bent(monitor, 71, 4e-6).events


def test_what_is_not_finite_is_told_of_and_blinds_nothing() -> None:
    attached, monitor = monitored()
    with torch.no_grad():
        attached["blocks.1"].theta[0, 0, 1] = float("nan")
        attached["blocks.2"].alpha.fill_(float("nan"))
    first, second = monitor.look(0).events
    assert isinstance(first, OrthogonalityRose)
    assert math.isnan(first.error)
    assert isinstance(second, AlphaLeftSchedule)
    assert (second.gate, second.planned) == ("blocks.2", None)
    with torch.no_grad():
        attached["blocks.1"].theta[0, 0, 1] = 0.0
        attached["blocks.2"].alpha.fill_(0.0)
    assert all(math.isfinite(s.orthogonality_max) for s in monitor.look(1).gates)
    assert all(math.isfinite(x) for errors in monitor._errors.values() for x in errors)


def test_an_alpha_off_its_schedule_is_told_of() -> None:
    model = decoder().model
    attached = gates.attach(model)
    schedule = AlphaSchedule(model, 10)
    monitor = gates.GateMonitor(model, schedule)
    for step in range(10):
        assert not monitor.look(step).events
        schedule.step()
    with torch.no_grad():
        attached["blocks.2"].alpha.fill_(-1.0)
    (event,) = monitor.look(10).events
    assert isinstance(event, AlphaLeftSchedule)
    assert event.gate == "blocks.2"
    assert event.mix == pytest.approx(0.2689, abs=1e-4)
    assert event.planned == pytest.approx(0.1)
    schedule.step()
    with torch.no_grad():
        attached["blocks.2"].alpha.fill_(1.0)  # the optimizer's by now
    assert not monitor.look(11).events


def test_saved_and_loaded_it_knows_what_was_usual_and_told() -> None:
    _, monitor = monitored()
    for step in range(10):
        bent(monitor, step, 3e-7)
    assert bent(monitor, 10, 1e-3).events
    _, other = monitored()
    other.load_state_dict(monitor.state_dict())
    assert not bent(other, 11, 1e-3).events
    assert not bent(other, 12, 3e-7).events
    assert bent(other, 13, 4e-6).events


def memory() -> tuple[int, int]:
    """Blocks that Python has allocated, and bytes of the process in memory."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return sys.getallocatedblocks(), pages * os.sysconf("SC_PAGE_SIZE")


def test_ten_thousand_looks_take_no_more_memory_than_a_thousand() -> None:
    model = decoder().model
    attached = gates.attach(model)
    monitor = gates.GateMonitor(model, AlphaSchedule(model, 100))

    def run(steps: int) -> tuple[int, int]:
        for step in range(steps):
            if step % 10 == 0:
                with torch.no_grad():
                    attached["blocks.1"].theta.add_(1e-5)
            monitor.look(step)
        return memory()

    blocks, size = run(1000)
    blocks_after, size_after = run(9000)
    assert blocks_after - blocks < 1000  # one a look would be 9000
    assert size_after - size < 2**20


def test_a_model_without_gates_is_refused() -> None:
    with pytest.raises(ValueError, match="model has no gates"):
        gates.GateMonitor(decoder().model)
    with pytest.raises(ValueError, match="did you mean 'alpha_tolerance'"):
        GateSettings(alpha_tolerence=1)


def test_the_orthogonality_loss_is_the_mean_of_the_squares_and_has_a_gradient() -> None:
    attached, _ = monitored()
    found = gates.orthogonality_loss(attached.values())
    blocks = torch.cat([gates.rotation_of(g.theta) for g in attached.values()]).double()
    excess: Tensor = blocks.mT @ blocks - torch.eye(8)
    expected = torch.linalg.matrix_norm(excess).square().mean()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert 0 < found < 1e-12
    found.backward()
    assert all(gate.theta.grad is not None for gate in attached.values())
    with pytest.raises(ValueError, match="model has no gates"):
        gates.orthogonality_loss(decoder().model)
