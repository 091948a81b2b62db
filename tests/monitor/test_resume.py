"""A process dies, another takes the run up from disk, and nobody can tell from the bits."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    MultiStepLR,
    OneCycleLR,
    SequentialLR,
)
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

import foreshock as fs
from foreshock import monitor as monitor_module
from foreshock.guard import LaggingWatch, snapshot_file
from foreshock.guard.parts import SnapshotFolder
from foreshock.guard.persistence import Saver
from foreshock.guard.snapshots import Snapshot
from foreshock.records import read_summary, verify
from tests.monitor import training as t

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")

STEPS = 24
DIES_AT = [1, 5, 6, 11, 12, 13, 16, 23]


@pytest.fixture(autouse=True)
def the_disk_is_fast_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a snapshot may be passed over for the next one, which is no fault."""
    save = Saver.save

    def save_and_wait(self: Saver, snapshot: Snapshot) -> None:
        save(self, snapshot)
        self.wait()

    monkeypatch.setattr(Saver, "save", save_and_wait)


def make(**how: Any) -> t.Run:
    return t.make_run(**{"epochs": 4, "has_average": True, **how})


def guarded(run: t.Run, out_dir: Path, **guard: Any) -> fs.Monitor:
    given = {"snapshot_interval": 3, "persist_dir": out_dir / "snapshots", **guard}
    return t.make_monitor(run, out_dir / "run", **given)


def train_and_die(run: t.Run, out_dir: Path, at: int, **guard: Any) -> None:
    """As if killed in this step: nothing is finalized; but the disk was fast enough."""
    monitor = guarded(run, out_dir, **guard)
    for step, batch in monitor.loop(run.loader, epochs=run.epochs):
        if step == at:
            break
        t.train_step(run, step, batch, monitor)
    die(monitor)


def die(monitor: fs.Monitor) -> None:
    monitor._watch.history._saver.wait()
    monitor._gate.remove()
    monitor._journal.close()


def resume_and_end(run: t.Run, out_dir: Path, **guard: Any) -> tuple[int | None, dict[str, Any]]:
    if (out_dir / "snapshots").exists():
        torch.rand(3), np.random.rand(3)  # another process is elsewhere with its random numbers
    with guarded(run, out_dir, **guard) as monitor:
        step = monitor.resume()
        t.train(run, monitor)
    return step, monitor.finalize()


# ---- the bits


def own_generator() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(5)
    return DataLoader(t.make_dataset(), batch_size=t.BATCH, shuffle=True, generator=generator)


def torchdata(num_workers: int = 0) -> StatefulDataLoader[Any]:
    return StatefulDataLoader(
        t.make_dataset(), batch_size=t.BATCH, shuffle=True, num_workers=num_workers
    )


LOADERS: dict[str, Callable[[], Any]] = {
    "plain": t.make_loader,
    "own-generator": own_generator,
    "stateful": t.ResumableLoader,
    "next-epoch": lambda: t.ResumableLoader(resumes_with_next_epoch=True),
    "drawing": t.DrawingLoader,
    "torchdata": torchdata,
}


@pytest.mark.parametrize("at", DIES_AT)
@pytest.mark.parametrize("loader", LOADERS)
def test_a_resumed_run_ends_with_the_bits_of_one_that_was_not_interrupted(
    tmp_path: Path, loader: str, at: int
) -> None:
    clean = t.train(make(loader=LOADERS[loader]))
    train_and_die(make(loader=LOADERS[loader]), tmp_path, at)
    run = make(loader=LOADERS[loader])
    step, summary = resume_and_end(run, tmp_path)
    expected = {1: None, 5: 3, 6: 3, 11: 9, 12: 9, 13: 9, 16: 12, 23: 21}[at]
    assert step == expected
    assert run.steps == list(range(step or 0, STEPS))
    t.assert_same_bits(run, clean)
    assert summary["guard"]["resumed_from_step"] == step
    assert summary["total_steps"] == STEPS


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_loader_with_workers_is_resumed(tmp_path: Path) -> None:
    clean = t.train(make(loader=lambda: torchdata(2)))
    train_and_die(make(loader=lambda: torchdata(2)), tmp_path, 11)
    run = make(loader=lambda: torchdata(2))
    assert resume_and_end(run, tmp_path)[0] == 9
    t.assert_same_bits(run, clean)


