"""Which snapshot on disk a run is taken up from: the newest that all ranks can use."""

from __future__ import annotations

import enum
import mmap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from foreshock.guard import snapshot_file
from foreshock.guard.events import SnapshotDropped
from foreshock.guard.neighbor import Neighbor
from foreshock.guard.parts import (
    Parts,
    SnapshotFolder,
    all_steps_in,
    copies_of,
    file_in,
    find_parts,
    folder_of,
)
from foreshock.guard.persistence import snapshot_in
from foreshock.guard.resharding import Layout, assemble
from foreshock.guard.snapshot_file import Content, DamagedFile, Header
from foreshock.guard.snapshots import Snapshot

NO_STEP = -1


class _Standing(enum.IntEnum):
    """What a rank has of a snapshot, what is worst for all ranks first."""

    DAMAGED = 0
    """A part that it cannot read."""
    OTHER = 1
    """The part of another number of ranks, or one that was split in another way."""
    NONE = 2
    OWN = 3
    """A part that it can take as it is."""


Found = tuple[Path, Content]


class Ranks(Protocol):
    """What those who look for a snapshot together have to know of each other."""

    rank: int
    size: int

    def bounds(self, value: int) -> tuple[int, int]:
        """The smallest and the largest of the ranks' numbers."""
        ...


class Alone:
    """One rank."""

    rank, size = 0, 1

    def bounds(self, value: int) -> tuple[int, int]:
        """Twice the number."""
        return value, value


def newest_of_all(ranks: Ranks, steps: Sequence[int], bound: int) -> int:
    """The newest step up to this one that every rank has among its own; -1: there is none."""
    while True:
        mine = max((step for step in steps if step <= bound), default=NO_STEP)
        low, high = ranks.bounds(mine)
        if low == high:
            return low
        bound = low


