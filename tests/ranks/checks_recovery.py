"""All ranks return to the same step, and end with the same bits as if nothing had happened."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import math
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import foreshock as fs
from foreshock.distributed_part import local_part
from foreshock.guard import snapshot_file
from foreshock.guard.parts import SnapshotFolder, folder_of
from tests.monitor.training import flip_exponent
from tests.ranks.training import (
    KINDS,
    Batches,
    How,
    Run,
    Strike,
    assert_same_on_all_ranks,
    clean_bits,
    counted,
    gathered,
    make_run,
    parameter,
    ranks,
    train,
)


def nan_in_weight(model: nn.Module, optimizer: Any) -> None:
    local_part(parameter(model, "down.weight")).view(-1)[:1] = math.nan


def flipped_bit(model: nn.Module, optimizer: Any) -> None:
    """The lowest of the mantissa: nobody would see it in any number."""
    weight = local_part(parameter(model, "norm.weight")).view(-1)
    weight.view(torch.int32)[0] ^= 1


def flipped_moment(model: nn.Module, optimizer: Any) -> None:
    flip_exponent(local_part(optimizer.state[parameter(model, "up.weight")]["exp_avg"]))


STRIKES = (
    Strike(9, 1, nan_in_weight),
    Strike(13, 0, nan_in_weight, "clip"),
    Strike(15, 1, nan_in_weight, "clip"),  # found when the loop is at its end
    Strike(2, 0, nan_in_weight),
)


def check_a_run_that_was_struck_ends_bit_identical(out: Path) -> None:
    courses = [(STRIKES, False), (STRIKES[:1], True)]
    if dist.get_world_size() > 2:
        courses = [(STRIKES[::3], False)]
    for kind in KINDS:
        for strikes, is_fused in courses:
            how = How(is_fused=is_fused)
            clean = clean_bits(kind, out.parent / f"clean {kind} {is_fused}", is_fused=is_fused)
            for number, strike in enumerate(strikes):
                once = dataclasses.replace(strike)
                name = f"{kind} {is_fused} {number}"
                run = train(kind, out / name, once, how=how, clean_steps=1)
                assert_same_on_all_ranks([(v.step, v.action) for v in run.verdicts])
                assert run.summary["guard"]["total_rollbacks"] == 1, name
                # Of more ranks DistributedDataParallel's own first sums are in another order.
                is_off = (strike.step, kind, dist.get_world_size()) == (2, "ddp", 4)
                assert is_off or run.bits() == clean, name
                to = [e["to_step"] for e in rolled_back(out / name)]
                assert to == [{2: 0, 9: 8}.get(strike.step, 12)]


@ranks(2)
def check_what_one_rank_asks_for_is_done_by_all_at_the_same_step(out: Path) -> None:
    for kind in KINDS:
        found: dict[str, Any] = {}

        def ask(run: Run, step: int, found: dict[str, Any] = found) -> None:
            watch = run.model.watched
            if step == 5 and dist.get_rank() == 1:
                watch.request_snapshot()
                assert watch.lower_learning_rate() == 0.5
            if step == 9:
                found["factor"] = watch.learning_rate.factor
                found["steps"] = [kept.step for kept in watch.history.ring.entries]

        train_watched(kind, out / kind, ask, lr_backoff=0.5, lr_recovery_steps=8)
        assert_same_on_all_ranks(found)
        assert found["factor"] == 0.5 + 0.5 * 4 / 8
        assert 6 in found["steps"]


@ranks(2)
def check_a_risk_that_one_rank_sees_sends_all_back(out: Path) -> None:
    for kind in KINDS:
        seen = {"has": False}

        def see(run: Run, step: int, seen: dict[str, bool] = seen) -> None:
            if step == 7 and dist.get_rank() == 1 and not seen["has"]:
                seen["has"] = run.model.watched._is_unstable_here = True

        run = train_watched(kind, out / kind, see)
        assert_same_on_all_ranks([(v.step, v.action, v.reasons) for v in run.verdicts])
        (bad,) = run.bad
        assert (bad.step, bad.action) == (7, fs.Action.ROLL_BACK)
        assert bad.reasons == (fs.guard.Reason.SPECTRAL_INSTABILITY,)


def rolled_back(out: Path) -> list[dict[str, Any]]:
    told = fs.records.read_telemetry(out / "telemetry.jsonl").records
    return [r for r in told if r["event"] == "rollback_success"]


@ranks(2)
def check_a_flipped_bit_in_a_rank_is_named_and_undone(out: Path) -> None:
    for kind in KINDS:
        run = train(kind, out / kind, Strike(11, 1, flipped_moment), verify_state=True)
        assert_same_on_all_ranks([(v.step, v.action) for v in run.verdicts])
        (bad,) = run.bad
        assert bad.step == 11
        assert bad.reasons[0] is fs.guard.Reason.STATE_CHANGED
        assert bad.offender.rank == 1
        assert "up.weight: exp_avg" in bad.offender.name
        assert run.bits() == clean_bits(kind, out.parent / f"clean {kind} False")


def flipped_bit_of(key: str) -> Callable[[nn.Module, Any], None]:
    """The lowest, in what an optimizer keeps for a parameter."""

    def hit(model: nn.Module, optimizer: Any) -> None:
        kept = local_part(optimizer.state[parameter(model, "norm.weight")][key])
        kept.view(-1)[:1].view(torch.int32)[0] ^= 1

    return hit


CHANGED_COPIES = (
    ("norm.weight", flipped_bit),
    ("norm.weight: exp_avg", flipped_bit_of("exp_avg")),
    ("norm.weight: exp_avg_sq", flipped_bit_of("exp_avg_sq")),
    ("norm.weight: step", flipped_bit_of("step")),
)


def check_a_copy_that_was_changed_by_a_bit_is_named_within_the_interval(out: Path) -> None:
    for kind, (name, hit) in itertools.product(("ddp", "tp"), CHANGED_COPIES):
        # The snapshot of step 8 is compared too, or it would be trusted.
        is_short = dist.get_world_size() > 2 or hit is not flipped_bit
        for interval, step in ((1, 6), (5, 8))[: 1 if is_short else 2]:
            where = out / f"{kind} {name} {interval}"
            strike = Strike(6, 1, hit)
            run = train(kind, where, strike, snapshot_interval=4, replica_interval=interval)
            assert_same_on_all_ranks([(v.step, v.action, str(v.offender)) for v in run.verdicts])
            (bad,) = run.bad
            assert bad.step == step
            assert bad.reasons == (fs.guard.Reason.REPLICAS_DIFFER,)
            assert bad.offender.name.endswith(name), bad.offender
            assert bad.offender.kind == ("parameter" if hit is flipped_bit else "optimizer state")
            assert bad.offender.ranks == ((0, 1) if dist.get_world_size() == 2 else (1,))
            assert run.bits() == clean_bits(kind, out.parent / f"clean {kind} False")


class OwnMomentum(torch.optim.SGD):
    """One that keeps what is its rank's alone, as with errors that are fed back."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["error"] = torch.full_like(p, 1.0 + dist.get_rank())
        super().step(closure)