def test_a_run_that_dies_again_and_again_still_has_the_bits(tmp_path: Path) -> None:
    clean = t.train(make())
    for at in (7, 11, 17, 21):
        run = make()
        monitor = guarded(run, tmp_path)
        monitor.resume()
        for step, batch in monitor.loop(run.loader, epochs=run.epochs):
            if step == at:
                break
            t.train_step(run, step, batch, monitor)
        die(monitor)
    run = make()
    resume_and_end(run, tmp_path)
    t.assert_same_bits(run, clean)


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "lambda": lambda o: LambdaLR(o, lambda step: 0.9**step),
    "cosine": lambda o: CosineAnnealingLR(o, T_max=STEPS),
    "one-cycle": lambda o: OneCycleLR(o, max_lr=0.1, total_steps=STEPS + 1),
    "multi-step": lambda o: MultiStepLR(o, [5, 9, 9, 16]),
    "sequential": lambda o: SequentialLR(
        o, [LinearLR(o, 0.1, total_iters=6), ExponentialLR(o, 0.9)], milestones=[6]
    ),
    "chained": lambda o: ChainedScheduler([LinearLR(o, 0.5, total_iters=9), ExponentialLR(o, 0.9)]),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_go_on_where_they_were(tmp_path: Path, name: str) -> None:
    clean = t.train(make(scheduler=SCHEDULERS[name]))
    train_and_die(make(scheduler=SCHEDULERS[name]), tmp_path, 14)
    run = make(scheduler=SCHEDULERS[name])
    assert resume_and_end(run, tmp_path)[0] == 12
    t.assert_same_bits(run, clean)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=1e-2),
    "fused": lambda ps: torch.optim.AdamW(ps, lr=1e-2, fused=True),
    "amsgrad-tensor-lr": lambda ps: torch.optim.Adam(ps, lr=torch.tensor(1e-2), amsgrad=True),
    "sgd": lambda ps: torch.optim.SGD(ps, lr=1e-2, momentum=0.9),
    "adagrad": lambda ps: torch.optim.Adagrad(ps, lr=1e-2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_that_a_fresh_optimizer_does_not_have_yet_is_made(tmp_path: Path, name: str) -> None:
    clean = t.train(make(optimizer=OPTIMIZERS[name]))
    train_and_die(make(optimizer=OPTIMIZERS[name]), tmp_path, 11)
    run = make(optimizer=OPTIMIZERS[name])
    assert resume_and_end(run, tmp_path)[0] == 9
    t.assert_same_bits(run, clean)


def test_moments_made_anew_lie_in_memory_as_the_optimizer_would_have_made_them(
    tmp_path: Path,
) -> None:
    """Fused kernels walk through parameter and moments at once."""

    def conv() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)

    guard = fs.Guard(mode="recover", snapshot_interval=1, clean_steps=1, persist_dir=tmp_path / "s")
    x = torch.rand(2, 3, 5, 5)
    ends = []
    for steps in (3, 2):
        model, optimizer = conv()
        with fs.Monitor(model, optimizer, tmp_path / "run", guard) as monitor:
            begun = monitor.resume() or 0
            assert begun == (0 if steps == 3 else 2)
            if begun:
                moment = optimizer.state[model.weight]["exp_avg"]
                assert moment.stride() == model.weight.stride()
            for _ in range(steps):
                optimizer.zero_grad()
                loss = model(x).square().mean()
                loss.backward()
                monitor.step(loss)
                optimizer.step()
        ends.append(model.weight.detach().clone())
    assert monitor.finalize()["total_steps"] == 4
    assert not t.same(*ends)


def test_a_grad_scaler_goes_on_with_its_scale(tmp_path: Path) -> None:
    def run_of() -> tuple[Any, Any, Any]:
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return model, optimizer, torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)

    def go(monitor: Any, model: Any, optimizer: Any, scaler: Any, until: int) -> None:
        for step, x in monitor.loop([torch.full((2, 3), 0.1 * i) for i in range(12)]):
            if step == until:
                break
            optimizer.zero_grad()
            loss = model(x).square().mean()
            scaler.scale(loss).backward()
            monitor.step(loss)
            scaler.step(optimizer)
            scaler.update()

    guard: dict[str, Any] = {"mode": "recover", "snapshot_interval": 2}
    ends = []
    for name, until in (("whole", 12), ("part", 9), ("part", 12)):
        model, optimizer, scaler = run_of()
        given = fs.Guard(**guard, persist_dir=tmp_path / name / "s")
        where = tmp_path / name / "run"
        with fs.Monitor(model, optimizer, where, given, state={"scaler": scaler}) as monitor:
            monitor.resume()
            go(monitor, model, optimizer, scaler, until)
        ends.append((model.weight.detach().clone(), scaler.state_dict()))
    assert ends[0][1] == ends[2][1]
    assert ends[2][1]["scale"] == 1024.0 * 2**4
    assert t.same(ends[0][0], ends[2][0])


