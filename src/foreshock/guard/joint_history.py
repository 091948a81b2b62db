"""The way back of many ranks, each with its own part of the state: all go the same way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from foreshock.guard.configuration import Guard
from foreshock.guard.consensus import Consensus
from foreshock.guard.events import Event, SnapshotDropped
from foreshock.guard.history import History
from foreshock.guard.persistence import Saver, SnapshotFolder, find_newest
from foreshock.guard.snapshots import Snapshot
from foreshock.guard.state import Stateful

_NONE = -1


def folder_of(path: Path, rank: int) -> Path:
    """Where a rank keeps its parts of the snapshots."""
    return path / f"rank_{rank:05d}"


class JointHistory(History):
    """A `History` whose snapshots are in parts, one on each rank.

    A snapshot is taken, promoted and restored by all ranks at the same step. One of which a rank
    has lost its part is dropped by all.

    Args:
        model, optimizer, state, guard, told, run: as for `History`; of this rank.
        ranks: that have the other parts.
        only_trainable: as for `History`.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        state: Mapping[str, Stateful],
        guard: Guard,
        told: Callable[[Event], None],
        run: Mapping[str, Stateful],
        ranks: Consensus,
        *,
        only_trainable: bool = False,
    ) -> None:
        super().__init__(
            model, optimizer, state, guard, self._tell, run, only_trainable=only_trainable
        )
        self._ranks = ranks
        self._tell_of = told
        self._sharded = [m for m in model.modules() if hasattr(m, "reshard")]
        self._has_lost = self._is_agreeing = False
        self._given: int | None = None
        self.last_tried = _NONE
        """The last step of which a snapshot was taken, or would have been."""
        if self._saver is not None:
            self._saver.removes_before = _NONE

    def _tell(self, event: Event) -> None:
        if self._is_agreeing and self._ranks.rank:
            return  # the first rank says it for all
        if isinstance(event, SnapshotDropped):
            self._has_lost = True
        self._tell_of(event)

    def _take(self, step: int) -> None:
        self.last_tried = step
        for module in self._sharded:
            module.reshard()  # type: ignore[operator]  # an evaluation may have left it whole
        super()._take(step)

    def _save(self, saver: Saver, snapshot: Snapshot) -> None:
        self._given = snapshot.step
        super()._save(saver, snapshot)

    def return_to(self, snapshot: Snapshot, fetched_since: int = 0) -> None:
        super().return_to(snapshot, fetched_since)
        self._given = None
        if self._saver is not None:
            self._saver.removes_before = _NONE

    @property
    def has_unsaved(self) -> bool:
        """Whether this rank's part of what was to be written last is not on disk."""
        return self._saver is None or self._given is None or self._saver.saved_step != self._given

    def note_all_saved(self) -> None:
        """All parts of it are on disk; what is older may be removed."""
        if self._saver is not None and self._given is not None:
            self._saver.removes_before = self._given

    def has_lost(self) -> bool:
        """Whether this rank has lost its part of a snapshot since the ranks agreed on them.

        Cost: waits for copies that are under way.
        """
        self.ring.settle()
        return self._has_lost

    def drop_what_a_rank_lost(self) -> None:
        """Drops the snapshots that are not complete any more; all ranks do at the same place.

        Cost: two all_reduces or so a snapshot.
        """
        steps = sorted(kept.step for kept in self.ring.entries)
        complete = []
        bound = steps[-1] if steps else _NONE
        while (step := self._newest_of_all(steps, bound)) != _NONE:
            complete.append(step)
            bound = step - 1
        self._is_agreeing = True
        self.ring.keep_only(complete, "a rank has lost its part of it")
        self._is_agreeing = self._has_lost = False

    def find_good(self, step: int) -> Snapshot | None:
        bound = step - self._guard.min_depth
        while True:
            mine = self.ring.newest_good(bound)
            low, high = self._ranks.bounds(_NONE if mine is None else mine.step)
            if low == high:
                return mine
            bound = low

    def find_saved(self, where: Path) -> tuple[Path, Snapshot] | None:
        """The newest snapshot of which all ranks find their part, in a directory of each.

        Raises:
            ValueError: it was another number of ranks that has left them.
        """
        own = SnapshotFolder(folder_of(where, self._ranks.rank))
        steps = own.steps()
        self._refuse_other_ranks(where, has_some=bool(steps))
        bound = steps[-1] if steps else _NONE
        while (step := self._newest_of_all(steps, bound)) != _NONE:
            found = self._find_part(own.file(step))
            if self._ranks.bounds(0 if found is None else 1)[0]:
                return found
            bound = step - 1
        return None

    def _refuse_other_ranks(self, where: Path, *, has_some: bool) -> None:
        size = self._ranks.size
        low, high = self._ranks.bounds(int(has_some))
        are_all, _ = self._ranks.bounds(int(not folder_of(where, size).exists()))
        if low != high or not are_all:
            raise ValueError(
                f"the snapshots in {str(where)!r} are not those of {size} ranks; accepted: as many "
                "ranks as have taken them, each of which finds its own"
            )

    def _find_part(self, file: Path) -> tuple[Path, Snapshot] | None:
        try:
            return find_newest(file, self._told)
        except (ValueError, OSError) as error:
            step = int(file.stem.removeprefix("step_"))
            self._told(SnapshotDropped(step, f"{file}: {error}"))
            return None

    def _newest_of_all(self, steps: list[int], bound: int) -> int:
        """The newest step up to this one that every rank has among its own; -1: there is none."""
        while True:
            mine = max((step for step in steps if step <= bound), default=_NONE)
            low, high = self._ranks.bounds(mine)
            if low == high:
                return low
            bound = low
