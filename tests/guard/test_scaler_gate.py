"""A GradScaler's step is joined where it is ours to join, and is itself again afterwards."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn

from foreshock.guard import ScalerGate


class Setup:
    """A scaler that has seen finite gradients, with a gate that knows better."""

    def __init__(self, *, fused: bool = False, enabled: bool = True) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(3, 1)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=fused)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=enabled)
        self.scaler.scale(self.model(torch.ones(2, 3)).sum()).backward()
        self.before = self.model.weight.detach().clone()
        self.asked = self.stepped = 0

    def gate(self) -> ScalerGate:
        return ScalerGate(self.scaler, self.optimizer, self._has_overflowed, self._note)

    def _has_overflowed(self) -> bool:
        self.asked += 1
        return True

    def _note(self) -> None:
        self.stepped += 1

    @property
    def was_updated(self) -> bool:
        return not torch.equal(self.before, self.model.weight)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("is_unscaled", [False, True])
def test_an_overflow_elsewhere_withholds_the_update_and_lowers_the_scale(
    fused: bool, is_unscaled: bool
) -> None:
    setup = Setup(fused=fused)
    setup.gate()
    if is_unscaled:
        setup.scaler.unscale_(setup.optimizer)
    setup.scaler.step(setup.optimizer)
    setup.scaler.update()
    # A fused optimizer is called all the same, for StepGate to withhold it.
    assert setup.was_updated is (fused and not is_unscaled)
    assert setup.scaler.get_scale() == 4.0
    assert (setup.asked, setup.stepped) == (1, 1)


def test_other_optimizers_and_a_scaler_that_is_off_are_left_alone() -> None:
    setup, off = Setup(), Setup(enabled=False)
    setup.gate()
    off.gate()
    other = torch.optim.SGD(setup.model.parameters(), lr=0.1)
    setup.scaler.step(other)
    off.scaler.step(off.optimizer)
    assert setup.was_updated
    assert off.was_updated
    assert setup.asked == off.asked == 0


def _copied(scaler: Any) -> Any:
    return copy.deepcopy(scaler)


def _saved(scaler: Any) -> Any:
    file = io.BytesIO()
    torch.save(scaler, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@pytest.mark.parametrize("again", [_copied, _saved])
def test_a_scaler_that_is_copied_or_saved_meanwhile_has_its_own_step(again: Any) -> None:
    setup = Setup()
    setup.gate()
    other = again(setup.scaler)
    assert other.step.__self__ is other
    other.scale(torch.zeros(()))  # its tensors are made anew
    other.step(setup.optimizer)
    other.update()
    assert setup.was_updated
    assert other.get_scale() == setup.scaler.get_scale() == 8.0
    assert setup.asked == 0


def test_removed_it_lets_all_pass_even_where_somebody_has_wrapped_it_since() -> None:
    setup, wrapped = Setup(), Setup()
    setup.gate().remove()
    assert "step" not in vars(setup.scaler)
    theirs = setup.scaler.step = setup.scaler.step
    setup.gate().remove()
    assert setup.scaler.step is theirs
    gate = wrapped.gate()
    ours = wrapped.scaler.step
    wrapped.scaler.step = lambda optimizer: ours(optimizer)
    gate.remove()
    wrapped.scaler.step(wrapped.optimizer)
    assert wrapped.was_updated
    assert wrapped.asked == 0
