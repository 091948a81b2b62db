"""One verdict on all ranks, in as few words as promised."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial

import foreshock as fs
from foreshock.distributed_part import local_part
from foreshock.guard import Consensus, find_ranks
from foreshock.guard.consensus import RankFailed, Share
from tests.ranks.training import (
    KINDS,
    Batches,
    Collectives,
    How,
    Strike,
    assert_same_on_all_ranks,
    clip,
    counted,
    gathered,
    make_run,
    number_of_data,
    parameter,
    ranks,
    train,
    train_step,
)


def seen(verdict: fs.Verdict) -> tuple[Any, ...]:
    return verdict.step, verdict.action, verdict.reasons, str(verdict.offender)


def nan_in_gradient(model: nn.Module, optimizer: Any) -> None:
    local_part(parameter(model, "down.weight").grad).view(-1)[:1] = math.nan


def nan_in_first_gradient(model: nn.Module, optimizer: Any) -> None:
    """By whose look a rank tells new gradients from old ones."""
    local_part(next(p.grad for p in model.parameters() if p.grad is not None)).view(-1)[:1] = (
        math.nan
    )


def inf_in_weight(model: nn.Module, optimizer: Any) -> None:
    local_part(parameter(model, "up.weight")).view(-1)[1:2] = math.inf


def check_the_share_is_144_bytes(out: Path) -> None:
    ranks = Consensus(dist.group.WORLD, torch.device("cpu"))
    with counted() as calls:
        heard = ranks.share(Share(loss=float(dist.get_rank()), losses=1.0))
    assert [n for n, _ in calls] == [144]
    assert heard.losses == dist.get_world_size()
    assert heard.loss == sum(range(dist.get_world_size()))


def check_a_bad_gradient_on_one_rank_is_withheld_by_all_and_named(out: Path) -> None:
    for kind in KINDS:
        run = train(kind, out / kind, Strike(5, 1, nan_in_gradient, "backward"), mode="skip")
        assert_same_on_all_ranks([seen(v) for v in run.verdicts])
        (bad,) = run.bad
        assert (bad.step, bad.action) == (5, fs.Action.SKIP)
        assert bad.offender.name.endswith("down.weight")
        assert bad.offender.rank == 1


def check_a_bad_weight_on_one_rank_is_found_by_all_and_named(out: Path) -> None:
    for kind in KINDS:
        run = train(kind, out / kind, Strike(7, 1, inf_in_weight, "clip"))
        assert_same_on_all_ranks([seen(v) for v in run.verdicts])
        (bad,) = run.bad
        assert bad.action is fs.Action.ROLL_BACK
        assert bad.offender.name.endswith("up.weight"), bad
        assert bad.offender.rank == 1
        assert run.summary["guard"]["total_rollbacks"] == 1


def check_a_loss_that_is_nan_on_one_rank_is_the_loss_of_all(out: Path) -> None:
    run = make_run("ddp", out, How())
    with fs.Monitor(run.model, run.optimizer, out, fs.Guard(mode="skip")) as monitor:
        loss = math.nan if dist.get_rank() == 1 else 1.0
        verdict = monitor.step(loss)
        assert verdict.reasons == (fs.guard.Reason.NONFINITE_LOSS,)
        run.optimizer.step()
        monitor.step(1.0 + dist.get_rank())
        run.optimizer.step()
    size = dist.get_world_size()
    assert monitor.finalize()["final_loss"] == sum(range(1, size + 1)) / size


def check_a_loss_that_is_a_sum_over_ranks_is_added_up(out: Path) -> None:
    run = make_run("tp", out, How())
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    with fs.Monitor(run.model, run.optimizer, out) as monitor:
        part = torch.tensor(1.0 + dist.get_rank())
        monitor.step(DTensor.from_local(part, mesh, [Partial()]))
        run.optimizer.step()
    assert monitor.finalize()["final_loss"] == sum(range(1, dist.get_world_size() + 1))


@ranks(2)
def check_a_rank_with_a_bad_loss_is_named_for_gradients_that_are_bad_on_all(out: Path) -> None:
    """DistributedDataParallel averages the gradients: one rank's NaN is everybody's."""
    run = make_run("ddp", out, How())
    with fs.Monitor(run.model, run.optimizer, out, fs.Guard(mode="skip")) as monitor:
        x = torch.full((2, 6), math.nan if dist.get_rank() == 1 else 1.0)
        loss = run.model(x).square().mean()
        loss.backward()
        verdict = monitor.step(loss)
    assert verdict.offender.kind == "gradient"
    assert verdict.offender.rank == 1


@ranks(2)
def check_the_norm_is_the_mean_loss_decides_spikes_alike(out: Path) -> None:
    for kind in KINDS:
        how = How(steps=24)
        spikes = {"spike_min_count": 4, "spike_window": 8, "spike_response": "skip"}

        def burst(model: nn.Module, optimizer: Any) -> None:
            for p in model.parameters():
                local_part(p.grad).mul_(1e4)

        strikes = [Strike(20, rank, burst, "backward") for rank in range(dist.get_world_size())]
        run = train(kind, out / kind, *strikes, how=how, **spikes)
        assert_same_on_all_ranks([seen(v) for v in run.verdicts])
        assert [v.step for v in run.bad] == [20]


def steps_of(kind: str, out: Path, how: How, steps: int, guard: fs.Guard | None) -> int:
    """Collectives of so many steps, whoever starts them: with a monitor, or with torch's clip."""
    run = make_run(kind, out, how)
    batches = list(Batches(0, steps + 1))
    monitor = None
    if guard is not None:
        monitor = fs.Monitor(run.model, run.optimizer, out, guard, spectral_enabled=False)
    counting = Collectives()
    for step, (x, y) in enumerate(batches):
        if step == 1:  # the first one may set things up
            counting.__enter__()
        run.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(run.model(x), y)
        loss.backward()
        if monitor is None:
            if how.clips == "torch":
                torch.nn.utils.clip_grad_norm_(run.model.parameters(), how.max_norm)
        else:
            clip(run, monitor, loss, how)
            assert monitor.step(loss)
        run.optimizer.step()
    counting.__exit__(None, None, None)
    if monitor is not None:
        monitor.finalize()
    return counting.number


