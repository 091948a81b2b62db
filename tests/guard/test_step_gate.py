"""The gate before `optimizer.step`."""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import LBFGS, SGD, Adagrad, Adam, AdamW, RMSprop
from torch.optim.lr_scheduler import LambdaLR

from foreshock.guard import LearningRateBackoff, StepGate
from foreshock.guard.clipping import divisor_of, scaled_in_step
from tests.monitor.training import same

Make = Callable[[Iterable[Tensor]], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Make] = {
    f"{kind.__name__}-{variant}": (
        lambda ps, kind=kind, given=given, variant=variant: kind(ps, **given, **{variant: True})
    )
    for kind, given in (
        (AdamW, {"weight_decay": 0.1}),
        (Adam, {"weight_decay": 0.1, "amsgrad": True}),
        (SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
        (Adagrad, {"weight_decay": 0.1}),
    )
    for variant in ("fused", "foreach")
}
OPTIMIZERS["SGD-for-loop"] = lambda ps: SGD(ps, lr=0.1, momentum=0.9, foreach=False)
OPTIMIZERS["RMSprop"] = lambda ps: RMSprop(ps, momentum=0.9, weight_decay=0.1)


class Door:
    """A gate, who came to it, and whether it is open."""

    def __init__(self, optimizer: torch.optim.Optimizer, is_open: bool = True) -> None:
        self.is_open = is_open
        self.clip_factor = 1.0
        self.closures: list[bool] = []
        self.passed: list[bool] = []
        self.learning_rate = LearningRateBackoff(0.5, 10)
        self.optimizer = optimizer
        self.gate = StepGate(
            optimizer, self.learning_rate, self._scaled, self._admit, self.passed.append
        )

    def _scaled(self) -> contextlib.AbstractContextManager[None]:
        return scaled_in_step(self.optimizer, divisor_of(self.clip_factor))

    def _admit(self, has_closure: bool) -> bool:
        self.closures.append(has_closure)
        return self.is_open


def make(make_optimizer: Make = lambda ps: SGD(ps, lr=0.1)) -> tuple[Tensor, torch.optim.Optimizer]:
    p = torch.nn.Parameter(torch.linspace(-1, 1, 5))
    p.grad = torch.ones(5)
    return p, make_optimizer([p])


def everything(p: Tensor, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    state = {f"state.{k}": copy.deepcopy(v) for k, v in optimizer.state.get(p, {}).items()}
    return {"p": p.detach().clone(), "lr": optimizer.param_groups[0]["lr"], **state}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1.0])
def test_trap_3_a_withheld_update_changes_no_bit(name: str, bad: float) -> None:
    """Not the parameters, not the moments, not the step counts; weight decay and momentum
    would move them even if the gradient were zero.
    """
    p, optimizer = make(OPTIMIZERS[name])
    door = Door(optimizer)
    for _ in range(3):
        optimizer.step()
    before = everything(p, optimizer)
    assert len(before) > 2
    p.grad[1] = bad
    door.is_open = False
    assert optimizer.step() is None
    after = everything(p, optimizer)
    assert before.keys() == after.keys()
    assert all(same(before[key], after[key]) for key in before)
    door.is_open = True
    p.grad.fill_(1.0)
    optimizer.step()
    assert not torch.equal(p, before["p"])
    assert door.passed == [True, True, True, False, True]


@pytest.mark.parametrize("when", ["before", "after", "both"])
def test_schedulers_may_wrap_the_step_before_and_after(when: str) -> None:
    p, optimizer = make()
    if when != "after":
        LambdaLR(optimizer, lambda step: 1.0)
    door = Door(optimizer)
    if when != "before":
        scheduler = LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.step()
    assert door.passed == [True]
    assert torch.equal(p, torch.linspace(-1, 1, 5) - 0.1)
    door.is_open = False
    optimizer.step()
    assert door.passed == [True, False]
    if when != "before":
        scheduler.step()  # would warn if it thought that the optimizer had not been called
        assert optimizer.param_groups[0]["lr"] == 0.05