def check_what_a_rank_rightly_keeps_for_itself_is_no_difference(out: Path) -> None:
    """State of an optimizer that is not torch's, and of parameters that others update."""

    def its_own(model: nn.Module) -> torch.optim.Optimizer:
        return OwnMomentum(model.parameters(), lr=0.1, momentum=0.9)

    def of_a_part(model: nn.Module) -> torch.optim.Optimizer:
        mine = list(model.parameters())[dist.get_rank() :: dist.get_world_size()]
        return torch.optim.AdamW(mine, lr=1e-2)

    def of_parts_by_torch(model: nn.Module) -> torch.optim.Optimizer:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its modules' own, of torch.jit
            optim = importlib.import_module("torch.distributed.optim")
        return optim.ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-2)

    for name, make in (("own", its_own), ("part", of_a_part), ("zero", of_parts_by_torch)):
        model = make_run("ddp", out, How()).model
        optimizer, words = make(model), []
        guard = fs.Guard(mode="recover", replica_interval=1)
        with fs.Monitor(model, optimizer, out / name, guard, spectral_enabled=False) as monitor:
            for x, y in Batches(dist.get_rank(), 6):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(x), y)
                loss.backward()
                with counted() as calls:
                    assert monitor.step(loss).action is fs.Action.CONTINUE
                words.append(len(calls))
                optimizer.step()
                for i, p in enumerate(model.parameters()):
                    if name == "part":
                        dist.broadcast(p.detach(), i % dist.get_world_size())
        # Asked about once, when the first state has been made.
        assert words == ([1, 2, 1, 1, 1, 1] if name == "part" else [1] * 6), (name, words)