def test_gradients_that_are_being_accumulated_are_resumed(tmp_path: Path) -> None:
    how: dict[str, Any] = {"accumulation": 4, "zeroes_first": False}
    clean = t.train(make(**how))
    train_and_die(make(**how), tmp_path, 14, snapshot_interval=2, clean_steps=1)
    run = make(**how)
    step, _ = resume_and_end(run, tmp_path, snapshot_interval=2, clean_steps=1)
    assert step is not None
    t.assert_same_bits(run, clean)


def test_a_lower_learning_rate_recovers_on_in_the_next_process(tmp_path: Path) -> None:
    """The factor is no state that a rollback restores, and yet one that the run is in."""
    guard: dict[str, Any] = {"lr_backoff": 0.5, "lr_recovery_steps": 12}
    strikes = [t.Strike(7, t.nan_in_weight)]
    whole = make(strikes=strikes)
    with guarded(whole, tmp_path / "whole", **guard) as monitor:
        t.train(whole, monitor)
    train_and_die(make(strikes=[t.Strike(7, t.nan_in_weight)]), tmp_path, 14, **guard)
    run = make()
    assert resume_and_end(run, tmp_path, **guard)[0] == 12
    t.assert_same_bits(run, whole)


def test_a_batch_left_out_stays_left_out(tmp_path: Path) -> None:
    guard: dict[str, Any] = {"skip_batches": 1}
    whole = make(strikes=[t.Strike(7, t.nan_in_weight)])
    with guarded(whole, tmp_path / "whole", **guard) as monitor:
        t.train(whole, monitor)
    train_and_die(make(strikes=[t.Strike(7, t.nan_in_weight)]), tmp_path, 14, **guard)
    run = make()
    assert resume_and_end(run, tmp_path, **guard)[0] == 12
    assert run.steps[-1] == whole.steps[-1] == STEPS - 2
    t.assert_same_bits(run, whole)


# ---- scripts of other shapes


def test_a_loop_per_epoch_passes_by_the_epochs_that_are_over(tmp_path: Path) -> None:
    """With an evaluation after each, which draws random numbers."""

    def go(run: t.Run, monitor: fs.Monitor, dies_at: int = -1) -> None:
        for _ in range(4):
            for step, batch in monitor.loop(run.loader):
                if step == dies_at:
                    return
                run.steps.append(step)
                t.train_step(run, step, batch, monitor)
            torch.rand(5)

    whole = make()
    with guarded(whole, tmp_path / "whole") as monitor:
        go(whole, monitor)
    dying = make()
    monitor = guarded(dying, tmp_path)
    go(dying, monitor, 16)
    die(monitor)
    run = make()
    with guarded(run, tmp_path) as monitor:
        assert monitor.resume() == 12
        go(run, monitor)
    assert run.steps == list(range(12, STEPS))
    t.assert_same_bits(run, whole)


def test_without_a_loop_the_caller_is_told_the_step_to_go_on_from(tmp_path: Path) -> None:
    """What the caller does after the update, an average for one, is too late for its snapshot."""
    batches = [batch for _, batch in make(has_average=False).batches(None)]

    def go(run: t.Run, monitor: fs.Monitor | None, begin: int, end: int) -> None:
        for step in range(begin, end):
            t.train_step(run, step, batches[step], monitor)

    whole = make(has_average=False)
    with guarded(whole, tmp_path / "whole") as monitor:
        go(whole, monitor, 0, STEPS)
    dying = make(has_average=False)
    monitor = guarded(dying, tmp_path)
    go(dying, monitor, 0, 14)
    die(monitor)
    run = make(has_average=False)
    with guarded(run, tmp_path) as monitor:
        begun = monitor.resume()
        assert begun == 12
        go(run, monitor, begun, STEPS)
    t.assert_same_bits(run, whole)
    assert monitor.finalize()["total_steps"] == STEPS


def test_a_fault_right_after_resuming_is_rolled_back_from(tmp_path: Path) -> None:
    clean = t.train(make())
    train_and_die(make(), tmp_path, 11)
    run = make(strikes=[t.Strike(9, t.nan_in_weight), t.Strike(10, t.nan_in_weight)])
    step, summary = resume_and_end(run, tmp_path)
    assert step == 9
    assert summary["guard"]["total_rollbacks"] == 2
    t.assert_same_bits(run, clean)


