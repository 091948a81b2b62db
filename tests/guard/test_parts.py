"""The parts of snapshots on disk: which belong together, who looks after them, which go."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from foreshock.guard import SnapshotDropped, snapshot_file
from foreshock.guard.finding import Alone, Search
from foreshock.guard.parts import (
    SnapshotFolder,
    all_steps_in,
    copies_of,
    file_in,
    find_parts,
    folder_of,
    steps_in,
)
from foreshock.guard.resharding import Layout
from foreshock.guard.snapshot_file import Content, DamagedFile
from foreshock.guard.state import NamedTensors


def content_at(step: int) -> Content:
    saved = {
        "parameters": {"w": torch.full((8,), float(step))},
        "buffers": {},
        "gradients": {"present": [], "values": {}},
        "random": {},
    }
    return Content(step, {"saved": saved, "place": None})


def write_part(folder: SnapshotFolder, step: int) -> None:
    folder.write(step, folder.pages_of(content_at(step)))


def write(path: Path, ranks: int, *steps: int, but: int | None = None) -> None:
    """The parts of so many ranks; of all but one."""
    for rank in range(ranks):
        for step in steps if rank != but else ():
            write_part(SnapshotFolder(path, rank, ranks), step)


def on_disk(path: Path) -> dict[str, list[int]]:
    folders = [path, *sorted(path.glob("rank_*"))]
    return {f.name: steps_in(f) for f in folders if f != path or steps_in(f)}


# ---- which belong together


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_all_parts_of_a_step_are_found_in_the_order_of_the_ranks(
    tmp_path: Path, ranks: int
) -> None:
    write(tmp_path, ranks, 3, 40)
    parts = find_parts(tmp_path, 40)
    assert (parts.step, parts.ranks) == (40, ranks)
    assert parts.files == tuple(SnapshotFolder(tmp_path, r, ranks).file(40) for r in range(ranks))
    assert [header.rank for header in parts.headers] == list(range(ranks))
    assert all_steps_in(tmp_path) == [3, 40]


def test_a_part_that_is_missing_is_named(tmp_path: Path) -> None:
    write(tmp_path, 4, 7, but=2)
    missing = file_in(folder_of(tmp_path, 2), 7)
    with pytest.raises(DamagedFile, match=f"{missing}: it is missing, one of the parts of 4 ranks"):
        find_parts(tmp_path, 7)


def test_a_part_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    write(tmp_path, 2, 7)
    file_in(folder_of(tmp_path, 1), 7).write_bytes(b"not much")
    with pytest.raises(DamagedFile, match=r"rank_00001.*cannot be read as a snapshot"):
        find_parts(tmp_path, 7)


def test_parts_of_two_numbers_of_ranks_are_told_apart(tmp_path: Path) -> None:
    """Those of a run on four ranks and, of the same step, the first of a run on two."""
    write(tmp_path, 4, 7)
    write_part(SnapshotFolder(tmp_path, 0, 2), 7)
    with pytest.raises(DamagedFile, match="it is missing"):
        find_parts(tmp_path, 7)
    write_part(SnapshotFolder(tmp_path, 1, 2), 7)
    assert find_parts(tmp_path, 7).ranks == 2


def test_one_part_of_many_is_not_taken_for_the_whole(tmp_path: Path) -> None:
    write(tmp_path, 2, 7)
    file_in(folder_of(tmp_path, 0), 7).rename(file_in(tmp_path, 7))
    with pytest.raises(DamagedFile, match="but one of the parts of 2 ranks"):
        find_parts(tmp_path, 7)


def test_of_a_part_that_is_missing_or_damaged_the_copy_is_taken(tmp_path: Path) -> None:
    write(tmp_path, 3, 7)
    copy_part(tmp_path, 1, 3, 7)
    lost = file_in(folder_of(tmp_path, 1), 7)
    for damage in (b"not much", None):
        lost.unlink() if damage is None else lost.write_bytes(damage)
        parts = find_parts(tmp_path, 7)
        assert [header.rank for header in parts.headers] == [0, 1, 2]
        assert parts.files[1] == tmp_path / "rank_00002" / "of_rank_00001" / lost.name


def copy_part(path: Path, rank: int, ranks: int, step: int) -> None:
    file = SnapshotFolder(path, (rank + 1) % ranks, ranks).incoming_copy(step)
    file.take(memoryview(file_in(folder_of(path, rank), step).read_bytes()))
    file.finish()


# ---- which go


def test_copies_go_with_what_they_are_copies_of(tmp_path: Path) -> None:
    write(tmp_path, 4, 10, 20, 30)
    for rank, step in itertools.product(range(4), (10, 20, 30)):
        copy_part(tmp_path, rank, 4, step)
    folders = [SnapshotFolder(tmp_path, rank, 2) for rank in range(2)]
    copies = [copies_of(tmp_path, rank, 4) for rank in range(4)]
    folders[0].set_aside_after(20)
    folders[1].forget_after(20)
    assert [steps_in(folder) for folder in copies] == [[10, 20]] * 4
    for folder in folders:
        folder.keep(1)
    assert [steps_in(folder) for folder in copies] == [[20]] * 4
    (copies[0] / ".step_000000009.safetensors.abc.tmp").write_text("half")
    folders[1].clear_leftovers()
    assert sorted(p.name for p in copies[0].iterdir()) == ["step_000000020.safetensors"]


def test_parts_of_ranks_that_are_no_more_go_as_those_of_the_others_do(tmp_path: Path) -> None:
    write(tmp_path, 4, 10, 20)
    folders = [SnapshotFolder(tmp_path, rank, 2) for rank in range(2)]
    for folder in folders:
        write_part(folder, 30)
        folder.keep(2, before=-1)  # not known to be there as a whole
    assert find_parts(tmp_path, 10).ranks == 4
    for folder in folders:
        folder.keep(2, before=30)
    assert on_disk(tmp_path) == {
        "rank_00000": [20, 30], "rank_00001": [20, 30], "rank_00002": [20], "rank_00003": [20],
    }  # fmt: skip
    assert find_parts(tmp_path, 20).ranks == 4
    for folder in folders:
        write_part(folder, 40)
        folder.keep(2, before=40)
    assert on_disk(tmp_path) == {"rank_00000": [30, 40], "rank_00001": [30, 40]}


@pytest.mark.parametrize(("before", "after"), [(3, 1), (1, 3)])
def test_so_they_do_between_one_rank_and_many(tmp_path: Path, before: int, after: int) -> None:
    write(tmp_path, before, 10, 20)
    folders = [SnapshotFolder(tmp_path, rank, after) for rank in range(after)]
    for step, left in ((30, [20, 30]), (40, [30, 40])):
        write(tmp_path, after, step)
        for folder in folders:
            folder.keep(2, before=step)
        assert all_steps_in(tmp_path) == left
        assert find_parts(tmp_path, 30).ranks == after
    own = [f.path for f in folders] if after > 1 else [folders[0].file(s) for s in (30, 40)]
    assert sorted(tmp_path.iterdir()) == sorted(own)


def test_later_ones_of_all_ranks_are_set_aside(tmp_path: Path) -> None:
    write(tmp_path, 3, 10, 20)
    for rank in range(2):
        SnapshotFolder(tmp_path, rank, 2).set_aside_after(10)
    assert on_disk(tmp_path) == {f"rank_0000{rank}": [10] for rank in range(3)}
    assert len(list(tmp_path.glob("rank_*/step_000000020.damaged"))) == 3


# ---- one process looks for the newest


def search(path: Path, told: list[SnapshotDropped]) -> Search:
    named = NamedTensors(lambda: {"w": torch.zeros(8)})
    return Search(path, Alone(), Layout({"parameters": named, "buffers": named}), told.append)


def test_the_newest_that_is_whole_is_found_and_the_others_told_of(tmp_path: Path) -> None:
    write(tmp_path, 1, 0, 10, 20)
    file_in(tmp_path, 20).write_bytes(b"not much")
    told: list[SnapshotDropped] = []
    found = search(tmp_path, told).newest()
    assert found is not None
    path, snapshot = found
    assert (path, snapshot.step) == (file_in(tmp_path, 10), 10)
    assert snapshot.saved["parameters"]["w"][0] == 10
    assert [event.step for event in told] == [20]
    assert str(file_in(tmp_path, 20)) in told[0].why


def test_there_may_be_none(tmp_path: Path) -> None:
    assert search(tmp_path / "not there", []).newest() is None
    assert search(tmp_path, []).newest() is None


def test_one_process_takes_the_newest_of_which_all_parts_are_whole(tmp_path: Path) -> None:
    write(tmp_path, 3, 10, 20)
    write(tmp_path, 3, 30, but=1)
    bad = file_in(folder_of(tmp_path, 2), 20)
    bad.write_bytes(bad.read_bytes()[:-1])
    told: list[SnapshotDropped] = []
    found = search(tmp_path, told).newest()
    assert found is not None
    assert found[1].step == 10
    assert [event.step for event in told] == [30, 20]
    assert "rank_00001" in told[0].why
    assert str(bad) in told[1].why


def test_if_none_can_be_used_that_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, 2, 10, 20, but=0)
    with pytest.raises(ValueError, match=r"none of the 2 snapshots.*accepted"):
        search(tmp_path, []).newest()


def test_a_part_says_whose_it_is_also_after_it_was_changed(tmp_path: Path) -> None:
    """What a part says of itself is under its checksum."""
    write(tmp_path, 2, 7)
    file = file_in(folder_of(tmp_path, 1), 7)
    file.write_bytes(file.read_bytes().replace(b'\\"rank\\":1', b'\\"rank\\":0'))
    assert snapshot_file.read_header(file).rank == 0
    with pytest.raises(DamagedFile, match="checksum"):
        snapshot_file.check(file)