@pytest.mark.parametrize("when", ["before", "after", "never"])
def test_once_removed_the_gate_lets_everything_pass(when: str) -> None:
    p, optimizer = make()
    plain = optimizer.step
    if when == "before":
        LambdaLR(optimizer, lambda step: 1.0)
        plain = optimizer.step
    door = Door(optimizer, is_open=False)
    if when == "after":
        LambdaLR(optimizer, lambda step: 1.0)
    door.gate.remove()
    door.gate.remove()
    optimizer.step()
    assert torch.equal(p, torch.linspace(-1, 1, 5) - 0.1)
    assert not door.closures
    assert not door.passed
    if when != "after":
        assert optimizer.step == plain
    assert ("step" in vars(optimizer)) == (when != "never")


def test_two_gates_on_one_optimizer_may_be_removed_in_either_order() -> None:
    p, optimizer = make()
    first, second = Door(optimizer), Door(optimizer, is_open=False)
    optimizer.step()
    assert (first.passed, second.passed) == ([], [False])
    first.gate.remove()
    second.gate.remove()
    optimizer.step()
    assert torch.equal(p, torch.linspace(-1, 1, 5) - 0.1)
    assert (first.passed, second.passed) == ([], [False])


@pytest.mark.parametrize("is_keyword", [True, False])
def test_a_closure_and_its_result_go_through(is_keyword: bool) -> None:
    p, optimizer = make(lambda ps: LBFGS(ps, max_iter=2))
    door = Door(optimizer)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (p - 3).square().sum()
        loss.backward()
        return loss

    first = closure().item()
    loss = optimizer.step(closure=closure) if is_keyword else optimizer.step(closure)
    assert loss.item() == first
    assert closure().item() < first
    assert door.closures == [True]


def test_learning_rate_factor_is_in_force_on_the_update_that_runs() -> None:
    p, optimizer = make()
    door = Door(optimizer)
    door.learning_rate.back_off()
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.linspace(-1, 1, 5) - 0.05)
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_a_withheld_update_does_not_count_towards_the_recovery_of_the_learning_rate() -> None:
    _, optimizer = make()
    door = Door(optimizer, is_open=False)
    factor = door.learning_rate.back_off()
    optimizer.step()
    assert door.learning_rate.factor == factor


def test_an_error_in_the_step_reaches_the_caller_and_is_no_update() -> None:
    _, optimizer = make()
    door = Door(optimizer)
    optimizer.param_groups[0]["params"] = None
    with pytest.raises(TypeError):
        optimizer.step()
    assert door.passed == []


def test_step_hooks_of_torch_still_run() -> None:
    _, optimizer = make()
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    Door(optimizer)
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    optimizer.step()
    assert calls == ["pre", "post"]


def test_optimizer_can_be_copied_and_saved_with_a_gate_on_it(tmp_path: Any) -> None:
    p, optimizer = make(lambda ps: AdamW(ps, lr=0.1))
    door = Door(optimizer, is_open=False)
    copied = copy.deepcopy(optimizer)
    copied.step()  # has no gate
    assert door.passed == []
    torch.save(optimizer, tmp_path / "optimizer.pt")
    torch.load(tmp_path / "optimizer.pt", weights_only=False).step()
    assert door.passed == []
    assert torch.equal(p, torch.linspace(-1, 1, 5))


def test_a_gate_does_not_keep_an_optimizer_alive() -> None:
    _, optimizer = make()
    Door(optimizer)
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name.endswith("fused")])
def test_a_fused_step_multiplies_the_gradients_as_it_reads_them(name: str) -> None:
    (p, optimizer), (twin, twins_optimizer) = make(OPTIMIZERS[name]), make(OPTIMIZERS[name])
    door = Door(optimizer)
    for factor in (0.25, 1.0, 0.0, 0.7):
        door.clip_factor = factor
        p.grad, twin.grad = torch.arange(5.0), torch.arange(5.0) * factor
        optimizer.step()
        twins_optimizer.step()
        torch.testing.assert_close(p, twin, rtol=1e-6, atol=1e-7)
        assert not hasattr(optimizer, "grad_scale")
