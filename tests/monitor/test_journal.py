"""What a run leaves on disk, and that no disk ever stops it."""

from __future__ import annotations

import errno
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import foreshock as fs
from foreshock.guard import Recovered, SnapshotDropped
from foreshock.journal import Journal
from foreshock.records import Ledger, read_ledger, read_summary, read_telemetry, verify
from foreshock.records.line_file import LineFile
from tests.monitor import training as t


def test_a_run_leaves_config_telemetry_and_summary(tmp_path: Path) -> None:
    run = t.make_run()
    summary = t.train_guarded(run, tmp_path / "deep" / "run")
    out_dir = tmp_path / "deep" / "run"
    assert sorted(os.listdir(out_dir)) == [
        "config.json", "fingerprint.json", "ledger.jsonl", "summary.json", "telemetry.jsonl",
    ]  # fmt: skip
    config = json.loads((out_dir / "config.json").read_text())
    assert (
        config["guard"]
        == fs.Guard(mode="recover", snapshot_interval=4, lr_backoff=1.0).model_dump()
    )
    assert config["monitor"]["telemetry_interval"] == 10
    assert config["monitor"]["spectral"]["thresholds"]["danger"] == 0.004
    assert config["spectral_passed_over"] == {}
    assert config["versions"]["torch"] == torch.__version__
    assert config["backends"]["health_scan"]["cpu"]
    assert read_summary(out_dir / "summary.json") == summary


def test_telemetry_comes_at_its_interval_with_loss_norm_and_rate(tmp_path: Path) -> None:
    run = t.make_run()
    guard = fs.Guard(mode="recover")
    with fs.Monitor(run.model, run.optimizer, tmp_path, guard, telemetry_interval=5) as monitor:
        t.train(run, monitor)
    telemetry = read_telemetry(tmp_path / "telemetry.jsonl")
    assert telemetry.schema_version == 1
    told = [r for r in telemetry.records if r["event"] == "telemetry"]
    assert [r["step"] for r in told] == [0, 5, 10]
    assert [r["train_loss"] for r in told] == [run.losses[step] for step in (0, 5, 10)]
    assert all(r["grad_norm"] > 0 and r["overhead_ms"] > 0 for r in told)
    assert all(r["learning_rate"] == 1e-2 for r in told)


def test_the_backed_off_rate_is_the_one_that_is_told(tmp_path: Path) -> None:
    run = t.make_run(strikes=[t.Strike(11, t.nan_in_weight)])
    t.train_guarded(run, tmp_path, lr_backoff=0.5, lr_recovery_steps=1000)
    told = read_telemetry(tmp_path / "telemetry.jsonl").records
    rates = {r["step"]: r["learning_rate"] for r in told if r["event"] == "telemetry"}
    assert rates[10] == pytest.approx(0.5e-2, rel=2e-3)


def test_the_summary_is_right_after_faults_of_all_kinds(tmp_path: Path) -> None:
    run = t.make_run(epochs=3)
    run.strikes = [
        t.Strike(4, t.nan_in_gradient, "backward"),
        t.Strike(7, t.nan_in_weight),
        t.Strike(13, t.nan_in_buffer),
    ]
    summary = t.train_guarded(run, tmp_path)
    assert summary["total_steps"] == 18
    assert summary["final_loss"] == run.losses[17]
    assert summary["guard"] == {
        "mode": "recover",
        "total_rollbacks": 2,
        "total_recoveries": 2,
        "skipped_steps": 1,
        "anomalies_seen": 0,
        "dropped_snapshots": 0,
        "saved_snapshots": 0,
        "unsaved_snapshots": 0,
        "resumed_from_step": None,
        "integrity_status": "RECOVERED",
        "abort": None,
        "autopsies": {"transient": 2, "deterministic": 0, "not_replayed": 0},
    }
    assert summary["overhead"]["mean_ms"] > 0
    assert 0 < summary["overhead"]["percent"] < 1000
    assert summary["dropped_records"] == 0
    names = [e["event"] for e in t.events(tmp_path)]
    assert names == [
        "update_skipped", "rollback_success", "recovered", "rollback_success", "recovered",
    ]  # fmt: skip


