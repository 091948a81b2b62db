"""The host that runs a step ahead: on the CPU, where it is made to, everything can be compared."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import foreshock as fs
from foreshock import monitor as monitor_module
from foreshock.guard import LaggingWatch, Reason, Watch
from foreshock.records import read_telemetry
from tests.monitor import training as t
from tests.monitor.test_clipping_in_step import FUSED, Loop, assert_close
from tests.monitor.test_signals_of_a_step import HostReads
from tests.monitor.test_signals_of_a_step import reads as reads

MODES = ("observe", "skip", "recover")


@pytest.fixture(autouse=True)
def the_cpu_is_a_device_to_run_ahead_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor_module, "_LAGGING_DEVICE", "cpu")


def fused_run(**given: Any) -> t.Run:
    options = {"optimizer": FUSED["AdamW"], "epochs": 6, **given}
    return t.make_run(**options)


def watched(run: t.Run, out_dir: Path, mode: Any = "recover", **guard: Any) -> dict[str, Any]:
    options = {"snapshot_interval": 4, "lr_backoff": 1.0, **guard}
    monitor = fs.Monitor(
        run.model, run.optimizer, out_dir, fs.Guard(mode=mode, **options), state=run.state
    )
    assert isinstance(monitor._watch, LaggingWatch)
    t.train(run, monitor)
    return monitor.finalize()


def records(out_dir: Path, event: str) -> list[dict[str, Any]]:
    told = read_telemetry(out_dir / "telemetry.jsonl").records
    return [r for r in told if r["event"] == event]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("judges_first", [True, False])
@pytest.mark.parametrize("name", FUSED)
def test_a_clean_run_ends_with_the_bits_that_it_ends_with_if_waited_for(
    tmp_path: Path, mode: Any, judges_first: bool, name: str
) -> None:
    ends = []
    for sync in (True, False):
        run = fused_run(optimizer=FUSED[name], judges_first=judges_first)
        guard = fs.Guard(mode=mode, snapshot_interval=4)
        monitor = fs.Monitor(
            run.model, run.optimizer, tmp_path / str(sync), guard, state=run.state, sync=sync
        )
        assert type(monitor._watch) is (Watch if sync else LaggingWatch)
        t.train(run, monitor)
        monitor.finalize()
        ends.append(run)
        told = records(tmp_path / str(sync), "telemetry")
        assert {r["step"]: r["train_loss"] for r in told} == {
            step: run.losses[step] for step in range(0, 36, 10)
        }
    # A factor in float32 on the device, in float64 on the host.
    for mine, other in zip(ends[1].model.parameters(), ends[0].model.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)
    assert [v.step for v in ends[1].verdicts] == list(range(-1, 35))
    assert all(ends[1].verdicts)


def test_without_a_clip_the_bits_are_those_of_the_loop_by_itself(tmp_path: Path) -> None:
    for mode in MODES:
        plain = t.train(fused_run(max_norm=None))
        run = fused_run(max_norm=None)
        watched(run, tmp_path / mode, mode)
        t.assert_same_bits(run, plain)


def test_fifty_bad_gradients_are_withheld_bit_for_bit(tmp_path: Path) -> None:
    """Parameters, moments and step counts, as though the optimizer had not been called."""
    struck = set(random.Random(0).sample(range(300), 50))
    runs = []
    for is_watched in (True, False):
        loop = Loop(FUSED["AdamW"])
        monitor = None
        if is_watched:
            guard = fs.Guard(mode="skip", max_consecutive_skips=100)
            monitor = fs.Monitor(loop.model, loop.optimizer, tmp_path, guard)
        for step in range(300):
            loss = loop.backward()
            if step in struck:
                next(loop.model.parameters()).grad[1, 2] = random.choice([math.nan, -math.inf])
            if monitor is not None:
                assert monitor.step(loss)
            if monitor is not None or step not in struck:
                loop.optimizer.step()
        runs.append(loop)
        if monitor is not None:
            summary = monitor.finalize()
    assert summary["guard"]["skipped_steps"] == 50
    for mine, other in zip(*(loop.model.parameters() for loop in runs), strict=True):
        assert torch.equal(mine, other)
    for mine, other in zip(*(loop.optimizer.state.values() for loop in runs), strict=True):
        assert all(torch.equal(mine[key], other[key]) for key in other)
    skipped = records(tmp_path, "update_skipped")
    assert {r["step"] for r in skipped} == struck
    assert {r["offender"]["name"] for r in skipped} == {"0.weight"}


FAULTS: dict[str, tuple[Callable[[t.Run], None], str]] = {
    "nan in weight": (t.nan_in_weight, "start"),
    "nan in weight after the update": (t.nan_in_weight, "update"),
    "nan in buffer": (t.nan_in_buffer, "start"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("step", [5, 17, 34, 35])
@pytest.mark.parametrize("judges_first", [True, False])
def test_a_transient_fault_is_rolled_back_and_leaves_no_trace(
    tmp_path: Path, fault: str, step: int, judges_first: bool
) -> None:
    hit, when = FAULTS[fault]
    clean, run = fused_run(judges_first=judges_first), None
    watched(clean, tmp_path / "clean")
    run = fused_run(judges_first=judges_first, strikes=[t.Strike(step, hit, when)])
    summary = watched(run, tmp_path / "struck")
    t.assert_same_bits(run, clean)
    assert summary["guard"]["total_rollbacks"] == summary["guard"]["total_recoveries"] == 1
    assert summary["total_steps"] == 36
    (event,) = records(tmp_path / "struck", "rollback_success")
    assert abs(event["step"] - step) <= 1
    assert event["to_step"] <= step


def test_a_bad_loss_withholds_its_update_if_it_is_told_in_time(tmp_path: Path) -> None:
    for judges_first in (True, False):
        loop = Loop(FUSED["AdamW"])
        out_dir = tmp_path / str(judges_first)
        monitor = fs.Monitor(loop.model, loop.optimizer, out_dir, fs.Guard(mode="skip"))
        for step in range(6):
            loss = loop.backward()
            loss = torch.full((), math.nan) if step == 3 else loss
            before = next(loop.model.parameters()).detach().clone()
            if judges_first:
                monitor.step(loss)
            loop.optimizer.step()
            if not judges_first:
                monitor.step(loss)
            is_same = torch.equal(before, next(loop.model.parameters()))
            assert is_same == (judges_first and step == 3)
        monitor.finalize()
        told = records(out_dir, "update_skipped" if judges_first else "anomaly_seen")
        assert [(r["step"], r["reason"]) for r in told] == [(3, "NONFINITE_LOSS")]


@pytest.mark.parametrize("response", ["log", "skip"])
def test_spikes_are_found_on_the_device_by_the_same_rule(tmp_path: Path, response: Any) -> None:
    """Scores, records and what is withheld are those of the host that waits."""
    values = [2 + 0.1 * math.sin(7 * i) for i in range(120)]
    values[9], values[60], values[61], values[90] = 40.0, 30.0, 30.0, math.nan
    told, ends = [], []
    for sync in (True, False):
        loop = Loop(FUSED["SGD"])
        guard = fs.Guard(mode="skip", spike_response=response, max_consecutive_skips=10)
        out_dir = tmp_path / str(sync)
        monitor = fs.Monitor(
            loop.model, loop.optimizer, out_dir, guard, sync=sync, telemetry_interval=1
        )
        for value in values:
            loop.backward()
            monitor.step(torch.tensor(value))
            loop.optimizer.step()
        monitor.finalize()
        ends.append(loop)
        scores = {r["step"]: r["loss_z"] for r in records(out_dir, "telemetry")}
        events = [
            (r["event"], r["step"], tuple(r["reasons"]))
            for r in read_telemetry(out_dir / "telemetry.jsonl").records
            if "reasons" in r
        ]
        told.append((scores, events))
    (ours, our_events), (theirs, their_events) = told
    assert {step for _, step, _ in our_events} == {9, 60, 61, 90}
    assert our_events == their_events
    for step, score in theirs.items():
        assert ours[step] == (None if score is None else pytest.approx(score, rel=1e-9, abs=1e-9))
    for mine, other in zip(*(loop.model.parameters() for loop in ends), strict=True):
        assert torch.equal(mine, other)


def test_a_fault_that_persists_ends_in_an_abort(tmp_path: Path) -> None:
    run = fused_run(strikes=[t.Strike(9, t.nan_in_weight, lives=100)])
    summary = watched(run, tmp_path, max_rollbacks=2)
    assert not run.verdicts[-1]
    assert summary["guard"]["integrity_status"] == "ABORTED"
    assert summary["guard"]["total_rollbacks"] == 2
    assert Reason.TOO_MANY_ROLLBACKS in run.verdicts[-1].reasons
    assert run.verdicts[-1].offender is not None
    assert run.verdicts[-1].offender.name == "head.weight"


def test_the_offending_batch_is_left_out_not_the_one_fetched_since(tmp_path: Path) -> None:
    seen: list[list[int]] = []
    for sync in (True, False):
        batches = [torch.full((2, 3), 0.01 * i) for i in range(20)]
        model = nn.Linear(3, 1)
        optimizer = FUSED["SGD"](model.parameters())
        guard = fs.Guard(mode="recover", snapshot_interval=3, skip_batches=1, clean_steps=1)
        monitor = fs.Monitor(model, optimizer, tmp_path / str(sync), guard, sync=sync)
        fetched: list[int] = []
        for _, x in monitor.loop(batches):
            fetched.append(round(100 * x[0, 0].item()))
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss = loss + 1e9 if fetched[-1] == 11 else loss  # over the threshold
            loss.backward()
            monitor.step(loss)
            optimizer.step()
        monitor.finalize()
        seen.append(fetched)
    assert seen[0].count(11) == seen[1].count(11) == 1
    assert seen[0][-1] == seen[1][-1] == 19
    assert seen[1].count(12) == 2


@pytest.mark.parametrize("in_loop", [True, False])
@pytest.mark.parametrize("judged", ["before", "after", "never"])
def test_wherever_the_step_is_judged_clip_and_accumulation_work(
    tmp_path: Path, in_loop: bool, judged: str
) -> None:
    ours, theirs = Loop(FUSED["AdamW"]), Loop(FUSED["AdamW"])
    monitor = fs.Monitor(ours.model, ours.optimizer, tmp_path, fs.Guard(mode="recover"))
    turns = monitor.loop([None] * 6) if in_loop else range(6)
    for _ in turns:
        for _ in range(2):
            loss = ours.backward()
            if judged == "before":
                assert monitor.step(loss)
        theirs.backward(), theirs.backward()
        ours_norm = monitor.clip_grad_norm_(0.3)
        norm = nn.utils.clip_grad_norm_(theirs.model.parameters(), 0.3)
        torch.testing.assert_close(ours_norm, norm, rtol=1e-5, atol=0)
        if judged == "before":
            assert monitor.step(loss)
        ours.optimizer.step()
        theirs.optimizer.step()
        if judged == "after":
            assert monitor.step(loss)
    assert_close(ours, theirs, rtol=1e-5)
    assert monitor.finalize()["guard"]["anomalies_seen"] == 0
    assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sync", [True, False])
def test_mixed_precision_with_a_scaler(tmp_path: Path, dtype: torch.dtype, sync: bool) -> None:
    """Trap 7: the infinities with which a scaler finds its scale are its own business."""
    ours, theirs = Loop(FUSED["AdamW"]), Loop(FUSED["AdamW"])
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**18, growth_interval=4) for _ in range(2)]
    state = {"scaler": scalers[0]}
    guard = fs.Guard(mode="skip")
    monitor = fs.Monitor(ours.model, ours.optimizer, tmp_path, guard, state=state, sync=sync)
    lowest = math.inf
    for step in range(16):
        for loop, scaler in zip((ours, theirs), scalers, strict=True):
            x = torch.randn(8, 5, generator=loop.generator)
            loop.optimizer.zero_grad()
            with torch.autocast("cpu", dtype):
                loss = loop.model(x).float().square().mean()
            scaler.scale(loss * (1e34 if step < 4 else 1)).backward()
            scaler.unscale_(loop.optimizer)
            if loop is ours:
                monitor.clip_grad_norm_(0.3)
                assert monitor.step(loss)
            else:
                nn.utils.clip_grad_norm_(loop.model.parameters(), 0.3)
            scaler.step(loop.optimizer)
            scaler.update()
        assert scalers[0].get_scale() == scalers[1].get_scale()
        lowest = min(lowest, scalers[0].get_scale())
    assert lowest < 2.0**18
    assert monitor.finalize()["guard"]["anomalies_seen"] == 0


@pytest.mark.parametrize("sync", [True, False])
def test_a_gradient_that_is_bad_at_a_scale_of_one_is_bad(tmp_path: Path, sync: bool) -> None:
    loop = Loop(FUSED["AdamW"])
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    state = {"scaler": scaler}
    guard = fs.Guard(mode="skip", max_consecutive_skips=5)
    monitor = fs.Monitor(loop.model, loop.optimizer, tmp_path, guard, state=state, sync=sync)
    goes_on, steps = True, 0
    while goes_on:
        steps += 1
        x = torch.randn(8, 5, generator=loop.generator)
        loop.optimizer.zero_grad()
        loss = loop.model(x).square().mean()
        scaler.scale(loss).backward()
        next(loop.model.parameters()).grad[0, 0] = math.nan
        scaler.unscale_(loop.optimizer)
        monitor.clip_grad_norm_(1.0)
        goes_on = monitor.step(loss)
        scaler.step(loop.optimizer)
        scaler.update()
    # Three to bring the scale from 8 to 1, and five bad ones. A host that lags hears of each a
    # step later, when the scale is one halving further on.
    assert steps == 8
    assert monitor.finalize()["guard"]["abort"]["reason"] == "NONFINITE_GRADIENT"


def test_several_groups_frozen_and_unused_parameters(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 1), "unused": nn.Linear(2, 2)})
    model["a"].bias.requires_grad_(False)
    groups = [
        {"params": [model["a"].weight], "lr": 1e-3},
        {"params": [*model["b"].parameters(), *model["unused"].parameters()]},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, fused=True)
    monitor = fs.Monitor(model, optimizer, tmp_path, fs.Guard(mode="recover", snapshot_interval=5))
    frozen = model["a"].bias.clone()
    for step, x in monitor.loop([torch.randn(4, 3) for _ in range(20)]):
        optimizer.zero_grad()
        loss = model["b"](model["a"](x)).square().mean()
        loss.backward()
        if step == 8:
            model["b"].weight.grad[0, 1] = math.nan
        norm = monitor.clip_grad_norm_(1.0)
        assert bool(norm.isnan()) == (step == 8)
        assert monitor.step(loss)
        optimizer.step()
    assert torch.equal(model["a"].bias, frozen)
    assert all(p.isfinite().all() for p in model.parameters())
    assert monitor.finalize()["guard"]["skipped_steps"] == 1


def test_a_norm_that_is_not_finite_is_an_error_if_wanted(tmp_path: Path) -> None:
    loop = Loop(FUSED["AdamW"])
    monitor = fs.Monitor(loop.model, loop.optimizer, tmp_path)
    loop.backward()
    next(loop.model.parameters()).grad[0, 0] = math.inf
    with pytest.raises(RuntimeError, match="non-finite"):
        monitor.clip_grad_norm_(1.0, error_if_nonfinite=True)
    assert monitor.clip_grad_norm_(1.0, norm_type=math.inf) == math.inf


def test_where_the_optimizer_cannot_withhold_the_host_waits(tmp_path: Path) -> None:
    for optimizer, guard, lags in (
        (torch.optim.AdamW, fs.Guard(mode="skip"), False),
        (torch.optim.AdamW, fs.Guard(mode="observe"), True),
        (FUSED["AdamW"], fs.Guard(mode="recover"), True),
        (FUSED["AdamW"], fs.Guard(mode="recover", spike_response="skip"), True),
    ):
        model = nn.Linear(2, 2)
        monitor = fs.Monitor(model, optimizer(model.parameters()), tmp_path, guard)
        assert isinstance(monitor._watch, LaggingWatch) == lags
        monitor.finalize()


@pytest.mark.parametrize("mode", MODES)
def test_a_clean_step_reads_nothing_from_the_device(
    tmp_path: Path, reads: HostReads, mode: Any
) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = FUSED["AdamW"](model.parameters())
    monitor = fs.Monitor(model, optimizer, tmp_path, fs.Guard(mode=mode), spectral_interval=5)
    for step, x in monitor.loop([torch.randn(8, 4) for _ in range(110)]):
        if step == 10:
            reads.count = 0
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        monitor.clip_grad_norm_(1e-3)
        assert monitor.step(loss)
        optimizer.step()
    assert reads.count == 0
