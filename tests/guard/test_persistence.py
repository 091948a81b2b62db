"""Snapshots that are written beside the training, as fast as the disk can."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from foreshock.guard import SnapshotNotSaved, SnapshotSaved
from foreshock.guard.parts import SnapshotFolder, copies_of, file_in, steps_in
from foreshock.guard.persistence import Saver
from foreshock.guard.snapshots import Snapshot, checksum


def snapshot_at(step: int) -> Snapshot:
    saved = {"parameters": {"w": torch.full((8,), float(step))}}
    return Snapshot(step, saved, checksum=checksum(saved), place={"loop": 1, "source": None})


def save_all(saver: Saver, *steps: int) -> list[Any]:
    for step in steps:
        saver.save(snapshot_at(step))
        saver.wait()
    return saver.events()


@pytest.fixture
def folder(tmp_path: Path) -> SnapshotFolder:
    return SnapshotFolder(tmp_path / "snapshots")


def test_the_newest_are_kept_and_the_older_removed_only_then(folder: SnapshotFolder) -> None:
    saver = Saver(folder, 2)
    events = save_all(saver, 0, 10, 20, 1_000_000_000_000)
    assert folder.steps() == [20, 1_000_000_000_000]
    assert [type(event) for event in events] == [SnapshotSaved] * 4
    assert events[1].path == str(folder.file(10))
    assert saver.close()


def test_what_is_not_a_snapshot_is_left_alone(folder: SnapshotFolder) -> None:
    folder.path.mkdir()
    for name in ("notes.txt", "step_12.safetensors", "step_000000003.safetensors.bak"):
        (folder.path / name).write_text("")
    (folder.path / ".step_000000004.safetensors.abc.tmp").write_text("half")
    saver = Saver(folder, 1)
    save_all(saver, 5, 6)
    assert folder.steps() == [6]
    assert sorted(p.name for p in folder.path.iterdir()) == [
        "notes.txt", "step_000000003.safetensors.bak", "step_000000006.safetensors",
        "step_12.safetensors",
    ]  # fmt: skip
    saver.close()


def test_a_disk_that_is_too_slow_costs_snapshots_and_not_time_or_memory(
    folder: SnapshotFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, begun = threading.Event(), threading.Event()
    real = SnapshotFolder.write

    def slow(self: SnapshotFolder, step: int, pages: Any) -> int:
        begun.set()
        assert go_on.wait(10)
        return real(self, step, pages)

    monkeypatch.setattr(SnapshotFolder, "write", slow)
    saver = Saver(folder, 9)
    given = [snapshot_at(step) for step in range(5)]
    saver.save(given[0])
    assert begun.wait(10)
    for snapshot in given[1:]:
        saver.save(snapshot)
    assert [s.is_being_saved for s in given] == [True, False, False, False, True]
    go_on.set()
    saver.wait()
    assert not any(s.is_being_saved for s in given)
    assert folder.steps() == [0, 4]
    why = "the one after it came before the disk was ready"
    assert [e for e in saver.events() if isinstance(e, SnapshotNotSaved)] == [
        SnapshotNotSaved(step, why) for step in (1, 2, 3)
    ]
    saver.close()


def test_a_snapshot_that_has_changed_in_memory_never_gets_to_the_disk(
    folder: SnapshotFolder,
) -> None:
    saver, bad = Saver(folder, 3), snapshot_at(4)
    bad.saved["parameters"]["w"].view(torch.int32)[3] ^= 1 << 20
    saver.save(bad)
    saver.wait()
    assert saver.events() == [SnapshotNotSaved(4, "its checksum no longer fits")]
    assert folder.steps() == []
    saver.close()


def test_what_a_rollback_has_undone_is_removed(folder: SnapshotFolder) -> None:
    saver = Saver(folder, 9)
    save_all(saver, 0, 10, 20, 30)
    saver.forget_after(10)
    saver.wait()
    assert folder.steps() == [0, 10]
    saver.close()


def test_closing_waits_for_what_is_still_to_be_written(folder: SnapshotFolder) -> None:
    saver = Saver(folder, 9)
    saver.save(snapshot_at(3))
    assert saver.close()
    assert folder.steps() == [3]
    assert Saver(folder, 1).close()  # that had nothing to do


# ---- with a neighbour


class Handed:
    """A neighbour that gives back what it is given, and remembers of which steps."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def hand_on(self, step: int, pages: Any, take: Any, by: int) -> int:
        assert by == 1
        self.steps.append(step)
        for page in pages:
            take(page)
        return sum(map(len, pages))


@pytest.fixture
def shared(tmp_path: Path) -> SnapshotFolder:
    return SnapshotFolder(tmp_path / "snapshots", 0, 2)


def test_what_is_written_is_handed_on_byte_by_byte(shared: SnapshotFolder) -> None:
    saver = Saver(shared, 2)
    saver.neighbor = Handed()  # type: ignore[assignment]
    events = save_all(saver, 0, 10, 20)
    copies = copies_of(shared.root, 1, 2)
    assert steps_in(copies) == shared.steps() == [10, 20]
    assert file_in(copies, 20).read_bytes() == shared.file(20).read_bytes()
    assert [type(event) for event in events] == [SnapshotSaved] * 3
    saver.close()


def test_what_was_given_to_save_is_handed_on_whatever_becomes_of_it(
    shared: SnapshotFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other rank may be waiting for it already."""
    go_on = threading.Event()
    real = SnapshotFolder.forget_after

    def slow(self: SnapshotFolder, step: int) -> None:
        assert go_on.wait(10)
        real(self, step)

    monkeypatch.setattr(SnapshotFolder, "forget_after", slow)
    saver, handed, bad = Saver(shared, 9), Handed(), snapshot_at(40)
    saver.neighbor = handed  # type: ignore[assignment]
    saver.forget_after(30)
    saver.save(snapshot_at(20))
    saver.forget_after(10)
    go_on.set()
    saver.wait()
    assert handed.steps == [20]
    assert shared.steps() == []
    bad.saved["parameters"]["w"].view(torch.int32)[3] ^= 1 << 20
    saver.save(bad)
    saver.wait()
    assert handed.steps == [20, 40]
    saver.close()