def check_a_clean_step_takes_one_collective_and_none_beyond_that_of_the_clip(out: Path) -> None:
    steps, guard = 6, fs.Guard(mode="recover", snapshot_interval=100)
    for kind in KINDS:
        bare = steps_of(kind, out, How(clips="none"), steps, None)

        def more(clips: str, has_monitor: bool, kind: str = kind, bare: int = bare) -> float:
            where, how = out / kind / clips, How(clips=clips)
            found = steps_of(kind, where, how, steps, guard if has_monitor else None)
            return (found - bare) / steps

        assert more("with loss", True) == 1
        assert more("without loss", True) == (1 if kind == "ddp" else 2)
        assert more("none", True) == 1
        if kind != "tp":  # torch's clip refuses to mix tensors
            torchs = more("torch", False)
            assert more("torch", True) == torchs + 1
            assert torchs == (0 if kind == "ddp" else 2)


@ranks(2)
def check_gradient_accumulation_and_late_verdicts_agree(out: Path) -> None:
    for how in (How(accumulation=2), How(judges="last"), How(judges="never"), How(clips="none")):
        for kind in KINDS:
            name = f"{kind} {how.accumulation} {how.judges} {how.clips}"
            strike = Strike(5, 1, nan_in_gradient, "backward")
            run = train(kind, out / name, strike, how=how, mode="skip")
            assert_same_on_all_ranks([seen(v) for v in run.verdicts])
            assert run.summary["guard"]["skipped_steps"] == 1, (name, run.summary)
            assert all(
                math.isfinite(float(local_part(p).detach().sum())) for p in run.model.parameters()
            )


@ranks(2)
def check_an_accumulation_outside_of_a_loop_is_judged_by_what_came_last(out: Path) -> None:
    for kind, parts, judges in itertools.product(("ddp", "fsdp2"), (1, 2, 3), ("first", "last")):
        how = How(accumulation=parts, judges=judges, clips="none")
        last_of = {update: parts * (update + 1) - 1 for update in (0, 2)}  # the first, a later one
        for update, step in last_of.items():
            folder = out / f"{kind} {parts} {judges} {update}"
            run = make_run(kind, folder, how)
            strike = Strike(step, 1, nan_in_gradient, "backward")
            guard = fs.Guard(mode="skip")
            batches = list(Batches(number_of_data(kind), 4 * parts))
            with fs.Monitor(run.model, run.optimizer, folder, guard) as monitor:
                for i, (x, y) in enumerate(batches):
                    train_step(run, monitor, i, x, y, (strike,), how)
            assert monitor.finalize()["guard"]["skipped_steps"] == 1, folder
            assert_same_on_all_ranks([seen(v) for v in run.verdicts])
            assert all(
                bool(local_part(p).detach().isfinite().all()) for p in run.model.parameters()
            ), folder


