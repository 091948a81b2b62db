"""The way back: copies of the state, and the batches that came after each of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from foreshock.distributed_part import local_part
from foreshock.guard import snapshot_file
from foreshock.guard.configuration import Guard
from foreshock.guard.containers import copy_out
from foreshock.guard.events import Event
from foreshock.guard.finding import Alone, Ranks, Search
from foreshock.guard.neighbor import Neighbor
from foreshock.guard.parts import SnapshotFolder, all_steps_in
from foreshock.guard.persistence import Saver, snapshot_in
from foreshock.guard.replay import BatchSource
from foreshock.guard.resharding import Layout, with_names_of
from foreshock.guard.snapshots import Snapshot, SnapshotRing, Standing
from foreshock.guard.state import (
    GradientState,
    NamedTensors,
    OptimizerState,
    Part,
    RandomState,
    Stateful,
    make_part,
    named_parameters,
)

_log = logging.getLogger("foreshock")

_CLOSE_TIMEOUT_S = 60.0
_GRADIENTS = "gradients"
_RUN = "run"
"""What only another process takes over; a rollback that restored it would never be counted."""
_SIGNALS = ("spikes", "spectral", "noise", "surprise", "logits", "gates", "gate_schedule")
RESERVED_NAMES = (
    "parameters",
    "buffers",
    _GRADIENTS,
    "optimizer",
    "random",
    "data",
    _RUN,
    *_SIGNALS,
)
"""Names that no registered state may have."""


class History:
    """Snapshots of a run, and what is needed to run on from one of them.

    A loop over batches is opened and closed. A snapshot of the open loop is returned to with its
    batches; of one from before, or outside any loop, only the state is put back.

    Args:
        model, optimizer, state: what belongs to the state of the run.
        guard: how many snapshots, how often; none are taken but in recover mode.
        told: of each snapshot that is found unfit, is saved to disk, or cannot be.
        run: what belongs to the run, but not to its state: counts of rollbacks, and the like.
        only_trainable: whether parameters that require no gradient are left out of snapshots.
        ranks: that have the other parts of the snapshots.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        state: Mapping[str, Stateful],
        guard: Guard,
        told: Callable[[Event], None],
        run: Mapping[str, Stateful] | None = None,
        *,
        only_trainable: bool = False,
        ranks: Ranks | None = None,
    ) -> None:
        self._ranks = ranks or Alone()
        parameters = named_parameters(model, optimizer)
        self._gradients = GradientState(parameters)
        parts: dict[str, Part] = {
            "parameters": NamedTensors(
                lambda: named_parameters(model, optimizer, only_trainable=only_trainable)
            ),
            "buffers": NamedTensors(lambda: dict(model.named_buffers())),
            _GRADIENTS: self._gradients,
            "optimizer": OptimizerState(optimizer),
            "random": RandomState(),
            **{name: make_part(owner) for name, owner in state.items()},
            _RUN: _Several(run or {}),
        }
        self._parts = parts
        self._guard = guard
        self._told = told
        self._folder = (
            None
            if guard.persist_dir is None
            else SnapshotFolder(guard.persist_dir, self._ranks.rank, self._ranks.size)
        )
        self.ring = SnapshotRing(
            parts, guard.depth, guard.clean_steps, told, notes_chunks=self._folder is not None
        )
        self._saver = None if self._folder is None else Saver(self._folder, guard.depth)
        self._neighbor: Neighbor | None = None
        """Who has a copy of what this rank saves."""
        self._may_write = False
        self._resumed: Snapshot | None = None
        """From another process, while the loop that it was taken in is not open yet."""
        self._loops = 0
        self._places: dict[int, Any] = {}  # of the open loop's batches, by snapshots' steps
        self._returning_to: Snapshot | None = None
        self.has_start = False
        """Whether the first snapshot, of the run or of the open loop, has been tried."""
        self.is_requested = False
        """Whether a snapshot is to be taken after the next clean step, interval or not."""
        self.source: BatchSource | None = None
        """Where the batches of the open loop come from."""

    def open(self, source: BatchSource) -> bool:
        """A loop begins; one that was still open is at an end.

        Returns:
            False for one that an earlier process has run to its end.
        """
        self.close()
        self._loops += 1
        if self._resumed is not None and self._is_over(self._resumed.place):
            return False
        self.source = source
        self.has_start = False
        resumed, self._resumed = self._resumed, None
        if resumed is not None and self._loops == resumed.place["loop"]:
            source.resume(resumed.place["source"])
            self.ring.restore(resumed)  # once more: random numbers may have been drawn since
            self._places[resumed.step] = source.capture()
            self.has_start = True
        return True

    def _is_over(self, place: Mapping[str, Any]) -> bool:
        """Whether the loop that has just begun was at its end when a snapshot was taken."""
        loop: int = place["loop"]
        return self._loops < loop or (self._loops == loop and place["source"] is None)

    def close(self) -> int | None:
        """The loop has ended.

        Returns:
            The step that the state belongs to now if a rollback was still to be followed by a
            rewind, else None.
        """
        returning_to, self._returning_to = self._returning_to, None
        self.source = None
        self._places.clear()
        return None if returning_to is None else returning_to.step

    def take_if_due(self, step: int, *, is_within_accumulation: bool = False) -> None:
        """Takes a snapshot between two steps: at the start, at the interval, and at request.

        Args:
            step: the one that is about to be run.
            is_within_accumulation: gradients have been computed since the last update, and the next
                step adds to them.
        Cost:
            Nothing, or that of `SnapshotRing.take`.
        """
        if self._guard.mode != "recover":
            return
        at_interval = step % self._guard.snapshot_interval == 0
        is_due = not self.has_start or at_interval or self.is_requested
        is_enough = self.source is None or step in self._places
        has_it = is_enough and any(kept.step == step for kept in self.ring.entries)
        if is_due and not has_it and self.ring.has_room:
            self.has_start = True
            self.is_requested = False
            self._gradients.carries_values = is_within_accumulation
            self._claim_folder()
            self._take(step)
        self._forget_old_batches()

    def _take(self, step: int) -> None:
        snapshot = self.ring.take(step)
        if snapshot is not None:
            self._note_place(snapshot)

    def _note_place(self, snapshot: Snapshot) -> None:
        source = self.source
        if source is not None:
            self._places[snapshot.step] = source.capture()
        if self._saver is not None:
            place = None if source is None else source.place_elsewhere()
            snapshot.place = {"loop": self._loops, "source": place}

    def note_clean_step(self, step: int) -> None:
        """A step was run and nothing was wrong with it; has the newest proven snapshot saved."""
        self.ring.note_clean_step(step)
        if self._saver is None:
            return
        self._tell_of_saving()
        good = [kept for kept in self.ring.entries if kept.standing is Standing.KNOWN_GOOD]
        # Not before a step has been run from it: only then it is known where an epoch ends.
        is_new = good and good[-1].clean_steps and not good[-1].was_given_to_saver
        if is_new and self._may_save:
            good[-1].was_given_to_saver = True
            self._save(self._saver, good[-1])

    @property
    def _may_save(self) -> bool:
        return True

    def _save(self, saver: Saver, snapshot: Snapshot) -> None:
        saver.save(snapshot)

    def _tell_of_saving(self) -> None:
        for event in () if self._saver is None else self._saver.events():
            self._told(event)

    def _claim_folder(self) -> None:
        """Not to mix up two runs, of which the older may have the higher steps."""
        if self._folder is None or self._may_write:
            return
        steps = all_steps_in(self._folder.root)
        if steps:
            raise FileExistsError(
                f"persist_dir is {str(self._folder.root)!r}, which has an earlier run's snapshots, "
                f"up to step {steps[-1]}; accepted: an empty directory, or Monitor.resume() first"
            )
        self._may_write = True

    def hold_back_update(self) -> None:
        """An update is about to be made."""
        self.ring.hold_back_update()

    def finish(self) -> None:
        """The run is at its end: waits until the last snapshot is on disk."""
        self.ring.close()
        if self._saver is not None and not self._saver.close(_CLOSE_TIMEOUT_S):
            _log.warning("a snapshot is still being written to %s", self._guard.persist_dir)
        self._tell_of_saving()

    # ---- another process

    def find_saved(self, where: Path) -> tuple[Path, Snapshot] | None:
        """The newest snapshot that can be used, and where; None if there is none at all.

        Args:
            where: a directory of snapshots, or one process's file.
        Raises:
            ValueError: there are snapshots, and none of them can be used; see `Search`.
            DamagedFile, OSError: the file that was asked for cannot be used.
        """
        if not where.is_file():
            search = Search(where, self._ranks, Layout(self._parts), self._told, self._neighbor)
            return search.newest()
        content = snapshot_file.read(where)
        if self._ranks.size > 1 or content.ranks not in (None, 1):
            raise ValueError(
                f"path is {str(where)!r}, one part of {content.ranks or 1}, for {self._ranks.size} "
                "ranks; accepted: the directory that has all parts"
            )
        return where, snapshot_in(content)

    def resume(self, snapshot: Snapshot, path: Path) -> None:
        """Makes the state what it was when another process took a snapshot.

        Args:
            snapshot: known to be good there.
            path: where it was found.
        Raises:
            ValueError: it is of another model, optimizer or state.
        """
        self._refuse_other_state(snapshot.saved)
        named = {**self._parts["parameters"].live(), **self._parts["buffers"].live()}
        snapshot.saved = with_names_of(named, snapshot.saved)
        self._refuse_other_run(snapshot.saved)
        for name in _SIGNALS:
            self._try_signal(name, snapshot)
        self.ring.adopt(snapshot)
        self.ring.restore(snapshot)
        self._resumed = None if snapshot.place is None else snapshot
        self.has_start = True
        if self._folder is not None and self._folder.has(path):
            self._folder.set_aside_after(snapshot.step)
            self._may_write = True
            snapshot.was_given_to_saver = True

    def _try_signal(self, name: str, snapshot: Snapshot) -> None:
        if name not in self._parts or name not in snapshot.saved:
            return
        try:
            self._parts[name].restore(snapshot.saved[name])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            _log.warning("%s begins anew: other settings than in the snapshot (%s)", name, error)
            # So that a rollback begins anew too, and what it has yet to learn may be NaN.
            snapshot.saved[name] = copy_out(self._parts[name].live())

    def _refuse_other_state(self, saved: Mapping[str, Any]) -> None:
        here, there = (set(parts) - {*_SIGNALS, _RUN} for parts in (self._parts, saved))
        if here != there:
            raise ValueError(
                f"state is not that of the snapshot: missing here {sorted(there - here)}, missing "
                f"there {sorted(here - there)}; accepted: the same names"
            )

    def _refuse_other_run(self, saved: Mapping[str, Any]) -> None:
        for part in ("parameters", "buffers"):
            _refuse_other_tensors(part, self._parts[part].live(), saved[part])
        live = self._parts["optimizer"].live()
        sizes = [(len(s["groups"]), len(s["state"])) for s in (live, saved["optimizer"])]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"optimizer has {sizes[0][0]} groups of {sizes[0][1]} parameters, the snapshot's "
                f"{sizes[1][0]} of {sizes[1][1]}; accepted: the same"
            )

    def _forget_old_batches(self) -> None:
        if self.source is None:
            return
        steps = {kept.step for kept in self.ring.entries}
        self._places = {step: place for step, place in self._places.items() if step in steps}
        indices = [place["index"] for place in self._places.values()]
        self.source.forget_before(min(indices, default=self.source.index))

    def find_good(self, step: int) -> Snapshot | None:
        """The snapshot that a rollback at this step would return to.

        Cost: one read of the snapshot, for its checksum.
        """
        return self.ring.newest_good(step - self._guard.min_depth)

    def return_to(self, snapshot: Snapshot, fetched_since: int = 0) -> None:
        """Puts the state back at once, and sees to it that `rewind` goes back too.

        Gradients are left alone until then: the training loop may still look at them.

        Args:
            snapshot: of this run.
            fetched_since: batches that were fetched after that of the failing step.
        """
        self.ring.restore(snapshot, without=frozenset({_GRADIENTS, _RUN}))
        if self._saver is not None:
            self._saver.forget_after(snapshot.step)
        if self.source is not None and snapshot.step in self._places:
            # The index of the batch fetched last is one behind; to be left out from now on.
            failing = self.source.index - 1 - fetched_since
            self.source.leave_out(failing, self._guard.skip_batches)
            self._returning_to = snapshot

    @property
    def is_returning(self) -> bool:
        """Whether the loop is to be rewound before its next step."""
        return self._returning_to is not None

    def rewind(self) -> int | None:
        """Between two steps of a loop: goes back to where a rollback has returned to.

        The state is put back once more, since the training loop has gone on with it: schedulers
        have stepped, averages been updated, random numbers drawn.

        Returns:
            The step to go on from; None if nothing was rolled back.
        """
        snapshot, self._returning_to = self._returning_to, None
        if snapshot is None or self.source is None:
            return None
        self.ring.restore(snapshot, without=frozenset({_RUN}))
        self.source.restore(self._places[snapshot.step])
        return snapshot.step


class _Several:
    """What several owners save and load themselves."""

    def __init__(self, owners: Mapping[str, Stateful]) -> None:
        self._owners = owners

    def live(self) -> Any:
        return {name: owner.state_dict() for name, owner in self._owners.items()}

    def restore(self, saved: Any) -> None:
        for name, owner in self._owners.items():
            owner.load_state_dict(saved[name])


def _refuse_other_tensors(
    part: str, here: Mapping[str, torch.Tensor], there: Mapping[str, torch.Tensor]
) -> None:
    for name in {**here, **there}:
        shapes = [tuple(local_part(x[name]).shape) if name in x else None for x in (here, there)]
        # A buffer may have grown.
        if None in shapes or (part == "parameters" and shapes[0] != shapes[1]):
            said = ["is missing" if s is None else f"has shape {s}" for s in shapes]
            raise ValueError(
                f"model is not that of the snapshot: of its {part} {name!r} {said[0]} here and "
                f"{said[1]} there; accepted: the same model"
            )
