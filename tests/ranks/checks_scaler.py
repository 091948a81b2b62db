"""A GradScaler on many ranks: the same updates left out, and the same scale, on all of them."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import foreshock as fs
from foreshock.distributed_part import local_part
from tests.ranks.checks_recovery import nan_in_weight
from tests.ranks.training import (
    SCALED_KINDS,
    Batches,
    How,
    Run,
    Strike,
    assert_same_on_all_ranks,
    counted,
    gathered,
    make_run,
    number_of_data,
    parameter,
    ranks,
    train,
    train_step,
)

FIT = 2.0**10
"""A scale at which nothing overflows."""


def kinds() -> tuple[str, ...]:
    return SCALED_KINDS if dist.get_world_size() == 2 else ("tp alone", "fsdp2 tp")


def overflow(model: nn.Module, optimizer: Any) -> None:
    local_part(parameter(model, "down.weight").grad).view(-1)[:1] = math.inf


class Course:
    """Scale and weights before each step."""

    def __init__(self) -> None:
        self.scales: list[float] = []
        self.bits: list[dict[str, bytes]] = []

    def note(self, run: Run, step: int) -> None:
        assert run.scaler is not None
        self.scales.append(run.scaler.get_scale())
        self.bits.append(run.bits())

    def left_out(self) -> list[int]:
        """Steps that have changed nothing."""
        return [i for i, (a, b) in enumerate(itertools.pairwise(self.bits)) if a == b]


def norms(out: Path) -> list[float]:
    """Of the gradients, as they were seen; the first rank writes them."""
    gathered(None)
    told = fs.records.read_telemetry(out / "telemetry.jsonl").records
    return [r["grad_norm"] for r in told if r["event"] == "telemetry"]


def check_an_overflow_in_the_shard_of_one_rank_is_that_of_all(out: Path) -> None:
    """torch's own found_inf is that of the first gradient's mesh, or of the rank alone."""
    hows = [How(is_fused=is_fused) for is_fused in (False, True)]
    hows += [How("none", is_fused=True), How("none", "first"), How("none", "last")]
    hows.append(How("without loss", "never"))
    if dist.get_world_size() > 2:
        hows = hows[:3]
    for kind in kinds():
        for number, how in enumerate(hows):
            course = Course()
            how.scale, how.steps = FIT, 10
            strike = Strike(6, 1, overflow, "backward")
            name = f"{kind} {number}"
            given = {"at_step": course.note, "mode": "skip", "monitor": {"telemetry_interval": 1}}
            run = train(kind, out / name, strike, how=how, **given)
            assert_same_on_all_ranks((course.scales, [(v.step, v.action) for v in run.verdicts]))
            assert course.scales == [FIT] * 5 + [2 * FIT] * 2 + [FIT] * 3, name
            assert course.left_out() == [6], name
            assert not run.bad
            assert run.summary["guard"]["anomalies_seen"] == 0
            assert run.summary["guard"]["skipped_steps"] == 0
            assert run.scaler is not None
            assert "step" not in vars(run.scaler)
            if how.judges == "last":
                assert max(norms(out / name)) < 10, name


@ranks(2)
def check_the_search_for_a_scale_is_no_alarm(out: Path) -> None:
    for kind in kinds():
        for is_fused in (False, True):
            course = Course()
            how = How(is_fused=is_fused, scale=2.0**22)
            name = f"{kind} {is_fused}"
            run = train(kind, out / name, how=how, at_step=course.note, max_consecutive_skips=2)
            assert_same_on_all_ranks(course.scales)
            assert course.left_out()[:3] == [0, 1, 2], (name, course.scales)
            assert course.scales[-1] < 2.0**20, (name, course.scales)
            assert not run.bad
            assert all(v == 0 for k, v in run.summary["guard"].items() if "skip" in k)


def check_a_gradient_that_is_bad_at_a_scale_of_one_is_bad_on_all_ranks(out: Path) -> None:
    for kind in kinds():
        strike = Strike(4, 1, overflow, "backward")
        run = train(kind, out / kind, strike, how=How(scale=1.0, steps=5), mode="skip")
        assert_same_on_all_ranks([(v.step, v.action, str(v.offender)) for v in run.verdicts])
        (bad,) = run.bad
        assert bad.action is fs.Action.SKIP
        assert bad.offender is not None
        assert bad.offender.ranks == (1,)


@ranks(2)
def check_a_rollback_restores_the_scale_on_all_ranks(out: Path) -> None:
    for kind in kinds():
        for is_fused in (False, True):
            how = How(is_fused=is_fused, scale=FIT)
            courses = []
            for name, strikes in (("clean", ()), ("struck", (Strike(10, 1, nan_in_weight),))):
                course = Course()
                where = out / f"{kind} {is_fused} {name}"
                run = train(kind, where, *strikes, how=how, at_step=course.note)
                assert_same_on_all_ranks(course.scales)
                assert run.summary["guard"]["total_rollbacks"] == len(strikes)
                assert run.scaler is not None
                courses.append((course, run.bits(), run.scaler.state_dict()))
            (clean, *end), (struck, *end_of_struck) = courses
            assert struck.scales == clean.scales[:11] + clean.scales[8:]
            assert end == end_of_struck
            assert clean.scales[8] < clean.scales[-1]


@ranks(2)
def check_a_scaler_has_no_further_collective_in_a_clean_step(out: Path) -> None:
    for kind in kinds():
        hows = [How(steps=4), *(How("none", judges, steps=4) for judges in ("first", "last"))]
        for number, how in enumerate(hows):
            found = {}
            for scale in (None, FIT):
                how.scale = scale
                begun: list[int] = []

                def note(run: Run, step: int, begun: list[int] = begun) -> None:
                    begun.append(len(calls))

                with counted() as calls:
                    where = out / f"{kind} {number} {scale}"
                    quiet: dict[str, Any] = {"monitor": {"spectral_enabled": False}}
                    quiet |= {"straggler_ratio": math.inf, "mode": "skip"}
                    train(kind, where, how=how, at_step=note, **quiet)
                sent = [n for n, _ in calls]
                found[scale] = [sent[a:b] for a, b in itertools.pairwise(begun)]
            assert found[FIT] == found[None], (kind, how)
            assert all(step == [144] * len(step) for step in found[FIT])


@ranks(2)
def check_outside_of_a_loop_no_rank_waits_for_another(out: Path) -> None:
    """Also where nothing is touched, and the ranks' scales come to differ."""
    for kind in SCALED_KINDS:
        for mode, judges, clips in itertools.product(
            ("observe", "skip"), ("first", "last"), ("with loss", "none")
        ):
            where = out / f"{kind} {mode} {judges} {clips}"
            how = How(clips=clips, judges=judges, scale=FIT)
            run = make_run(kind, where, how)
            strikes = tuple(Strike(step, 1, overflow, "backward") for step in (3, 5, 6))
            guard, state = fs.Guard(mode=mode), {"scaler": run.scaler}
            with fs.Monitor(run.model, run.optimizer, where, guard, state=state) as monitor:
                for step, (x, y) in enumerate(Batches(number_of_data(kind), 12)):
                    train_step(run, monitor, step, x, y, strikes, how)
            assert run.scaler is not None
            assert_same_on_all_ranks([str(v) for v in run.verdicts])
            assert not run.bad
            assert monitor.finalize()["total_steps"] == 12
            scales = gathered(run.scaler.get_scale())
            assert (len(set(scales)) == 1) is (mode == "skip" or kind == "fsdp2"), scales


@ranks(2)
def check_scales_that_differ_where_nothing_is_touched_hang_no_rank(out: Path) -> None:
    """One rank's scaler has given up, the other's would not call it an alarm yet."""
    run = make_run("ddp", out, How())
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0 if dist.get_rank() else FIT)
    with fs.Monitor(run.model, run.optimizer, out, state={"scaler": scaler}) as monitor:
        for p in run.model.parameters():
            p.grad = torch.full_like(p, math.nan)
        monitor.step(1.0)
        assert_same_on_all_ranks(monitor.counts["anomalies_seen"])
    assert monitor.finalize()["guard"]["anomalies_seen"] == 1