def test_the_records_of_both_processes_are_one_story(tmp_path: Path) -> None:
    train_and_die(make(), tmp_path, 11)
    resume_and_end(make(), tmp_path)
    told = t.events(tmp_path / "run")
    assert [e["step"] for e in told if e["event"] == "snapshot_saved"] == [
        0, 3, 6, 12, 15, 18, 21,  # of 9 the first process did not live to tell
    ]  # fmt: skip
    (resumed,) = t.events(tmp_path / "run", "resumed")
    assert resumed["step"] == 9
    assert resumed["path"].endswith("step_000000009.safetensors")
    assert verify(tmp_path / "run" / "ledger.jsonl").is_intact
    guard = read_summary(tmp_path / "run" / "summary.json")["guard"]
    assert (guard["resumed_from_step"], guard["saved_snapshots"]) == (9, 4)
    assert guard["unsaved_snapshots"] == 0


# ---- what is refused


def damage(path: Path) -> None:
    contents = bytearray(path.read_bytes())
    contents[-9] ^= 1
    path.write_bytes(contents)


def test_a_damaged_snapshot_is_refused_and_the_older_one_leads_to_the_same_bits(
    tmp_path: Path,
) -> None:
    clean = t.train(make())
    train_and_die(make(), tmp_path, 14)
    folder = SnapshotFolder(tmp_path / "snapshots")
    assert folder.steps() == [6, 9, 12]
    damage(folder.file(12))
    folder.file(9).write_bytes(folder.file(9).read_bytes()[:1000])
    run = make()
    step, summary = resume_and_end(run, tmp_path)
    assert step == 6
    t.assert_same_bits(run, clean)
    dropped = t.events(tmp_path / "run", "snapshot_dropped")
    assert [e["step"] for e in dropped] == [12, 9]
    assert "its checksum does not fit" in dropped[0]["why"]
    assert summary["guard"]["dropped_snapshots"] == 2
    assert folder.steps() == [15, 18, 21]
    assert sorted(p.name for p in folder.path.glob("*.damaged")) == [
        "step_000000009.damaged", "step_000000012.damaged",
    ]  # fmt: skip


def test_when_none_can_be_used_that_is_an_error_and_not_a_new_beginning(tmp_path: Path) -> None:
    train_and_die(make(), tmp_path, 8)
    for path in (tmp_path / "snapshots").iterdir():
        damage(path)
    run = make()
    with guarded(run, tmp_path) as monitor, pytest.raises(ValueError, match="none of the 3 snap"):
        monitor.resume()


def test_an_earlier_run_is_not_overwritten_unawares(tmp_path: Path) -> None:
    train_and_die(make(), tmp_path, 8)
    run = make()
    monitor = guarded(run, tmp_path)
    with pytest.raises(FileExistsError, match=r"earlier run's snapshots, up to step 6.*resume"):
        t.train(run, monitor)
    monitor._gate.remove()
    monitor._journal.close()


class Bigger(t.Model):
    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(t.WIDTH, t.CLASSES + 1)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"model": Bigger}, r"'head.weight' has shape \(4, 8\) here and has shape \(3, 8\) there"),
        ({"has_average": False}, r"missing here \['average'\]"),
        ({"scheduler": SCHEDULERS["cosine"]}, r"missing there \['scheduler'\]"),
        (
            {"optimizer": lambda ps: torch.optim.SGD([{"params": [p]} for p in ps], lr=0.1)},
            "6 groups of 6 parameters, the snapshot's 1 of 6",
        ),
    ],
)
def test_the_snapshot_of_another_run_is_refused_before_anything_is_touched(
    tmp_path: Path, how: dict[str, Any], said: str
) -> None:
    train_and_die(make(), tmp_path, 8)
    if "model" in how:
        how = {"model": how["model"](), "has_average": True}
    run = make(**how)
    before = t.state_of(run)
    with guarded(run, tmp_path / "other", persist_dir=tmp_path / "snapshots") as monitor:
        with pytest.raises(ValueError, match=said):
            monitor.resume()
        assert t.differing(t.state_of(run), before) == []