def test_finalize_again_is_harmless_and_the_optimizer_works_on(tmp_path: Path) -> None:
    run = t.make_run()
    plain_step = run.optimizer.step
    with t.make_monitor(run, tmp_path) as monitor:
        t.train(run, monitor)
        summary = monitor.finalize()
        assert monitor.finalize() == summary
        written = (tmp_path / "summary.json").stat().st_mtime_ns
    assert (tmp_path / "summary.json").stat().st_mtime_ns == written
    assert run.optimizer.step == plain_step
    before = run.model.head.weight.detach().clone()
    run.optimizer.step()
    assert not torch.equal(before, run.model.head.weight)
    assert monitor.step(1.0)
    assert monitor.clip_grad_norm_(1.0).isfinite()
    assert list(monitor.loop([1, 2])) == [(12, 1), (13, 2)]


def test_an_error_in_the_with_block_reaches_the_caller_and_the_summary_is_written(
    tmp_path: Path,
) -> None:
    run = t.make_run()
    run.strikes = [t.Strike(2, lambda run: 1 / 0, "update")]
    with pytest.raises(ZeroDivisionError), t.make_monitor(run, tmp_path) as monitor:
        t.train(run, monitor)
    assert read_summary(tmp_path / "summary.json")["total_steps"] == 3
    assert "step" not in vars(run.optimizer)


def test_a_full_disk_does_not_stop_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run, clean = t.make_run(), None
    monitor = t.make_monitor(run, tmp_path)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(LineFile, "append", refuse)
    monkeypatch.setattr("foreshock.journal.write_summary", refuse)
    run.strikes = [t.Strike(6, t.nan_in_weight)]
    with caplog.at_level(logging.WARNING, "foreshock"):
        t.train(run, monitor)
        summary = monitor.finalize()
    clean = t.train(t.make_run())
    t.assert_same_bits(run, clean)
    assert summary["dropped_records"] >= 3
    assert sum("summary.json could not be written" in r.message for r in caplog.records) == 1


def test_an_abort_on_a_full_disk_still_tells_training_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = t.make_run(strikes=[t.Strike(1, t.nan_in_weight)])
    monitor = t.make_monitor(run, tmp_path)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(LineFile, "append", refuse)
    monkeypatch.setattr(LineFile, "sync", refuse)
    monkeypatch.setattr("foreshock.journal.write_summary", refuse)
    t.train(run, monitor)
    assert not run.verdicts[-1]
    assert monitor.finalize()["guard"]["integrity_status"] == "ABORTED"


def test_the_console_is_not_flooded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = t.make_run(epochs=6, strikes=[t.Strike(2, t.nan_in_weight)], max_norm=None)
    with caplog.at_level(logging.WARNING, "foreshock"):
        t.train_guarded(run, tmp_path, mode="observe")
    assert len(t.events(tmp_path, "anomaly_seen")) > 30
    assert len(caplog.records) == 10
    assert caplog.records[-1].message.endswith("further ones only in telemetry.jsonl")


