"""Clipping that rides in a fused optimizer's step, and clipping beside torch's tools."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import foreshock as fs

FUSED: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda ps: torch.optim.AdamW(ps, lr=1e-3, weight_decay=0.1, fused=True),
    "Adam": lambda ps: torch.optim.Adam(ps, lr=1e-3, amsgrad=True, fused=True),
    "SGD": lambda ps: torch.optim.SGD(ps, lr=2e-3, momentum=0.9, nesterov=True, fused=True),
}
MAX_NORM = 0.3


class Loop:
    """A small regression, trained step by step."""

    def __init__(self, optimizer: Callable[[Any], torch.optim.Optimizer]) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))
        self.optimizer = optimizer(self.model.parameters())
        self.generator = torch.Generator().manual_seed(1)

    def backward(self) -> Tensor:
        x = torch.randn(8, 5, generator=self.generator)
        self.optimizer.zero_grad()
        loss = (self.model(x) - x.sum(1, keepdim=True)).square().mean()
        loss.backward()
        return loss


def assert_close(ours: Loop, theirs: Loop, rtol: float = 1e-6) -> None:
    pairs = zip(ours.model.parameters(), theirs.model.parameters(), strict=True)
    for mine, other in pairs:
        assert (mine - other).norm() <= rtol * other.norm(), (mine - other).norm() / other.norm()


@pytest.mark.parametrize("name", FUSED)
def test_a_thousand_steps_end_where_torchs_clipping_ends(tmp_path: Path, name: str) -> None:
    ours, theirs = Loop(FUSED[name]), Loop(FUSED[name])
    monitor = fs.Monitor(ours.model, ours.optimizer, tmp_path, fs.Guard(mode="skip"))
    clipped = 0
    for _ in range(1000):
        loss = ours.backward()
        norm = monitor.clip_grad_norm_(MAX_NORM)
        assert monitor.step(loss)
        ours.optimizer.step()
        theirs.backward()
        expected = nn.utils.clip_grad_norm_(theirs.model.parameters(), MAX_NORM)
        theirs.optimizer.step()
        torch.testing.assert_close(norm, expected, rtol=1e-3, atol=0)
        clipped += bool(norm > MAX_NORM)
    assert clipped > 100
    assert_close(ours, theirs)


@pytest.mark.parametrize("name", FUSED)
def test_the_drop_in_ends_where_torchs_ends(name: str) -> None:
    ours, theirs = Loop(FUSED[name]), Loop(FUSED[name])
    for _ in range(1000):
        for loop, clip in ((ours, fs.clip_grad_norm_), (theirs, nn.utils.clip_grad_norm_)):
            loop.backward()
            clip(loop.model.parameters(), MAX_NORM)
            loop.optimizer.step()
    assert_close(ours, theirs)


def test_until_the_step_the_gradients_are_as_they_were_and_after_it_clipped(
    tmp_path: Path,
) -> None:
    loop = Loop(FUSED["AdamW"])
    monitor = fs.Monitor(loop.model, loop.optimizer, tmp_path)
    loop.backward()
    gradient = next(loop.model.parameters()).grad
    before = gradient.clone()
    norm = monitor.clip_grad_norm_(MAX_NORM).item()
    assert norm > MAX_NORM
    assert torch.equal(gradient, before)
    loop.optimizer.step()
    torch.testing.assert_close(gradient, before * MAX_NORM / norm)


def test_the_last_of_several_clips_counts(tmp_path: Path) -> None:
    ours, theirs = Loop(FUSED["SGD"]), Loop(FUSED["SGD"])
    monitor = fs.Monitor(ours.model, ours.optimizer, tmp_path)
    for _ in range(5):
        ours.backward()
        theirs.backward()
        for limit in (0.5, 0.1, 0.3):
            norm = monitor.clip_grad_norm_(limit)
            expected = nn.utils.clip_grad_norm_(theirs.model.parameters(), limit)
            torch.testing.assert_close(norm, expected, rtol=1e-5, atol=0)
        ours.optimizer.step()
        theirs.optimizer.step()
    assert_close(ours, theirs)


def test_a_clip_whose_update_never_came_does_not_reach_the_next(tmp_path: Path) -> None:
    ours, theirs = Loop(FUSED["SGD"]), Loop(FUSED["SGD"])
    monitor = fs.Monitor(ours.model, ours.optimizer, tmp_path)
    ours.backward()
    monitor.clip_grad_norm_(1e-3)
    theirs.backward()
    for _ in range(3):
        ours.backward()
        theirs.backward()
        assert monitor.clip_grad_norm_(1e3) < 1e3
        ours.optimizer.step()
        theirs.optimizer.step()
    assert_close(ours, theirs)


@pytest.mark.parametrize("in_loop", [True, False])
@pytest.mark.parametrize("judged", ["before", "after", "never"])
def test_wherever_the_step_is_judged_the_clip_reaches_the_update(
    tmp_path: Path, in_loop: bool, judged: str
) -> None:
    ours, theirs = Loop(FUSED["AdamW"]), Loop(FUSED["AdamW"])
    monitor = fs.Monitor(ours.model, ours.optimizer, tmp_path, fs.Guard(mode="recover"))
    turns = monitor.loop([None] * 6) if in_loop else range(6)
    for turn in turns:
        for _ in range(2):  # an accumulation: two backward passes, judged each
            loss = ours.backward()
            if judged == "before":
                assert monitor.step(loss)
        theirs.backward(), theirs.backward()
        monitor.clip_grad_norm_(MAX_NORM)
        nn.utils.clip_grad_norm_(theirs.model.parameters(), MAX_NORM)
        if judged == "before":
            assert monitor.step(loss)
        ours.optimizer.step()
        theirs.optimizer.step()
        if judged == "after":
            assert monitor.step(loss)
        assert turn is not None
    assert_close(ours, theirs)


def test_gradients_that_the_optimizer_does_not_have_are_clipped_at_once(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    optimizer = FUSED["AdamW"](model[0].parameters())
    monitor = fs.Monitor(model, optimizer, tmp_path)
    (100 * model(torch.ones(2, 3)).sum()).backward()
    monitor.clip_grad_norm_(1.0)
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert norm == pytest.approx(1.0, rel=1e-5)


def test_in_a_closure_gradients_are_clipped_at_once(tmp_path: Path) -> None:
    ours, theirs = Loop(FUSED["SGD"]), Loop(FUSED["SGD"])
    monitor = fs.Monitor(ours.model, ours.optimizer, tmp_path)

    def closure() -> Tensor:
        loss = ours.backward()
        monitor.clip_grad_norm_(MAX_NORM)
        return loss

    for _ in range(4):
        ours.optimizer.step(closure)
        theirs.backward()
        nn.utils.clip_grad_norm_(theirs.model.parameters(), MAX_NORM)
        theirs.optimizer.step()
    assert_close(ours, theirs)


@pytest.mark.parametrize("name", FUSED)
def test_with_a_grad_scaler_its_scale_and_its_verdict_count_too(tmp_path: Path, name: str) -> None:
    ours, theirs = Loop(FUSED[name]), Loop(FUSED[name])
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3) for _ in range(2)]
    monitor = fs.Monitor(ours.model, ours.optimizer, tmp_path, fs.Guard(mode="observe"))
    for step in range(12):
        for loop, scaler in zip((ours, theirs), scalers, strict=True):
            x = torch.randn(8, 5, generator=loop.generator)
            loop.optimizer.zero_grad()
            scaler.scale(loop.model(x).square().mean()).backward()
            if step == 5:
                next(loop.model.parameters()).grad[0, 0] = math.inf
            scaler.unscale_(loop.optimizer)
        monitor.clip_grad_norm_(MAX_NORM)
        nn.utils.clip_grad_norm_(theirs.model.parameters(), MAX_NORM)
        for loop, scaler in zip((ours, theirs), scalers, strict=True):
            scaler.step(loop.optimizer)
            scaler.update()
    assert scalers[0].get_scale() == scalers[1].get_scale()
    assert_close(ours, theirs)
