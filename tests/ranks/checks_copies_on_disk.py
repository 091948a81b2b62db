"""What one rank's disk has lost is fetched from the next rank, which has a copy."""

from __future__ import annotations

import datetime
import itertools
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

import foreshock as fs
from foreshock.guard import neighbor, snapshot_file
from foreshock.guard.neighbor import Neighbor
from foreshock.guard.parts import copies_of, folder_of, steps_in
from foreshock.records import read_telemetry
from tests.ranks.checks_recovery import nan_in_weight
from tests.ranks.training import (
    Batches,
    How,
    Run,
    Strike,
    assert_same_on_all_ranks,
    clean_bits,
    gathered,
    make_run,
    ranks,
    train,
    train_step,
)

KEPT = {"snapshot_interval": 2, "neighbor_copies": True, "clean_steps": 1}


def own_disk(out: Path) -> Path:
    """As if each rank were on a machine of its own."""
    return out / f"disk {dist.get_rank()}"


def wait(run: Run, step: int) -> None:
    assert run.saver is not None
    run.saver.wait()  # so that every snapshot is written, however slow the disk


def taken(out: Path, *strikes: Strike, rank_records: bool = False, **guard: Any) -> None:
    """By a run to its end, the last one two steps before it."""
    given = {"persist_dir": own_disk(out), **KEPT, **guard}
    records = {"rank_records": rank_records}
    train("fsdp2", out / "one", *strikes, at_step=wait, monitor=records, **given)
    gathered(None)


def resumed_bits(out: Path, kept: Path, *, is_kept_on: bool = True) -> tuple[int | None, Run]:
    """Where a run is taken up, and what it is at its end."""
    run = make_run("fsdp2", out, How())
    given = {**KEPT, "lr_backoff": 1.0, "persist_dir": kept, "mode": "recover"}
    guard = fs.Guard(**{**given, "neighbor_copies": is_kept_on})
    return resume_and_end(run, out, guard), run


def resume_and_end(run: Run, out: Path, guard: fs.Guard) -> int | None:
    with fs.Monitor(run.model, run.optimizer, out / "again", guard) as monitor:
        step = monitor.resume()
        for at, (x, y) in monitor.loop(Batches(dist.get_rank())):
            train_step(run, monitor, at, x, y, (), How())
    return step


def dropped(out: Path) -> list[str]:
    told = read_telemetry(out / "again" / "telemetry.jsonl").records
    return [e["why"] for e in told if e["event"] == "snapshot_dropped"]


def check_a_rank_that_has_lost_its_disk_has_its_parts_from_the_next_one(out: Path) -> None:
    clean = clean_bits("fsdp2", out.parent / "clean fsdp2 False")
    whole, neighbor._PIECE_BYTES = neighbor._PIECE_BYTES, 4096  # some to a part
    taken(out)
    me, size = dist.get_rank(), dist.get_world_size()
    copies = copies_of(own_disk(out), (me - 1) % size, size)
    assert steps_in(copies) == steps_in(folder_of(own_disk(out), me)) == [10, 12, 14]
    for lost in (0, 1):
        kept = out / f"without {lost}" / f"disk {me}"
        if me != lost:
            shutil.copytree(own_disk(out), kept)
        gathered(None)
        step, run = resumed_bits(out / f"without {lost}", kept)
        assert step == 14
        assert run.bits() == clean
        assert 14 in steps_in(folder_of(kept, me)), "what was fetched is on disk again"
    neighbor._PIECE_BYTES = whole


@ranks(2)
def check_a_copy_that_is_damaged_too_sends_all_to_an_older_one_or_to_an_error(out: Path) -> None:
    taken(out)
    me = dist.get_rank()
    copies = copies_of(own_disk(out), 1, 2)
    if me == 1:
        shutil.rmtree(own_disk(out))
    else:
        spoil(copies / "step_000000014.safetensors")
    gathered(None)
    run = make_run("fsdp2", out, How())
    guard = fs.Guard(mode="recover", persist_dir=own_disk(out), **KEPT)
    with fs.Monitor(run.model, run.optimizer, out / "again", guard, rank_records=True) as monitor:
        assert monitor.resume() == 12
    told = dropped(out) if me == 0 else []
    assert me or any("of_rank_00001" in why and "checksum" in why for why in told), told
    gathered(None)
    if me == 1:
        shutil.rmtree(own_disk(out))
    else:
        for file in copies.glob("step_*"):
            spoil(file)
    gathered(None)
    run = make_run("fsdp2", out, How())
    with (
        fs.Monitor(run.model, run.optimizer, out / "again", guard) as monitor,
        pytest.raises(ValueError, match=r"none of the \d snapshots.*accepted"),
    ):
        monitor.resume()