@ranks(2)
def check_state_that_torchs_optimizers_make_is_the_same_on_healthy_ranks(out: Path) -> None:
    makers = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
        "amsgrad": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True, capturable=False),
        "fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
        "foreach": lambda p: torch.optim.NAdam(p, lr=0.1, foreach=True),
        "rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
        "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
    }
    for name, make in makers.items():
        model = make_run("ddp", out, How()).model
        optimizer = make(list(model.parameters()))
        guard = fs.Guard(replica_interval=1)
        with fs.Monitor(model, optimizer, out / name, guard, spectral_enabled=False) as monitor:
            for x, y in Batches(dist.get_rank(), 4):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(x), y)
                loss.backward()
                with counted() as calls:
                    assert monitor.step(loss).action is fs.Action.CONTINUE
                assert len(calls) == 1
                optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict())
            kept = optimizer.state[next(model.parameters())]
            looked_at = monitor._watch._copies._tensors(0)
            assert len(looked_at) == 1 + len(kept) > 1
            assert all(looked_at[key][0] is tensor for key, tensor in kept.items())


@ranks(2)
def check_a_snapshot_that_a_rank_has_lost_is_dropped_by_all(out: Path) -> None:
    for kind in KINDS:
        found: dict[str, Any] = {}

        def lose(run: Run, step: int, kept: dict[str, Any] = found) -> None:
            """One rank's copy of step 12 is lost; of step 8's, what is in it has changed."""
            ring = run.model.watched.history.ring
            if step == 12 and dist.get_rank() == 1:
                ring.keep_only([e.step for e in ring.entries if e.step != 12], "lost on purpose")
            if step == 15:
                kept["steps"] = [e.step for e in ring.entries]
            if step == 15 and dist.get_rank() == 0:
                changed = next(e for e in ring.entries if e.step == 8)
                next(iter(changed.saved["parameters"].values())).view(-1)[:1] += 1

        run = train_watched(kind, out / kind, lose, Strike(15, 1, nan_in_weight))
        assert_same_on_all_ranks([(v.step, v.action) for v in run.verdicts])
        assert found["steps"] == [4, 8]
        assert [e["to_step"] for e in rolled_back(out / kind)] == [4]
        assert run.bits() == clean_bits(kind, out.parent / f"clean {kind} False"), kind


def train_watched(kind: str, out: Path, at_step: Any, *strikes: Strike, **guard: Any) -> Run:
    """With the watch where `at_step` finds it."""
    made = fs.Monitor._make_watch

    def make_watch(self: fs.Monitor, model: Any, *args: Any) -> Any:
        watch = made(self, model, *args)
        object.__setattr__(model, "watched", watch)
        return watch

    fs.Monitor._make_watch = make_watch  # type: ignore[method-assign]
    try:
        return train(kind, out, *strikes, at_step=at_step, **guard)
    finally:
        fs.Monitor._make_watch = made  # type: ignore[method-assign]


