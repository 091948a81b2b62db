"""The way back of many ranks, each with its own part of the state: all go the same way."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from foreshock.guard.configuration import Guard
from foreshock.guard.consensus import AT_WORK, STOPPED, Consensus
from foreshock.guard.events import Event, SnapshotDropped
from foreshock.guard.finding import NO_STEP, newest_of_all
from foreshock.guard.history import History
from foreshock.guard.neighbor import Neighbor
from foreshock.guard.persistence import Saver
from foreshock.guard.snapshots import Snapshot
from foreshock.guard.state import Stateful


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
            model,
            optimizer,
            state,
            guard,
            self._tell,
            run,
            only_trainable=only_trainable,
            ranks=ranks,
        )
        self._tell_of = told
        self._sharded = [m for m in model.modules() if hasattr(m, "reshard")]
        self._has_lost = self._is_agreeing = False
        self._given: int | None = None
        self._are_all_ready = True
        self.last_tried = NO_STEP
        """The last step of which a snapshot was taken, or would have been."""
        if self._saver is not None:
            self._saver.removes_before = NO_STEP

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
        self._are_all_ready = False
        super()._save(saver, snapshot)

    def return_to(self, snapshot: Snapshot, fetched_since: int = 0) -> None:
        super().return_to(snapshot, fetched_since)
        self._given = None
        if self._saver is not None:
            self._saver.removes_before = NO_STEP

    def keep_copies(self, neighbor: Neighbor) -> None:
        """Has what each rank saves handed on to the next."""
        self._neighbor = neighbor
        if self._saver is not None:
            self._saver.neighbor = neighbor

    @property
    def _may_save(self) -> bool:
        # Or one might wait for a snapshot that another rank has passed over.
        return self._neighbor is None or self._are_all_ready

    @property
    def unsaved(self) -> float:
        """What this rank adds to `Share.unsaved`."""
        saver = self._saver
        if saver is None:
            return 1.0
        is_unsaved = self._given is None or saver.saved_step != self._given
        if self._neighbor is None:
            return float(is_unsaved)
        return is_unsaved + AT_WORK * saver.is_at_work + STOPPED * (saver.neighbor is None)

    def note_all_ready(self, *, are_copied: bool) -> None:
        """No rank is at work; the next snapshot may be saved, with copies or without."""
        self._are_all_ready = True
        if self._saver is not None and not are_copied:
            self._saver.neighbor = None

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
        bound = steps[-1] if steps else NO_STEP
        while (step := newest_of_all(self._ranks, steps, bound)) != NO_STEP:
            complete.append(step)
            bound = step - 1
        self._is_agreeing = True
        self.ring.keep_only(complete, "a rank has lost its part of it")
        self._is_agreeing = self._has_lost = False

    def find_good(self, step: int) -> Snapshot | None:
        bound = step - self._guard.min_depth
        while True:
            mine = self.ring.newest_good(bound)
            low, high = self._ranks.bounds(NO_STEP if mine is None else mine.step)
            if low == high:
                return mine
            bound = low