def test_one_part_of_a_snapshot_of_many_ranks_is_not_taken_for_all_of_it(tmp_path: Path) -> None:
    train_and_die(make(), tmp_path, 8)
    own = SnapshotFolder(tmp_path / "snapshots").file(6)
    folder = SnapshotFolder(tmp_path / "other", 1, 2)
    folder.write(6, folder.pages_of(snapshot_file.read(own)))
    with guarded(make(), tmp_path, persist_dir=None) as monitor:
        with pytest.raises(ValueError, match=r"one part of 2, for 1 ranks; accepted"):
            monitor.resume(folder.file(6))
        with pytest.raises(ValueError, match=r"none of the 1 snapshots"):
            monitor.resume(folder.root)
    run = make()
    monitor = guarded(run, tmp_path, persist_dir=folder.root)
    with pytest.raises(FileExistsError, match=r"earlier run's snapshots, up to step 6"):
        t.train(run, monitor)
    die(monitor)


def test_resume_says_what_it_does_not_accept(tmp_path: Path) -> None:
    run = make()
    with t.make_monitor(run, tmp_path / "a") as monitor, pytest.raises(ValueError, match="path is"):
        monitor.resume()
    with guarded(make(), tmp_path) as monitor:
        assert monitor.resume() is None
        monitor.step(1.0)
        with pytest.raises(RuntimeError, match="before it"):
            monitor.resume()


def test_one_snapshot_can_be_named_and_is_loaded_by_any_mode(tmp_path: Path) -> None:
    train_and_die(make(), tmp_path, 14)
    path = tmp_path / "snapshots" / "step_000000006.safetensors"
    run = make()
    with t.make_monitor(run, tmp_path / "b", mode="observe") as monitor:
        assert monitor.resume(path) == 6
        t.train(run, monitor)
    t.assert_same_bits(run, t.train(make()))
    assert len(list(path.parent.iterdir())) == 3


# ---- a disk that does not do


def test_a_full_disk_never_stops_training_and_is_told_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("foreshock.guard.incoming_file.os.write", full)
    run = make()
    with caplog.at_level(logging.WARNING, "foreshock"), guarded(run, tmp_path) as monitor:
        t.train(run, monitor)
    summary = monitor.finalize()
    t.assert_same_bits(run, t.train(make()))
    assert summary["guard"]["saved_snapshots"] == 0
    assert summary["guard"]["unsaved_snapshots"] >= 5
    warned = [r.message for r in caplog.records if "not saved" in r.message]
    assert len(warned) == 1
    assert "No space left on device" in warned[0]
    assert list((tmp_path / "snapshots").iterdir()) == []


def test_state_that_no_file_can_hold_is_told_of_by_name(tmp_path: Path) -> None:
    class Odd:
        def state_dict(self) -> dict[str, Any]:
            return {"lock": {"inner": object()}}

        def load_state_dict(self, state: Any) -> None:
            pass

    run = make()
    guard = fs.Guard(mode="recover", snapshot_interval=3, persist_dir=tmp_path / "s")
    with fs.Monitor(
        run.model, run.optimizer, tmp_path / "run", guard, state={"odd": Odd()}
    ) as monitor:
        t.train(run, monitor)
    told = t.events(tmp_path / "run", "snapshot_not_saved")
    assert "saved.odd.lock.inner is a object; accepted" in told[0]["why"]


def test_after_a_rollback_what_came_later_is_gone_from_the_disk_too(tmp_path: Path) -> None:
    run = make(strikes=[t.Strike(13, t.nan_in_weight)])
    monitor = guarded(run, tmp_path, min_depth=6)
    for step, batch in monitor.loop(run.loader, epochs=4):
        t.train_step(run, step, batch, monitor)
        if run.verdicts[-1].action is fs.Action.ROLL_BACK:
            monitor._watch.history._saver.wait()
            assert SnapshotFolder(tmp_path / "snapshots").steps()[-1] == 6
            break
    monitor.finalize()


@pytest.mark.parametrize("at", [6, 11, 13])
def test_a_run_whose_host_is_ahead_of_its_device_is_resumed_with_the_same_bits(
    tmp_path: Path, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitor_module, "_LAGGING_DEVICE", "cpu")
    how: dict[str, Any] = {"optimizer": OPTIMIZERS["fused"]}
    whole = make(**how)
    with guarded(whole, tmp_path / "whole") as monitor:
        assert isinstance(monitor._watch, LaggingWatch)
        t.train(whole, monitor)
    train_and_die(make(**how), tmp_path, at)
    run = make(**how)
    assert resume_and_end(run, tmp_path)[0] == {6: 3, 11: 6, 13: 9}[at]
    t.assert_same_bits(run, whole)
