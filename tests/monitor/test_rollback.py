"""When the monitor skips, when it rolls back, when it gives up; and what it says of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

import foreshock as fs
from foreshock.guard import Offender, Reason
from foreshock.records import read_summary
from tests.monitor import training as t

FOR_EVER = 1_000_000


def strikes_at(step: int, hit: Any = t.nan_in_weight, lives: int = 1, when: str = "start") -> Any:
    return [t.Strike(step, hit, when, lives)]


def test_the_offender_its_count_and_the_step_are_exact(tmp_path: Path) -> None:
    def hit(run: t.Run) -> None:
        run.model.head.weight[1] = torch.tensor([math.nan] * 3 + [math.inf] + [0.0] * 4)

    run = t.make_run(strikes=strikes_at(6, hit))
    t.train_guarded(run, tmp_path)
    verdict = run.verdicts[6]
    assert verdict.step == 6
    assert verdict.action is fs.Action.ROLL_BACK
    assert verdict.reasons[0] is Reason.NONFINITE_WEIGHTS
    assert verdict.offender == Offender("parameter", "head.weight", nan=3, inf=1, numel=24)
    assert verdict
    (told,) = t.events(tmp_path, "rollback_success")
    assert told["step"] == 6
    assert told["to_step"] == 4
    assert told["reason"] == "NONFINITE_WEIGHTS"
    assert told["offender"] == {
        "kind": "parameter", "name": "head.weight", "nan": 3, "inf": 1, "numel": 24, "ranks": [],
    }  # fmt: skip
    (recovered,) = t.events(tmp_path, "recovered")
    assert recovered["step"] == 6
    assert run.steps == [*range(7), *range(4, 12)]


def test_trap_6_the_offender_is_found_before_clipping_spreads_it(
    tmp_path: Path,
) -> None:
    """After clipping every gradient is NaN, and the first by order would be blamed."""
    run = t.make_run(strikes=strikes_at(5, t.nan_in_gradient, when="backward"), max_norm=0.1)
    t.train_guarded(run, tmp_path)
    assert all(p.grad.isfinite().all() for p in run.model.parameters())
    assert run.verdicts[5].offender == Offender("gradient", "head.weight", 1, 0, 24)
    (told,) = t.events(tmp_path, "update_skipped")
    assert (told["step"], told["offender"]["name"]) == (5, "head.weight")


def test_a_nan_loss_with_finite_gradients_withholds_the_update(tmp_path: Path) -> None:
    run = t.make_run()
    with t.make_monitor(run, tmp_path) as monitor:
        for step, batch in monitor.loop(run.loader, epochs=1):
            run.optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(run.model(batch[0]), batch[1])
            loss.backward()
            before = run.model.head.weight.detach().clone()
            verdict = monitor.step(math.nan if step == 3 else loss)
            run.optimizer.step()
            assert torch.equal(run.model.head.weight, before) == (step == 3)
            if step == 3:
                assert verdict.action is fs.Action.SKIP
                assert verdict.reasons == (Reason.NONFINITE_LOSS,)
                assert verdict.offender is None
    assert monitor.finalize()["guard"]["skipped_steps"] == 1


def test_a_loss_over_the_threshold_rolls_back(tmp_path: Path) -> None:
    def hit(run: t.Run) -> None:
        run.model.head.bias[0] = 1e9

    clean, run = t.train(t.make_run()), t.make_run(strikes=strikes_at(7, hit))
    t.train_guarded(run, tmp_path, violation_threshold=1e4)
    assert run.verdicts[7].reasons == (Reason.LOSS_OVER_THRESHOLD,)
    assert run.verdicts[7].offender is None
    t.assert_same_bits(run, clean)


def test_skips_in_a_row_roll_back_and_the_replay_loses_nothing(tmp_path: Path) -> None:
    clean = t.train(t.make_run())
    strikes = [t.Strike(step, t.nan_in_gradient, "backward") for step in (5, 6, 7)]
    run = t.make_run(strikes=strikes)
    summary = t.train_guarded(run, tmp_path, max_consecutive_skips=3)
    assert [v.action.value for v in run.verdicts[5:8]] == ["skip", "skip", "roll_back"]
    assert run.verdicts[7].reasons == (Reason.NONFINITE_GRADIENT, Reason.CONSECUTIVE_SKIPS)
    assert (summary["guard"]["skipped_steps"], summary["guard"]["total_rollbacks"]) == (2, 1)
    t.assert_same_bits(run, clean)


def test_trap_16_a_fault_that_persists_ends_in_an_abort_with_its_evidence(tmp_path: Path) -> None:
    """Same random numbers, same data, same rate: the same failure, and not for ever."""
    run = t.make_run(strikes=strikes_at(6, lives=FOR_EVER))
    summary = t.train_guarded(run, tmp_path, max_rollbacks=3)
    assert run.steps == [*range(7), 4, 5, 6, 4, 5, 6, 4, 5, 6]
    last = run.verdicts[-1]
    assert not last
    assert last.action is fs.Action.ABORT
    assert last.reasons[-1] is Reason.TOO_MANY_ROLLBACKS
    assert summary["guard"]["total_rollbacks"] == 3
    assert summary["guard"]["total_recoveries"] == 0
    assert summary["guard"]["integrity_status"] == "ABORTED"
    (told,) = t.events(tmp_path, "aborted")
    assert told["reasons"] == ["NONFINITE_WEIGHTS", "NONFINITE_GRADIENT", "NONFINITE_LOSS",
                               "TOO_MANY_ROLLBACKS"]  # fmt: skip
    assert told["offender"]["name"] == "head.weight"
    assert summary["guard"]["abort"]["step"] == 6
    assert summary["guard"]["abort"]["offender"] == told["offender"]
    assert read_summary(tmp_path / "summary.json") == summary


def test_the_evidence_of_an_abort_is_on_disk_before_the_run_is_finalized(tmp_path: Path) -> None:
    run = t.make_run(strikes=strikes_at(1))
    monitor = t.make_monitor(run, tmp_path)
    t.train(run, monitor)
    assert t.events(tmp_path, "aborted")[0]["reason"] == "NONFINITE_WEIGHTS"
    assert read_summary(tmp_path / "summary.json")["guard"]["integrity_status"] == "ABORTED"


def test_trap_16_a_bad_batch_is_passed_by_leaving_it_out(tmp_path: Path) -> None:
    run = t.make_run()
    seen: list[float] = []
    bad: float | None = None
    with t.make_monitor(run, tmp_path, skip_batches=1) as monitor:
        for step, (x, y) in monitor.loop(run.loader, epochs=2):
            run.optimizer.zero_grad()
            mark = x.sum().item()
            bad = mark if step == 6 and bad is None else bad
            loss = torch.nn.functional.cross_entropy(run.model(x), y)
            if mark == bad:
                loss = loss * 1e9  # deterministic: this batch always fails
            loss.backward()
            verdict = monitor.step(loss)
            run.optimizer.step()
            if verdict.action is fs.Action.CONTINUE:
                seen.append(mark)
    summary = monitor.finalize()
    assert summary["guard"]["total_rollbacks"] == summary["guard"]["total_recoveries"] == 1
    clean = [x.sum().item() for x, _ in _batches_of(t.make_run(), 2)]
    replayed = seen[:6] + seen[8:]  # 0 to 5, then 4 and 5 again, then from the seventh on
    assert seen[4:6] == seen[6:8]
    assert replayed == [mark for i, mark in enumerate(clean) if i != 6]
    assert summary["total_steps"] == 11


def _batches_of(run: t.Run, epochs: int) -> list[Any]:
    """What the loop above draws, with the same random numbers drawn in between."""
    batches = []
    for _ in range(epochs):
        for x, y in run.loader:
            batches.append((x, y))
            run.optimizer.zero_grad()
            torch.nn.functional.cross_entropy(run.model(x), y).backward()
    return batches


@pytest.mark.parametrize(("strike", "has_snapshot"), [(0, False), (1, False), (2, True)])
def test_without_an_eligible_snapshot_the_run_is_aborted(
    tmp_path: Path, strike: int, has_snapshot: bool
) -> None:
    run = t.make_run(strikes=strikes_at(strike))
    summary = t.train_guarded(run, tmp_path, clean_steps=2)
    if has_snapshot:
        assert summary["guard"]["integrity_status"] == "RECOVERED"
    else:
        assert run.verdicts[-1].reasons[-1] is Reason.NO_SNAPSHOT
        assert not run.verdicts[-1]
        assert run.steps == list(range(strike + 1))


def test_trap_17_a_fault_right_after_a_snapshot_does_not_restore_that_snapshot(
    tmp_path: Path,
) -> None:
    """The snapshot of step 8 was taken with the weights already wrong, but finite."""

    def hit(run: t.Run) -> None:
        run.model.head.bias[0] = 1e9

    clean, run = t.train(t.make_run()), t.make_run(strikes=strikes_at(7, hit, when="update"))
    t.train_guarded(run, tmp_path, snapshot_interval=4, clean_steps=2)
    (told,) = t.events(tmp_path, "rollback_success")
    assert (told["step"], told["to_step"]) == (8, 4)
    t.assert_same_bits(run, clean)


def test_min_depth_asks_for_an_older_snapshot(tmp_path: Path) -> None:
    clean, run = t.train(t.make_run()), t.make_run(strikes=strikes_at(9))
    t.train_guarded(run, tmp_path, snapshot_interval=2, min_depth=4)
    assert t.events(tmp_path, "rollback_success")[0]["to_step"] == 4
    t.assert_same_bits(run, clean)


def test_a_corrupt_snapshot_is_found_and_the_older_one_leads_to_the_same_bits(
    tmp_path: Path,
) -> None:
    run = t.make_run()
    monitor = t.make_monitor(run, tmp_path, snapshot_interval=4)

    def hit(run: t.Run) -> None:
        newest = monitor._watch.history.ring.entries[-1]
        assert newest.step == 4
        newest.saved["parameters"]["head.weight"].view(torch.int32)[0, 0] ^= 1 << 20
        t.nan_in_weight(run)

    run.strikes = strikes_at(7, hit)
    t.train(run, monitor)
    summary = monitor.finalize()
    assert summary["guard"]["dropped_snapshots"] == 1
    dropped, rolled_back, _ = t.events(tmp_path)
    assert (dropped["event"], dropped["step"]) == ("snapshot_dropped", 4)
    assert rolled_back["to_step"] == 0
    t.assert_same_bits(run, t.train(t.make_run()))


def test_a_snapshot_of_a_state_that_is_not_finite_is_refused_and_told_of(tmp_path: Path) -> None:
    """The update after step 7 makes a moment NaN; step 8 would have been a snapshot."""

    def hit(run: t.Run) -> None:
        run.optimizer.state[run.model.head.weight]["exp_avg"][0, 0] = math.nan

    clean, run = t.train(t.make_run()), t.make_run(strikes=strikes_at(7, hit, when="update"))
    t.train_guarded(run, tmp_path)
    dropped, rolled_back, _ = t.events(tmp_path)
    assert (dropped["event"], dropped["step"]) == ("snapshot_dropped", 8)
    assert dropped["why"].startswith("optimizer.state.4.exp_avg")
    assert (rolled_back["step"], rolled_back["to_step"]) == (9, 4)
    t.assert_same_bits(run, clean)


def test_two_rollbacks_before_the_failed_step_is_passed_are_one_recovery(tmp_path: Path) -> None:
    clean = t.train(t.make_run())
    run = t.make_run(strikes=[*strikes_at(7), *strikes_at(6, lives=2)])
    run.strikes[1].lives = 0

    def hit(run: t.Run) -> None:
        t.nan_in_weight(run)
        run.strikes[1].lives = 1  # while step 7 is still to be passed, step 6 fails

    run.strikes[0].hit = hit
    summary = t.train_guarded(run, tmp_path)
    assert run.steps == [*range(8), 4, 5, 6, *range(4, 12)]
    assert summary["guard"]["total_rollbacks"] == 2
    assert summary["guard"]["total_recoveries"] == 1
    assert t.events(tmp_path, "recovered")[0]["step"] == 7
    t.assert_same_bits(run, clean)


def test_trap_14_learning_rate_backs_off_out_of_sight_of_the_scheduler(tmp_path: Path) -> None:
    """Seen where it counts, in the update itself."""
    run = t.make_run(scheduler=lambda o: LambdaLR(o, lambda step: 1 / (1 + step)))
    run.strikes = strikes_at(6)
    rates: list[tuple[float, float]] = []
    monitor = t.make_monitor(run, tmp_path, lr_backoff=0.5, lr_recovery_steps=4)
    run.optimizer.register_step_pre_hook(
        lambda o, *_: rates.append((o.param_groups[0]["lr"], run.scheduler.get_last_lr()[0]))
    )
    t.train(run, monitor)
    monitor.finalize()
    assert [used / planned for used, planned in rates] == pytest.approx(
        [1] * 6 + [0.5, 0.625, 0.75, 0.875] + [1] * 4
    )
    assert [planned for _, planned in rates] == pytest.approx(
        [1e-2 / (1 + step) for step in [*range(6), *range(4, 12)]]
    )
    assert t.events(tmp_path, "rollback_success")[0]["lr_factor"] == 0.5


def test_faults_that_were_recovered_from_and_are_far_apart_are_never_too_many(
    tmp_path: Path,
) -> None:
    clean = t.train(t.make_run(epochs=4))
    run = t.make_run(epochs=4, strikes=[t.Strike(s, t.nan_in_weight) for s in range(5, 24, 4)])
    summary = t.train_guarded(run, tmp_path, max_rollbacks=1, rollback_window=3)
    assert summary["guard"]["total_rollbacks"] == summary["guard"]["total_recoveries"] == 5
    t.assert_same_bits(run, clean)


def test_learning_rate_compounds_over_rollbacks(tmp_path: Path) -> None:
    run = t.make_run(strikes=strikes_at(6, lives=3))
    t.train_guarded(run, tmp_path, lr_backoff=0.5, lr_recovery_steps=1000)
    told = [e["lr_factor"] for e in t.events(tmp_path, "rollback_success")]
    assert told[0] == 0.5
    assert 0.25 < told[1] < 0.2515  # two updates later: times 0.5 of what had recovered
    assert 0.125 < told[2] < 0.127


def test_skip_mode_withholds_never_rolls_back_and_gives_up_when_that_is_hopeless(
    tmp_path: Path,
) -> None:
    run = t.make_run(strikes=strikes_at(5, t.nan_in_gradient, when="backward"))
    summary = t.train_guarded(run, tmp_path / "one", mode="skip")
    assert summary["guard"]["skipped_steps"] == 1
    assert run.steps == list(range(12))
    run = t.make_run(strikes=strikes_at(5))
    summary = t.train_guarded(run, tmp_path / "two", mode="skip")
    assert run.steps == list(range(8))
    assert [v.action.value for v in run.verdicts[5:]] == ["skip", "skip", "abort"]
    assert summary["guard"]["total_rollbacks"] == 0


def test_after_an_abort_nothing_is_updated_any_more(tmp_path: Path) -> None:
    """The training loop was told to stop and did not."""
    run = t.make_run()
    monitor = t.make_monitor(run, tmp_path)
    x, y = next(iter(run.loader))
    for attempt in range(6):
        run.optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(run.model(x), y)
        loss.backward()
        verdict = monitor.step(loss * 1e9 if attempt == 1 else loss)
        before = run.model.head.weight.detach().clone()
        run.optimizer.step()
        assert torch.equal(before, run.model.head.weight) == (attempt >= 1)
        assert bool(verdict) == (attempt == 0)
        assert verdict.step == min(attempt, 1)
    assert list(monitor.loop(run.loader)) == []
    monitor.finalize()
    assert len(t.events(tmp_path, "aborted")) == 1


def test_parameters_are_scanned_at_the_interval_and_whenever_something_is_odd(
    tmp_path: Path,
) -> None:
    """The embedding row that is NaN is not used, so that nothing else shows it."""
    model = torch.nn.Sequential(torch.nn.Embedding(8, 2), torch.nn.Flatten(), torch.nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = fs.Guard(mode="recover", snapshot_interval=100, check_interval=5, lr_backoff=1.0)
    found = []
    with fs.Monitor(model, optimizer, tmp_path, guard) as monitor:
        struck = set()
        for step, x in monitor.loop([torch.tensor([[0, 1]])] * 12):
            if step in (6, 11) and step not in struck:
                struck.add(step)
                with torch.no_grad():
                    model[0].weight[7, 0] = math.nan
            optimizer.zero_grad()
            loss = model(x).sum()
            loss.backward()
            found.append((step, monitor.step(math.nan if step == 11 else loss).action.value))
            optimizer.step()
            if step == 11:
                break
    bad = [(step, action) for step, action in found if action != "continue"]
    assert bad == [(10, "roll_back"), (11, "roll_back")]


@pytest.mark.parametrize("mode", ["observe", "skip", "recover"])
def test_verdict_is_true_unless_training_is_to_stop(tmp_path: Path, mode: str) -> None:
    run = t.make_run(strikes=strikes_at(1, lives=FOR_EVER))
    t.train_guarded(run, tmp_path, mode=mode, max_rollbacks=0)
    aborted = [v for v in run.verdicts if v.action is fs.Action.ABORT]
    assert aborted
    assert all(bool(v) == (mode == "observe" or v not in aborted) for v in run.verdicts)


def test_a_fault_of_the_very_last_update_is_found_and_recovered_from(tmp_path: Path) -> None:
    """There is no later step to see it."""
    clean, run = t.train(t.make_run()), t.make_run(strikes=strikes_at(11, when="update"))
    summary = t.train_guarded(run, tmp_path)
    assert run.steps == [*range(12), *range(8, 12)]
    t.assert_same_bits(run, clean)
    assert summary["guard"]["total_recoveries"] == 1
    assert summary["total_steps"] == 12


def test_a_fault_in_the_last_step_is_replayed(tmp_path: Path) -> None:
    clean, run = t.train(t.make_run()), t.make_run(strikes=strikes_at(11))
    t.train_guarded(run, tmp_path)
    assert run.steps == [*range(12), *range(8, 12)]
    t.assert_same_bits(run, clean)


def test_a_last_update_that_always_fails_is_not_retried_for_ever(tmp_path: Path) -> None:
    run = t.make_run(strikes=strikes_at(11, when="update", lives=FOR_EVER))
    summary = t.train_guarded(run, tmp_path, max_rollbacks=2, rollback_window=1)
    assert summary["guard"]["integrity_status"] == "ABORTED"
    assert run.steps == [*range(12), *range(8, 12), *range(8, 12)]
