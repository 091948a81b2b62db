"""Gates open as planned, whatever the optimizer does meanwhile."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from foreshock import gates
from foreshock.gates import AlphaSchedule
from tests.gates.models import decoder

TOLERANCE = 1e-3


def course(steps: int, warmup: int, **given: Any) -> list[float]:
    """sigmoid(alpha) at the start and after each of some steps, in a training."""
    subject = decoder()
    attached = gates.attach(subject.model, theta_std=0.5)
    schedule = AlphaSchedule(subject.model, warmup, **given)
    optimizer = torch.optim.AdamW(subject.model.parameters(), lr=0.05)
    gate = attached["blocks.1"]
    found = [gate.mix().item()]
    for _ in range(steps):
        optimizer.zero_grad()
        subject().square().mean().backward()
        optimizer.step()
        schedule.step()
        found.append(gate.mix().item())
    return found


@pytest.mark.parametrize("shape", ["linear", "sigmoid"])
def test_it_starts_at_sigmoid_of_minus_5_and_reaches_its_target(shape: Any) -> None:
    mixes = course(40, 40, shape=shape)
    assert mixes[0] == pytest.approx(0.0066929, abs=1e-6)
    assert mixes[-1] == pytest.approx(0.1, abs=TOLERANCE)
    assert all(later > earlier for earlier, later in itertools.pairwise(mixes))
    middle = (mixes[0] + 0.1) / 2
    assert mixes[20] == pytest.approx(middle, abs=1e-5)
    quarter = 0.25 if shape == "linear" else 0.0705  # of 1/(1+exp(-10(u-1/2))), scaled to 0..1
    assert mixes[10] == pytest.approx(mixes[0] + quarter * (0.1 - mixes[0]), abs=1e-4)


def test_afterwards_it_is_held_or_left_to_the_optimizer() -> None:
    held = course(12, 5, after="hold", target=0.3)[5:]
    assert held == pytest.approx([0.3] * 8, abs=1e-6)
    learnt = course(12, 5, after="learn", target=0.3)[5:]
    assert learnt[0] == pytest.approx(0.3, abs=1e-6)
    assert abs(learnt[-1] - 0.3) > 0.005


def test_each_gate_starts_where_it_stands() -> None:
    attached = list(gates.attach(decoder().model, "all").values())
    with torch.no_grad():
        attached[0].alpha.fill_(0.0)
    schedule = AlphaSchedule(attached, 2, target=0.1)
    schedule.step()
    assert attached[0].mix().item() == pytest.approx(0.3, abs=1e-6)
    assert attached[1].mix().item() == pytest.approx((0.1 + 0.0066929) / 2, abs=1e-6)
    assert schedule.planned(attached[0]) == pytest.approx(0.3)


def test_it_goes_on_from_where_it_was_saved() -> None:
    model = decoder().model
    gate = gates.attach(model)["blocks.1"]
    schedule = AlphaSchedule(model, 10)
    for _ in range(4):
        schedule.step()
    saved, kept = schedule.state_dict(), model.state_dict()["blocks.1.rotation_gate.alpha"].clone()
    schedule.step()
    expected = gate.mix().item()
    with torch.no_grad():
        gate.alpha.copy_(kept)
    other = AlphaSchedule(model, 10)  # made when alphas have moved already
    other.load_state_dict(saved)
    other.step()
    assert gate.mix().item() == expected
    with pytest.raises(ValueError, match="state_dict is of 1 gates; accepted: of 2"):
        other.load_state_dict({"step": 0, "starts": [0.0]})


def test_nothing_is_planned_once_the_optimizer_has_it() -> None:
    model = decoder().model
    gate = gates.attach(model)["blocks.1"]
    learning, holding = (AlphaSchedule(model, 2, after=after) for after in ("learn", "hold"))
    for _ in range(3):
        learning.step()
        holding.step()
    assert learning.planned(gate) is None
    assert holding.planned(gate) == pytest.approx(0.1)
    assert holding.planned(gates.SO8RotationGate(8)) is None


@pytest.mark.parametrize(
    "given",
    [
        {"warmup_steps": 0},
        {"warmup_steps": 1.5},
        {"warmup_steps": True},
        {"target": 0.0},
        {"target": 1},
        {"target": float("nan")},
        {"shape": "cosine"},
        {"after": "stop"},
    ],
    ids=str,
)
def test_other_settings_are_refused(given: dict[str, Any]) -> None:
    model = decoder().model
    gates.attach(model)
    ((name, value),) = given.items()
    with pytest.raises(ValueError, match=f"{name} is {value!r}; accepted: "):
        AlphaSchedule(model, **{"warmup_steps": 5, **given})
    with pytest.raises(ValueError, match="model has no gates"):
        AlphaSchedule(decoder().model, 5)
    with pytest.raises(TypeError, match=r"optimizer is a list; accepted: a torch\.optim"):
        AlphaSchedule(model, 5, optimizer=[])
