"""Frozen parameters can be left alone; the count of steps can begin anywhere."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import nn

import foreshock as fs
from foreshock.records import read_telemetry

Parameters = Literal["all", "trainable"]
RECOVER = fs.Guard(mode="recover", snapshot_interval=4, clean_steps=1)


class Adapted(nn.Module):
    """A frozen layer with a small one behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(8, 64).requires_grad_(False)
        self.adapter = nn.Linear(64, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.adapter(self.frozen(x).tanh())  # type: ignore[no-any-return]


def make(out_dir: Path, guard: fs.Guard = RECOVER, **given: Any) -> tuple[Adapted, fs.Monitor]:
    model = Adapted()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return model, fs.Monitor(model, optimizer, out_dir, guard, **given)


def train(model: Adapted, monitor: fs.Monitor, steps: int) -> list[fs.Verdict]:
    verdicts = []
    for _ in range(steps):
        monitor._optimizer.zero_grad()
        loss = model(torch.randn(4, 8)).square().mean()
        loss.backward()
        verdicts.append(monitor.step(loss))
        monitor._optimizer.step()
    return verdicts


@pytest.mark.parametrize("parameters", ["all", "trainable"])
def test_a_snapshot_has_the_frozen_ones_only_if_all_are_asked_for(
    tmp_path: Path, parameters: Parameters
) -> None:
    model, monitor = make(tmp_path, parameters=parameters)
    train(model, monitor, 6)
    saved = monitor._watch.history.ring.entries[-1].saved["parameters"]
    wanted = {n for n, p in model.named_parameters() if parameters == "all" or p.requires_grad}
    assert set(saved) == wanted


@pytest.mark.parametrize("verifies", [False, True])
def test_a_bad_value_is_named_and_undone_where_only_what_is_trained_is_guarded(
    tmp_path: Path, verifies: bool
) -> None:
    guard = RECOVER.model_copy(update={"verify_state": verifies})
    model, monitor = make(tmp_path, guard, parameters="trainable")
    train(model, monitor, 10)
    frozen = model.frozen.weight.clone()
    with torch.no_grad():
        model.adapter.weight[0, 3] = math.nan
    (verdict,) = train(model, monitor, 1)
    assert verdict.action is fs.Action.ROLL_BACK
    assert verdict.offender is not None
    assert verdict.offender.name == "adapter.weight"
    assert model.adapter.weight.isfinite().all()
    assert torch.equal(model.frozen.weight, frozen)


def test_what_is_frozen_may_change_between_two_updates(tmp_path: Path) -> None:
    guard = RECOVER.model_copy(update={"verify_state": True})
    model, monitor = make(tmp_path, guard, parameters="trainable")
    train(model, monitor, 3)
    with torch.no_grad():
        model.frozen.weight[2, 3] += 1
    (verdict,) = train(model, monitor, 1)
    assert verdict.action is fs.Action.CONTINUE


@pytest.mark.parametrize("parameters", ["all", "trainable"])
def test_what_is_frozen_is_scanned_only_if_all_are_asked_for(
    tmp_path: Path, parameters: Parameters
) -> None:
    model, monitor = make(tmp_path, parameters=parameters)
    train(model, monitor, 6)
    with torch.no_grad():
        model.frozen.weight[2, 3] = math.nan
    (verdict,) = train(model, monitor, 1)
    assert (fs.guard.Reason.NONFINITE_WEIGHTS in verdict.reasons) == (parameters == "all")
    assert verdict.action is (fs.Action.ROLL_BACK if parameters == "all" else fs.Action.SKIP)


def test_a_gradient_of_what_was_frozen_is_clipped_all_the_same(tmp_path: Path) -> None:
    model, monitor = make(tmp_path, parameters="trainable")
    model.frozen.requires_grad_(True)
    (1e3 * model(torch.randn(4, 8))).sum().backward()
    monitor.clip_grad_norm_(1.0)
    norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
    assert len(norms) == 4
    assert torch.stack(norms).norm() == pytest.approx(1.0, rel=1e-4)


def test_the_count_of_steps_begins_where_it_is_told_to(tmp_path: Path) -> None:
    model, monitor = make(tmp_path, first_step=41, telemetry_interval=1)
    verdicts = train(model, monitor, 3)
    assert [v.step for v in verdicts] == [41, 42, 43]
    assert monitor.finalize()["total_steps"] == 44
    told = read_telemetry(tmp_path / "telemetry.jsonl").records
    assert [r["step"] for r in told if r["event"] == "telemetry"] == [41, 42, 43]


def test_a_run_whose_count_begins_later_can_be_taken_up(tmp_path: Path) -> None:
    guard = RECOVER.model_copy(update={"persist_dir": tmp_path / "snapshots"})
    model, monitor = make(tmp_path, guard, first_step=41)
    train(model, monitor, 9)
    monitor.finalize()
    _, again = make(tmp_path, guard, first_step=41)
    assert again.resume() == 48
    again.finalize()


def test_the_counts_are_those_of_the_summary(tmp_path: Path) -> None:
    model, monitor = make(tmp_path)
    train(model, monitor, 6)
    with torch.no_grad():
        model.adapter.weight[0, 3] = math.nan
    train(model, monitor, 2)
    counts = monitor.counts
    assert counts["total_rollbacks"] == 1
    assert counts.items() <= monitor.finalize()["guard"].items()


@pytest.mark.parametrize(("name", "value"), [("parameters", "some"), ("first_step", -1)])
def test_a_wrong_choice_is_an_error_that_names_it(tmp_path: Path, name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name):
        make(tmp_path, **{name: value})