def spoil(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


@ranks(4)
def check_in_one_directory_the_copies_need_not_be_sent(out: Path) -> None:
    """Nor `neighbor_copies` in the second run."""
    clean = clean_bits("fsdp2", out.parent / "clean fsdp2 False")
    kept = out / "kept"
    taken(out, persist_dir=kept)
    if dist.get_rank() == 0:
        shutil.rmtree(folder_of(kept, 2))
        spoil(folder_of(kept, 0) / "step_000000014.safetensors")
    gathered(None)
    step, run = resumed_bits(out, kept, is_kept_on=False)
    assert step == 14
    assert run.bits() == clean


@ranks(2)
def check_what_a_rollback_undoes_goes_with_its_copies(out: Path) -> None:
    clean = clean_bits("fsdp2", out.parent / "clean fsdp2 False")
    seen: list[int] = []

    def look(run: Run, step: int) -> None:
        wait(run, step)
        mine = steps_in(folder_of(own_disk(out), dist.get_rank()))
        copies = steps_in(copies_of(own_disk(out), 1 - dist.get_rank(), 2))
        assert mine == copies
        seen.append(max(mine, default=-1))

    given = {"persist_dir": own_disk(out), **KEPT, "min_depth": 3}
    run = train("fsdp2", out / "one", Strike(9, 1, nan_in_weight), at_step=look, **given)
    assert run.summary["guard"]["total_rollbacks"] == 1
    assert any(after < before for before, after in itertools.pairwise(seen)), seen
    assert_same_on_all_ranks(seen)
    assert run.bits() == clean


@ranks(2)
def check_a_disk_that_fails_still_hands_on_what_it_has(out: Path) -> None:
    inner = snapshot_file.write_pages

    def write_pages(path: Path, pages: Any) -> int:
        if dist.get_rank() == 1:
            raise OSError("no space left")
        return inner(path, pages)

    snapshot_file.write_pages = write_pages
    try:
        taken(out)
    finally:
        snapshot_file.write_pages = inner
    if dist.get_rank() == 0:
        assert steps_in(copies_of(own_disk(out), 1, 2))[-1] == 14
    clean = clean_bits("fsdp2", out.parent / "clean fsdp2 False")
    step, run = resumed_bits(out, own_disk(out))
    assert step == 14
    assert run.bits() == clean


@ranks(2)
def check_a_slow_disk_passes_the_same_snapshots_over_on_all_ranks(out: Path) -> None:
    """One is still being written while the run goes on, and goes back."""
    clean = clean_bits("fsdp2", out.parent / "clean fsdp2 False")
    inner = snapshot_file.write_pages

    def write_pages(path: Path, pages: Any) -> int:
        time.sleep(0.3 * dist.get_rank())
        return inner(path, pages)

    snapshot_file.write_pages = write_pages
    try:
        given = {"persist_dir": own_disk(out), **KEPT, "depth": 9, "min_depth": 3}
        slowly = lambda run, step: time.sleep(0.05)  # noqa: E731
        run = train("fsdp2", out / "one", Strike(9, 1, nan_in_weight), at_step=slowly, **given)
    finally:
        snapshot_file.write_pages = inner
    assert run.bits() == clean
    me = dist.get_rank()
    mine = steps_in(folder_of(own_disk(out), me))
    assert_same_on_all_ranks([mine, steps_in(copies_of(own_disk(out), 1 - me, 2))])
    assert 1 < len(mine) < 8, "some were passed over"
    told = read_telemetry(out / "one" / "telemetry.jsonl").records
    assert not [e for e in told if e["event"] == "snapshot_not_saved"]


@ranks(2)
def check_copies_that_fail_are_told_of_once_and_training_goes_on(out: Path) -> None:
    """On one rank, before the other has what it waits for, or after it: neither waits again."""
    inner, limit = Neighbor.hand_on, neighbor._TIMEOUT
    me = dist.get_rank()
    for when in ("before", "after"):

        def hand_on(self: Neighbor, step: int, *given: Any, when: str = when, **more: Any) -> int:
            fails = (step, me) == (6, 0)
            size = 0 if fails and when == "before" else inner(self, step, *given, **more)
            if fails:
                raise RuntimeError("no answer")
            return size

        Neighbor.hand_on = hand_on  # type: ignore[method-assign]
        neighbor._TIMEOUT = datetime.timedelta(seconds=2)
        try:
            taken(out / when, rank_records=True)
        finally:
            Neighbor.hand_on, neighbor._TIMEOUT = inner, limit  # type: ignore[method-assign]
        assert steps_in(folder_of(own_disk(out / when), me))[-1] == 14
        records = out / when / "one" / ("rank_00001" if me else ".") / "telemetry.jsonl"
        told = read_telemetry(records).records
        found = [e["why"] for e in told if e["event"] == "snapshot_not_saved"]
        why = {0: "no answer", 1: "Timed out"}[me]
        assert len(found) == (0 if (me, when) == (1, "after") else 1), found
        assert all(f.startswith("no more copies of the rank before are kept: ") for f in found)
        assert all(why in f for f in found)
