"""The bounds of a run: epochs, breaks, errors, several loops, none at all."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import foreshock as fs
from foreshock.drill.text import TextBatches, Vocabulary
from tests.monitor import training as t


def test_steps_are_counted_over_all_epochs(tmp_path: Path) -> None:
    monitor = t.make_monitor(t.make_run(), tmp_path)
    pairs = list(monitor.loop(["a", "b", "c"], epochs=2))
    assert pairs == [(0, "a"), (1, "b"), (2, "c"), (3, "a"), (4, "b"), (5, "c")]


@pytest.mark.parametrize("judges_first", [True, False])
def test_without_a_loop_the_state_is_recovered_and_the_next_batch_comes(
    tmp_path: Path, judges_first: bool
) -> None:
    run = t.make_run(judges_first=judges_first)
    run.strikes = [t.Strike(7, t.nan_in_weight)]
    with t.make_monitor(run, tmp_path) as monitor:
        for step, batch in run.batches(None):
            run.steps.append(step)
            assert t.train_step(run, step, batch, monitor)
    assert run.steps == list(range(12))
    assert [v.step for v in run.verdicts] == list(range(12))
    (told,) = t.events(tmp_path, "rollback_success")
    assert (told["step"], told["to_step"]) == (7, 4)
    assert t.events(tmp_path, "recovered")[0]["step"] == 7
    assert all(p.isfinite().all() for p in run.model.parameters())
    assert monitor.finalize()["total_steps"] == 12


def test_without_a_loop_a_clean_run_has_the_bits_of_an_unguarded_one(tmp_path: Path) -> None:
    clean, run = t.train(t.make_run(has_average=True)), t.make_run(has_average=True)
    with t.make_monitor(run, tmp_path) as monitor:
        for step, batch in run.batches(None):
            t.train_step(run, step, batch, monitor)
    t.assert_same_bits(run, clean)


def test_without_a_loop_the_last_update_is_still_looked_at(tmp_path: Path) -> None:
    run = t.make_run(strikes=[t.Strike(11, t.nan_in_weight, "update")])
    with t.make_monitor(run, tmp_path) as monitor:
        for step, batch in run.batches(None):
            t.train_step(run, step, batch, monitor)
    assert monitor.finalize()["guard"]["total_rollbacks"] == 1
    assert all(p.isfinite().all() for p in run.model.parameters())


def test_without_a_loop_micro_steps_without_an_update_are_steps_too(tmp_path: Path) -> None:
    run = t.make_run(accumulation=3, zeroes_first=False)
    run.strikes = [t.Strike(7, t.nan_in_gradient, "backward")]
    with t.make_monitor(run, tmp_path) as monitor:
        for step, batch in run.batches(None):
            t.train_step(run, step, batch, monitor)
    assert [v.step for v in run.verdicts] == list(range(12))
    assert [e["step"] for e in t.events(tmp_path, "update_skipped")] == [8]


def test_a_loop_per_epoch_counts_on_and_recovers_within_its_epoch(tmp_path: Path) -> None:
    clean, run = t.train(t.make_run()), t.make_run(strikes=[t.Strike(10, t.nan_in_weight)])
    with t.make_monitor(run, tmp_path, snapshot_interval=2) as monitor:
        for _ in range(2):
            for step, batch in monitor.loop(run.loader):
                run.steps.append(step)
                t.train_step(run, step, batch, monitor)
    assert run.steps == [*range(11), 8, 9, 10, 11]
    t.assert_same_bits(run, clean)


def test_early_in_the_next_loop_the_state_of_the_last_one_is_returned_to(tmp_path: Path) -> None:
    """Its batches are out of reach, so training goes on with the next one."""
    run = t.make_run(strikes=[t.Strike(7, t.nan_in_weight)])
    with t.make_monitor(run, tmp_path, snapshot_interval=2) as monitor:
        for _ in range(2):
            for step, batch in monitor.loop(run.loader):
                run.steps.append(step)
                t.train_step(run, step, batch, monitor)
    assert run.steps == list(range(12))
    assert t.events(tmp_path, "rollback_success")[0]["to_step"] == 4
    assert all(p.isfinite().all() for p in run.model.parameters())
    assert monitor.finalize()["guard"]["integrity_status"] == "RECOVERED"


@pytest.mark.parametrize("strike", range(6, 12))
@pytest.mark.parametrize("loader", [t.make_loader, t.ResumableLoader, t.DrawingLoader])
def test_a_snapshot_of_an_earlier_epoch_is_returned_to(
    tmp_path: Path, strike: int, loader: Callable[[], Any]
) -> None:
    clean = t.train(t.make_run(loader=loader))
    run = t.make_run(loader=loader, strikes=[t.Strike(strike, t.nan_in_weight)])
    t.train_guarded(run, tmp_path, snapshot_interval=100)
    assert run.steps == [*range(strike + 1), *range(12)]
    t.assert_same_bits(run, clean)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_shuffling_loaders_with_and_without_workers_are_replayed(
    tmp_path: Path, num_workers: int
) -> None:
    how: dict[str, Any] = {"loader": lambda: t.make_loader(num_workers)}
    clean, run = t.train(t.make_run(**how)), t.make_run(**how)
    run.strikes = [t.Strike(7, t.nan_in_weight), t.Strike(9, t.nan_in_gradient, "backward")]
    t.train_guarded(run, tmp_path, max_consecutive_skips=1)
    t.assert_same_bits(run, clean)


@pytest.mark.parametrize("strike", [3, 4, 5, 6, 8, 9, 11])
def test_text_batches_are_sent_back_themselves(tmp_path: Path, strike: int) -> None:
    """Epochs of four batches: also on the first and the last of one."""
    tokens = Vocabulary().encode("the quick brown fox jumps over the lazy dog " * 4)

    def go(monitor: fs.Monitor | None, model: nn.Module, optimizer: Any) -> list[int]:
        loader = TextBatches(tokens, batch_size=2, context=8, seed=3, length=4)
        steps = []
        struck = False
        run = t.Run(model, optimizer, loader, epochs=3)
        for step, (x, y) in run.batches(monitor):
            steps.append(step)
            if monitor is not None and step == strike and not struck:
                struck = True
                model[0].weight.data[0, 0] = float("nan")
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
            loss.backward()
            if monitor is not None:
                monitor.step(loss)
            optimizer.step()
        assert loader.position == 12
        return steps

    def make() -> tuple[nn.Sequential, Any]:
        torch.manual_seed(0)
        size = len(Vocabulary())
        model = nn.Sequential(nn.Embedding(size, 4), nn.Dropout(0.1), nn.Linear(4, size))
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    clean, clean_optimizer = make()
    assert go(None, clean, clean_optimizer) == list(range(12))
    model, optimizer = make()
    guard = fs.Guard(mode="recover", snapshot_interval=4, lr_backoff=1.0, clean_steps=1)
    monitor = fs.Monitor(model, optimizer, tmp_path, guard)
    steps = go(monitor, model, optimizer)
    assert steps[strike + 1] == (strike - 1) // 4 * 4
    assert all(t.same(a, b) for a, b in zip(model.parameters(), clean.parameters(), strict=True))


@pytest.mark.parametrize("interval", [1, 2, 3, 5])
@pytest.mark.parametrize("zeroes_first", [True, False])
@pytest.mark.parametrize("sets_to_none", [True, False])
def test_a_rollback_within_a_gradient_accumulation_loses_no_micro_batch(
    tmp_path: Path, interval: int, zeroes_first: bool, sets_to_none: bool
) -> None:
    how: dict[str, Any] = {
        "accumulation": 4,
        "epochs": 4,
        "zeroes_first": zeroes_first,
        "sets_to_none": sets_to_none,
    }
    clean, run = t.train(t.make_run(**how)), t.make_run(**how)
    run.strikes = [t.Strike(step, t.nan_in_weight) for step in (9, 14, 19)]
    t.train_guarded(run, tmp_path, snapshot_interval=interval)
    t.assert_same_bits(run, clean)


# ---- leaving early


def test_steps_are_counted_right_after_a_break(tmp_path: Path) -> None:
    run = t.make_run()
    with t.make_monitor(run, tmp_path) as monitor:
        for step, batch in monitor.loop(run.loader):
            t.train_step(run, step, batch, monitor)
            if step == 3:
                break
        assert [step for step, _ in monitor.loop(run.loader)] == [4, 5, 6, 7, 8, 9]
    assert monitor.finalize()["total_steps"] == 10


def test_a_break_before_the_step_was_run_does_not_count_it(tmp_path: Path) -> None:
    run = t.make_run()
    with t.make_monitor(run, tmp_path) as monitor:
        for step, batch in monitor.loop(run.loader):
            if step == 3:
                break
            t.train_step(run, step, batch, monitor)
    assert monitor.finalize()["total_steps"] == 3


def test_a_break_right_after_a_rollback_leaves_the_good_state(tmp_path: Path) -> None:
    run = t.make_run(strikes=[t.Strike(6, t.nan_in_weight)])
    with t.make_monitor(run, tmp_path) as monitor:
        for step, batch in monitor.loop(run.loader, epochs=2):
            t.train_step(run, step, batch, monitor)
            if step == 6:
                break
        assert all(p.isfinite().all() for p in run.model.parameters())
        # A later loop has batches of its own, and is not sent back into this one's.
        assert [step for step, _ in monitor.loop(["a", "b"])] == [4, 5]


def test_an_error_in_the_loop_reaches_the_caller_and_training_can_be_taken_up_again(
    tmp_path: Path,
) -> None:
    run = t.make_run(epochs=1, strikes=[t.Strike(3, lambda run: 1 / 0)])
    monitor = t.make_monitor(run, tmp_path)
    with pytest.raises(ZeroDivisionError) as caught:
        t.train(run, monitor)
    assert caught.traceback  # which keeps the first loop alive, as a debugger would
    run.strikes = [t.Strike(8, t.nan_in_weight)]
    t.train(run, monitor)
    assert run.steps == [*range(4), *range(3, 9), *range(4, 9)]
    assert monitor.finalize()["guard"]["total_recoveries"] == 1


def test_a_later_loop_takes_over_from_one_that_is_still_open(tmp_path: Path) -> None:
    monitor = t.make_monitor(t.make_run(), tmp_path)
    first = monitor.loop(range(10))
    assert next(first) == (0, 0)
    second = monitor.loop(["a", "b", "c"])
    assert next(second) == (0, "a")
    assert list(first) == []
    first.close()
    assert list(second) == [(1, "b"), (2, "c")]


def test_a_loop_ends_when_the_run_is_finalized_within_it(tmp_path: Path) -> None:
    run = t.make_run()
    monitor = t.make_monitor(run, tmp_path)
    for step, batch in monitor.loop(run.loader):
        t.train_step(run, step, batch, monitor)
        if step == 2:
            summary = monitor.finalize()
    assert summary["total_steps"] == 3
    assert len(run.verdicts) == 3


def test_a_loop_that_was_made_and_not_begun_does_nothing(tmp_path: Path) -> None:
    monitor = t.make_monitor(t.make_run(), tmp_path)
    monitor.loop([1, 2, 3])
    assert list(monitor.loop(["a"])) == [(0, "a")]


def test_a_closed_loop_holds_on_to_no_batches(tmp_path: Path) -> None:
    class Batch(list[int]):
        pass

    batches: list[Any] = [Batch([i]) for i in range(4)]
    gone = [weakref.ref(batch) for batch in batches]
    monitor = t.make_monitor(t.make_run(), tmp_path)
    loop = monitor.loop(iter(batches))
    next(loop), next(loop)
    loop.close()
    del batches, loop
    gc.collect()
    assert all(ref() is None for ref in gone)


def test_memory_for_replay_is_bounded_by_the_snapshots(tmp_path: Path) -> None:
    run = t.make_run(model=nn.Sequential(nn.Linear(t.FEATURES, t.CLASSES)), max_norm=None)
    run.model.requires_grad_(True)
    monitor = t.make_monitor(run, tmp_path, snapshot_interval=5, depth=2)
    x = torch.zeros(2, t.FEATURES), torch.zeros(2, dtype=torch.long)
    for step, batch in monitor.loop(x for _ in range(100)):
        t.train_step(run, step, batch, monitor)
        source = monitor._watch.history.source
        assert len(source._kept) <= 5 * 3 + 1
        assert len(monitor._watch.history.ring.entries) <= 3
    monitor.finalize()


@pytest.mark.parametrize("clean_steps", [0, 2, 9])
def test_memory_is_bounded_while_snapshots_wait_to_be_proven(
    tmp_path: Path, clean_steps: int
) -> None:
    monitor = t.make_monitor(
        t.make_run(), tmp_path, snapshot_interval=2, depth=1, clean_steps=clean_steps
    )
    for _ in monitor.loop(range(60)):
        monitor.step(1.0)
        assert len(monitor._watch.history.ring.entries) <= 2
        assert len(monitor._watch.history.source._kept) <= 2 * (clean_steps + 3)
    assert monitor._watch.history.ring.entries[-1].step > 45


def test_batches_are_not_kept_while_no_snapshot_can_be_taken(tmp_path: Path) -> None:
    """An optimizer whose state was never finite; training goes on, unprotected but bounded."""
    run = t.make_run()
    monitor = t.make_monitor(run, tmp_path, mode="recover", snapshot_interval=3)
    run.optimizer.state[run.model.head.weight]["odd"] = torch.tensor([float("inf")])
    batch = next(iter(run.loader))
    for _ in monitor.loop([batch] * 30):
        monitor.step(1.0)
        assert len(monitor._watch.history.source._kept) <= 1
    monitor.finalize()
    assert [e["step"] for e in t.events(tmp_path, "snapshot_dropped")] == list(range(0, 31, 3))


# ---- what user code does between the verdict and the end of the turn


def test_whatever_the_loop_does_after_a_rollback_is_undone(tmp_path: Path) -> None:
    how: dict[str, Any] = {
        "scheduler": lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5),
        "has_average": True,
    }
    clean, run = t.train(t.make_run(**how)), t.make_run(**how)
    run.strikes = [t.Strike(6, t.nan_in_weight)]
    with t.make_monitor(run, tmp_path) as monitor:
        for step, batch in monitor.loop(run.loader, epochs=2):
            t.train_step(run, step, batch, monitor)
            if run.verdicts[-1].action is fs.Action.ROLL_BACK:
                torch.rand(17)
                run.scheduler.step()
                with torch.no_grad():
                    for p in [*run.model.parameters(), *run.average.parameters()]:
                        p.add_(1)
                run.model.body[1].running_var.zero_()
                run.optimizer.param_groups[0]["weight_decay"] = 7.0
                run.optimizer.state.clear()
    t.assert_same_bits(run, clean)


def test_gradients_can_still_be_looked_at_after_a_rollback(tmp_path: Path) -> None:
    """The snapshot was taken when there were none."""
    run = t.make_run(zeroes_first=False, strikes=[t.Strike(6, t.nan_in_weight)])
    with t.make_monitor(run, tmp_path) as monitor:
        for step, batch in monitor.loop(run.loader, epochs=2):
            run.zeroes_first = True  # so that nothing clears them before we look
            t.train_step(run, step, batch, monitor)
            norms = [p.grad.norm().item() for p in run.model.parameters()]
            assert len(norms) == 6
            run.optimizer.zero_grad()
    assert monitor.finalize()["guard"]["total_recoveries"] == 1


def test_random_numbers_drawn_between_loops_are_part_of_the_run(tmp_path: Path) -> None:
    """An evaluation between two epochs, each with a loop of its own."""

    def go(run: t.Run, loops: Callable[[], Iterator[tuple[int, Any]]], monitor: Any) -> t.Run:
        for _ in range(2):
            for step, batch in loops():
                t.train_step(run, step, batch, monitor)
            torch.rand(5)
        return run

    clean = t.make_run()
    counter = iter(range(100))
    go(clean, lambda: ((next(counter), batch) for batch in clean.loader), None)
    run = t.make_run(strikes=[t.Strike(10, t.nan_in_weight)])
    with t.make_monitor(run, tmp_path, snapshot_interval=3) as monitor:
        go(run, lambda: monitor.loop(run.loader), monitor)
    t.assert_same_bits(run, clean)