class Search:
    """For the newest snapshot whose parts are all there and unchanged.

    If it was taken by as many ranks, split in the same way, each reads and checks its own part, and
    needs to see no other. Else each makes its own from the parts of all, which must be in a
    directory that all of them see; the parts are checked by the ranks in turn.

    No rank decides by itself: all go through the same snapshots at the same time.

    Args:
        where: a directory of snapshots.
        ranks: that look.
        layout: of what belongs on this one.
        told: of each snapshot that cannot be used, by one of those who know why.
        neighbor: who may have a copy of the part of this rank; it is read without, where it is in a
            directory that is seen from here.
    """

    def __init__(
        self,
        where: Path,
        ranks: Ranks,
        layout: Layout,
        told: Callable[[SnapshotDropped], None],
        neighbor: Neighbor | None = None,
    ) -> None:
        self._where = where
        self._ranks = ranks
        self._layout = layout
        self._told = told
        self._neighbor = neighbor
        self._own = SnapshotFolder(where, ranks.rank, ranks.size)

    def newest(self) -> tuple[Path, Snapshot] | None:
        """Its file, and what belongs here; None if there are no snapshots at all.

        Raises:
            ValueError: none of those that there are can be used; or one can, but not with this
                model and state.
        """
        steps = self._steps()
        bound = max(steps, default=NO_STEP)
        while (step := self._ranks.bounds(bound)[1]) != NO_STEP:
            found = self._find(step)
            if found is not None:
                return found[0], snapshot_in(found[1])
            bound = max((other for other in steps if other < step), default=NO_STEP)
        most = self._ranks.bounds(len(steps))[1]
        if most:
            raise ValueError(
                f"none of the {most} snapshots in {str(self._where)!r} can be used; accepted: "
                "one of which all parts are there and unchanged"
            )
        return None

    def _steps(self) -> list[int]:
        try:
            return all_steps_in(self._where)
        except OSError as error:
            self._tell(NO_STEP, f"{self._where}: {error}")
            return []

    def _find(self, step: int) -> Found | None:
        standing, found = self._part_in(self._own.file(step), step)
        worst = self._ranks.bounds(standing)[0]
        if worst in (_Standing.DAMAGED, _Standing.NONE):
            found = self._fetched(step, found or self._copy(step))
        is_of_others = worst == _Standing.OTHER
        if is_of_others or (worst == _Standing.NONE and not self._are_all(found is not None)):
            found = self._assemble(step)
        return found if self._are_all(found is not None) else None

    def _are_all(self, is_so: bool) -> bool:
        return self._ranks.bounds(int(is_so))[0] == 1

    def _part_in(self, file: Path, step: int) -> tuple[_Standing, Found | None]:
        """What a file has for this rank, and how that stands."""
        if not file.exists():
            return _Standing.NONE, None
        try:
            header = snapshot_file.read_header(file)
            if not self._is_own(header) or not self._layout.is_that_of(header):
                return _Standing.OTHER, None
            return _Standing.OWN, (file, snapshot_file.read(file))
        except (DamagedFile, OSError) as error:
            self._tell(step, f"{file}: {error}")
            return _Standing.DAMAGED, None

    def _is_own(self, header: Header) -> bool:
        rank, size = self._ranks.rank, self._ranks.size
        if header.ranks is None:  # it does not say
            one_more = file_in(folder_of(self._where, size), header.step)
            return size == 1 or not one_more.exists()
        return (header.rank, header.ranks) == (rank, size)

    def _copy(self, step: int) -> Found | None:
        """This rank's part, of which the next one has a copy that is seen from here."""
        rank, size = self._ranks.rank, self._ranks.size
        return self._part_in(file_in(copies_of(self._where, rank, size), step), step)[1]

    def _fetched(self, step: int, found: Found | None) -> Found | None:
        """What is found already, or else a copy from the next rank; all ask at the same place."""
        if self._neighbor is None:
            return found
        asked = bytearray()
        asking = [memoryview(b"?")] if found is None else []
        self._neighbor.hand_on(step, asking, asked.extend, by=1)
        incoming = self._own.incoming(step)
        pages = self._pages_for_the_one_before(step) if asked else []
        if not self._neighbor.hand_on(step, pages, incoming.take, by=-1):
            return found
        try:
            incoming.finish()
        except OSError as error:
            self._tell(step, f"{self._own.file(step)}: {error}")
            return None
        return self._part_in(self._own.file(step), step)[1]

    def _pages_for_the_one_before(self, step: int) -> list[memoryview]:
        """The copy of its part; none if there is none, or it is not what was written."""
        size = self._ranks.size
        before = (self._ranks.rank - 1) % size
        file = file_in(copies_of(self._where, before, size), step)
        try:
            header = snapshot_file.read_header(file)
            snapshot_file.check(file)
            with file.open("rb") as opened:
                pages = memoryview(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ))
        except FileNotFoundError:
            return []
        except (DamagedFile, OSError) as error:
            self._tell(step, f"{file}: {error}")
            return []
        return [pages] if (header.rank, header.ranks) == (before, size) else []

    def _assemble(self, step: int) -> Found | None:
        parts: Parts | None = None
        try:
            parts = find_parts(self._where, step)
        except (DamagedFile, OSError) as error:
            if self._ranks.rank == 0:  # it is the same that all of them see
                self._tell(step, str(error))
        if not self._are_all(parts is not None) or parts is None:
            return None
        is_whole = self._has_checked(parts)
        if not self._are_all(is_whole):
            return None
        found: Found | None = None
        refused: Exception | None = None
        try:
            found = assemble(parts, self._ranks.rank, self._layout)
        except (DamagedFile, OSError) as error:
            self._tell(step, str(error))
        except Exception as error:  # raised below, when the others have heard that it happened
            refused = error
        if not self._are_all(refused is None):
            raise refused or ValueError(
                f"the snapshot of step {step} cannot be taken up by another rank, which says why"
            )
        return found

    def _has_checked(self, parts: Parts) -> bool:
        try:
            parts.check(range(self._ranks.rank, parts.ranks, self._ranks.size))
        except DamagedFile as error:
            self._tell(parts.step, str(error))
            return False
        return True

    def _tell(self, step: int, why: str) -> None:
        self._told(SnapshotDropped(step, why))