def test_the_console_tells_the_story_in_sentences(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = t.make_run()
    run.strikes = [t.Strike(4, t.nan_in_gradient, "backward"), t.Strike(7, t.nan_in_weight)]
    with caplog.at_level(logging.INFO, "foreshock"):
        t.train_guarded(run, tmp_path, lr_backoff=0.5)
    cost, *story = [r.message for r in caplog.records]
    assert cost.startswith("a snapshot takes ")
    assert story == [
        "step 4: update withheld: NONFINITE_GRADIENT (gradient head.weight: 1 NaN of 24 values)",
        "step 7: rolled back to step 4, learning rate times 0.5: NONFINITE_WEIGHTS, "
        "NONFINITE_GRADIENT, NONFINITE_LOSS (parameter head.weight: 1 NaN of 24 values)",
        "step 7: nothing is wrong when it is run again, with the learning rate times 0.5 "
        "(transient)",
        "step 7: passed",
    ]


def test_time_of_the_training_loop_is_not_ours(tmp_path: Path) -> None:
    import time

    run = t.make_run()
    with t.make_monitor(run, tmp_path, mode="observe") as monitor:
        for step, batch in monitor.loop(run.loader):
            t.train_step(run, step, batch, monitor)
            time.sleep(0.05)
    overhead = monitor.finalize()["overhead"]
    assert overhead["mean_ms"] < 25
    assert overhead["percent"] < 50


def test_a_run_directory_is_continued(tmp_path: Path) -> None:
    for _ in range(2):
        t.train_guarded(t.make_run(epochs=1), tmp_path)
    records: list[dict[str, Any]] = read_telemetry(tmp_path / "telemetry.jsonl").records
    assert [r["event"] for r in records] == ["start", "telemetry"] * 2


def test_what_the_guard_did_is_in_the_ledger_and_its_head_in_the_summary(tmp_path: Path) -> None:
    run = t.make_run(epochs=3)
    run.strikes = [
        t.Strike(4, t.nan_in_gradient, "backward"),
        t.Strike(7, t.nan_in_weight),
    ]
    summary = t.train_guarded(run, tmp_path, lr_backoff=0.5)
    records = read_ledger(tmp_path / "ledger.jsonl")
    assert [(r["event"], r["scope"]["step"]) for r in records] == [
        ("update_skipped", 4), ("rollback_success", 7), ("lr_changed", 7),
    ]  # fmt: skip
    assert all(r["policy"] == "guard" and r["operator"] == "auto" for r in records)
    assert records[0]["evidence"]["offender"]["name"] == "head.weight"
    assert records[1]["evidence"]["to_step"] == 4
    assert records[2]["evidence"] == {"lr_factor": 0.5}
    assert summary["lost_ledger_records"] == 0
    found = verify(tmp_path / "ledger.jsonl", head=summary["ledger_head"])
    assert (found.is_intact, found.head_line) == (True, 3)


def test_an_abort_is_in_the_ledger_before_the_run_ends(tmp_path: Path) -> None:
    run = t.make_run(strikes=[t.Strike(1, t.nan_in_weight)])
    monitor = t.make_monitor(run, tmp_path)
    t.train(run, monitor)
    head = read_summary(tmp_path / "summary.json")["ledger_head"]
    assert verify(tmp_path / "ledger.jsonl", head=head).head_line == 1
    assert read_ledger(tmp_path / "ledger.jsonl")[0]["event"] == "aborted"
    monitor.finalize()


def test_a_lost_snapshot_is_in_the_ledger(tmp_path: Path) -> None:
    journal = Journal(tmp_path, {})
    journal.record(SnapshotDropped(3, "its checksum no longer fits"))
    journal.record(Recovered(4))
    journal.close()
    (record,) = read_ledger(tmp_path / "ledger.jsonl")
    assert (record["event"], record["scope"]) == ("snapshot_dropped", {"step": 3})
    assert record["evidence"] == {"why": "its checksum no longer fits"}


def test_a_resumed_run_continues_the_ledger(tmp_path: Path) -> None:
    heads = []
    for _ in range(2):
        run = t.make_run(strikes=[t.Strike(4, t.nan_in_gradient, "backward")])
        heads.append(t.train_guarded(run, tmp_path)["ledger_head"])
    assert verify(tmp_path / "ledger.jsonl", head=heads[0]).head_line == 1
    assert verify(tmp_path / "ledger.jsonl", head=heads[1]).head_line == 2


@pytest.mark.parametrize("obstacle", ["held", "broken", "directory"])
def test_a_ledger_that_cannot_be_written_is_warned_of_once_and_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, obstacle: str
) -> None:
    path, other = tmp_path / "ledger.jsonl", None
    if obstacle == "held":
        other = Ledger(path)
    elif obstacle == "broken":
        path.write_bytes(b"{}\n")
    else:
        path.mkdir()
    run = t.make_run(strikes=[t.Strike(6, t.nan_in_weight)])
    with caplog.at_level(logging.WARNING, "foreshock"):
        summary = t.train_guarded(run, tmp_path)
    t.assert_same_bits(run, t.train(t.make_run()))
    assert sum("ledger" in r.message for r in caplog.records) == 1
    assert (summary["ledger_head"], summary["lost_ledger_records"]) == (None, 1)
    assert path.is_dir() or path.read_bytes() in (b"", b"{}\n")
    if other is not None:
        other.close()


def test_a_disk_that_does_not_take_the_ledger_does_not_stop_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = t.make_run(strikes=[t.Strike(6, t.nan_in_weight)])
    monitor = t.make_monitor(run, tmp_path)

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", refuse)
    with caplog.at_level(logging.WARNING, "foreshock"):
        t.train(run, monitor)
        summary = monitor.finalize()
    t.assert_same_bits(run, t.train(t.make_run()))
    assert (summary["dropped_records"], summary["lost_ledger_records"]) == (0, 1)
    assert sum("is incomplete" in r.message for r in caplog.records) == 1
    assert verify(tmp_path / "ledger.jsonl", head=summary["ledger_head"])