@ranks(2)
def check_no_way_back_on_one_rank_ends_the_run_on_all(out: Path) -> None:
    def lose_all(run: Run, step: int) -> None:
        if step == 5 and dist.get_rank() == 1:
            run.model.watched.history.ring.keep_only([], "lost on purpose")

    run = train_watched("fsdp2", out, lose_all, Strike(5, 0, nan_in_weight, "clip"))
    assert_same_on_all_ranks([(v.step, v.action) for v in run.verdicts])
    assert run.verdicts[-1].action is fs.Action.ABORT
    assert not run.verdicts[-1]
    assert fs.guard.Reason.NO_SNAPSHOT in run.verdicts[-1].reasons


@ranks(2)
def check_a_disk_that_fails_on_one_rank_leaves_the_others_parts_where_they_are(out: Path) -> None:
    """Or there would be no snapshot left of which all parts are there."""
    inner = snapshot_file.write_pages

    def write_pages(path: Path, pages: Any) -> int:
        if dist.get_rank() == 1 and path.stem > "step_000000002":
            raise OSError("no space left")
        return inner(path, pages)

    def wait(run: Run, step: int) -> None:
        assert run.saver is not None
        run.saver.wait()  # so that every snapshot is written, however slow the disk

    snapshot_file.write_pages = write_pages
    try:
        where = {"persist_dir": out / "kept", "snapshot_interval": 2, "depth": 1}
        train("fsdp2", out / "one", at_step=wait, **where)
    finally:
        snapshot_file.write_pages = inner
    steps = gathered(SnapshotFolder(folder_of(out / "kept", dist.get_rank())).steps())
    assert steps[1][-1] == 2, steps
    assert {2, 12} <= set(steps[0]), steps
    again = make_run("fsdp2", out, How())
    with fs.Monitor(again.model, again.optimizer, out / "again", fs.Guard()) as monitor:
        assert monitor.resume(out / "kept") == 2


@ranks(2)
def check_parts_that_do_not_say_of_how_many_they_are_are_for_as_many_ranks_only(out: Path) -> None:
    """As those that were written before parts did."""
    train("ddp", out / "one", persist_dir=out / "kept", snapshot_interval=2)
    own = SnapshotFolder(out / "kept", dist.get_rank(), 2)
    for step in own.steps():
        content = snapshot_file.read(own.file(step))
        snapshot_file.write(own.file(step), content._replace(ranks=None))
    gathered(None)

    def resume() -> int | None:
        run = make_run("ddp", out, How())
        with fs.Monitor(run.model, run.optimizer, out / "again", fs.Guard()) as monitor:
            return monitor.resume(out / "kept")

    assert resume() == own.steps()[-1]
    if dist.get_rank() == 0:
        shutil.copytree(own.path, folder_of(out / "kept", 2))
    gathered(None)
    with pytest.raises(ValueError, match=r"none of the 3 snapshots.*accepted"):
        resume()
    told = fs.records.read_telemetry(out / "again" / "telemetry.jsonl").records
    assert "does not say of how many" in str(told[-2:])


@ranks(2)
def check_the_autopsy_is_that_of_the_rank_where_the_step_went_bad(out: Path) -> None:
    now = {"step": -1}

    def spoil(run: Run, step: int) -> None:
        """One rank's module puts out NaN whenever step 6 is run."""
        now["step"] = step
        norm = run.model.module.norm
        if dist.get_rank() == 1 and "forward" not in vars(norm):
            inner = norm.forward
            norm.forward = lambda x: inner(x) * (math.nan if now["step"] == 6 else 1.0)

    train("ddp", out, at_step=spoil, max_consecutive_skips=1, max_rollbacks=1)
    gathered(None)
    shared = fs.records.read_autopsy(out, 6)
    assert shared["cause"] == "deterministic"
    assert shared["place"]["kind"] == "not_located"
    assert shared["place"]["why"] == "rank 1 has it"
    own = fs.records.read_autopsy(out / "rank_00001", 6)
    assert (own["place"]["kind"], own["place"]["name"]) == ("module", "module.norm")
    assert sorted(p.name for p in out.iterdir() if p.is_dir()) == ["autopsy", "rank_00001"]