def check_no_schedule_hangs(out: Path) -> None:
    """200 of random kinds, modes, places of the calls, faults and ranks that are hit."""
    seed = 20 + dist.get_world_size()
    shared = random.Random(seed)  # the same on all ranks
    faults = [nan_in_gradient, nan_in_first_gradient, inf_in_weight]
    for number in range(200 if dist.get_world_size() == 2 else 10):
        how = How(
            clips=shared.choice(["with loss", "without loss", "torch", "none"]),
            judges=shared.choice(["first", "first", "last", "never"]),
            accumulation=shared.choice([1, 1, 1, 2]),
            is_fused=shared.random() < 0.5,
            steps=shared.randint(3, 5),
        )
        kind = shared.choice(KINDS)
        if kind == "tp" and how.clips == "torch":
            how.clips = "none"
        if kind != "tp":
            how.scale = shared.choice([None, None, 1.0, 2.0**10, 2.0**22])
        strikes = [
            Strike(
                shared.randrange(how.steps),
                shared.randrange(dist.get_world_size()),
                *shared.choice([(f, w) for f in faults for w in ("backward", "clip")]),
                lives=shared.choice([1, 1, 2]),
            )
            for _ in range(shared.choice([0, 1, 1, 2]))
        ]
        guard = {
            "mode": shared.choice(["observe", "skip", "recover", "recover"]),
            "snapshot_interval": shared.randint(1, 3),
            "depth": shared.randint(1, 2),
            "clean_steps": shared.randint(1, 2),
            "check_interval": shared.randint(1, 3),
            "verify_state": shared.random() < 0.3,
            "replica_interval": shared.randint(0, 2),
        }
        quiet = {"spectral_enabled": False, "fingerprint_enabled": False}
        run = train(kind, out / str(number), *strikes, how=how, monitor=quiet, **guard)
        told = [seen(v) for v in run.verdicts]
        assert_same_on_all_ranks((number, told, run.summary["total_steps"]))


@ranks(2)
def check_a_monitor_that_fails_on_one_rank_ends_all_and_observing_goes_on(out: Path) -> None:
    for mode in ("observe", "recover"):
        run = make_run("ddp", out / mode, How())
        monitor = fs.Monitor(run.model, run.optimizer, out / mode, fs.Guard(mode=mode))
        if dist.get_rank() == 1:
            monitor._watch._gradients = None  # type: ignore[assignment]
        for _ in range(2):
            try:
                assert monitor.step(1.0)
                said = "nothing"
            except RankFailed:
                said = "another rank has failed"
            except AttributeError:
                said = "failed"
            expected = "failed" if dist.get_rank() == 1 else "another rank has failed"
            assert said == ("nothing" if mode == "observe" else expected)
        monitor._watch.leave()
        monitor._gate.remove()


@ranks(2)
def check_a_model_that_shows_nothing_of_its_ranks_is_watched_by_each_alone(out: Path) -> None:
    model = nn.Linear(2, 1)
    parameters = list(model.parameters())
    assert find_ranks(model, parameters, None) is None
    together = find_ranks(model, parameters, dist.group.WORLD)
    assert together is not None
    assert (together.rank, together.size) == (dist.get_rank(), dist.get_world_size())
    for kind in KINDS:
        shown = make_run(kind, out, How()).model
        assert find_ranks(shown, list(shown.parameters()), None) is not None


@ranks(2)
def check_ranks_with_other_models_or_guards_are_told(out: Path) -> None:
    for argument, other in (("model", fs.Guard()), ("guard", fs.Guard(depth=1 + dist.get_rank()))):
        model = nn.Linear(2 + (argument == "model") * dist.get_rank(), 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with pytest.raises(ValueError, match=argument):
            fs.Monitor(model, optimizer, out, other, process_group=dist.group.WORLD)


def check_only_the_first_rank_writes_unless_all_are_to(out: Path) -> None:
    for has_all in (False, True):
        train("ddp", out / str(has_all), monitor={"rank_records": has_all})
        gathered(None)
        names = sorted(p.name for p in (out / str(has_all)).iterdir())
        own = [f"rank_{rank:05d}" for rank in range(1, dist.get_world_size())]
        assert [n for n in names if n.startswith("rank")] == (own if has_all else [])
        assert {"telemetry.jsonl", "summary.json", "ledger.jsonl", "config.json"} <= set(names)
        gathered(None)
        told = fs.records.read_rank_telemetry(out / str(has_all)).records
        found = {record["rank"] for record in told if record["event"] == "telemetry"}
        assert found == (set(range(dist.get_world_size())) if has_all else {0})
