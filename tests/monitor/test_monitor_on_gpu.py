"""The monitored step on a real device: no clean one waits, and what the CPU's tests say holds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import foreshock as fs
from foreshock.guard import LaggingWatch
from tests.monitor.test_clipping_in_step import FUSED

pytestmark = pytest.mark.gpu


def make(mode: Any, out_dir: Path) -> tuple[nn.Module, torch.optim.Optimizer, fs.Monitor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 8)).cuda()
    optimizer = FUSED["AdamW"](model.parameters())
    guard = fs.Guard(mode=mode, snapshot_interval=10**6)
    monitor = fs.Monitor(model, optimizer, out_dir, guard, spectral_interval=10)
    return model, optimizer, monitor


@pytest.mark.parametrize("mode", ["observe", "skip", "recover"])
def test_a_hundred_clean_steps_wait_for_nothing(tmp_path: Path, mode: Any) -> None:
    model, optimizer, monitor = make(mode, tmp_path)
    assert isinstance(monitor._watch, LaggingWatch)
    batches = [torch.randn(32, 64, device="cuda") for _ in range(8)]
    try:
        for step in range(120):
            if step == 20:
                torch.cuda.set_sync_debug_mode("error")
            optimizer.zero_grad()
            loss = model(batches[step % 8]).square().mean()
            loss.backward()
            monitor.clip_grad_norm_(1e-2)
            assert monitor.step(loss)
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    summary = monitor.finalize()
    assert summary["total_steps"] == 120
    assert math.isfinite(summary["spectral"]["final_kappa"])


@pytest.mark.parametrize("mode", ["skip", "recover"])
def test_bad_gradients_are_withheld_bit_for_bit(tmp_path: Path, mode: Any) -> None:
    ends = []
    for is_watched in (True, False):
        model, optimizer, monitor = make(mode, tmp_path / str(is_watched))
        generator = torch.Generator("cuda").manual_seed(1)
        for step in range(60):
            x = torch.randn(32, 64, device="cuda", generator=generator)
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            is_bad = step % 7 == 3
            if is_bad:
                next(model.parameters()).grad[3, 5] = math.nan  # type: ignore[index]
            if is_watched:
                assert monitor.step(loss)
            elif is_bad:
                continue
            if is_watched:
                optimizer.step()
            else:
                monitor._gate._inner()
        ends.append((model, optimizer))
        summary = monitor.finalize()
        assert not is_watched or summary["guard"]["skipped_steps"] == 8
    (ours, our_optimizer), (theirs, their_optimizer) = ends
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)
        for key, value in their_optimizer.state[other].items():
            assert torch.equal(our_optimizer.state[mine][key], value)


def test_a_nan_in_a_weight_is_rolled_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(16, 4).cuda()
    optimizer = FUSED["AdamW"](model.parameters())
    guard = fs.Guard(mode="recover", snapshot_interval=5)
    struck = False
    with fs.Monitor(model, optimizer, tmp_path, guard) as monitor:
        for step, x in monitor.loop([torch.randn(8, 16) for _ in range(40)]):
            if step == 22 and not struck:
                struck = True
                model.weight.data[1, 2] = math.nan
            optimizer.zero_grad()
            loss = model(x.cuda()).square().mean()
            loss.backward()
            monitor.clip_grad_norm_(1.0)
            assert monitor.step(loss)
            optimizer.step()
    assert monitor.finalize()["guard"]["total_recoveries"] == 1
    assert all(p.isfinite().all() for p in model.parameters())
