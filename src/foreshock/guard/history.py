"""The way back: copies of the state, and the batches that came after each of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from foreshock.guard.configuration import Guard
from foreshock.guard.events import SnapshotDropped
from foreshock.guard.replay import BatchSource
from foreshock.guard.snapshots import Snapshot, SnapshotRing
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

_GRADIENTS = "gradients"
RESERVED_NAMES = (
    "parameters",
    "buffers",
    _GRADIENTS,
    "optimizer",
    "random",
    "data",
    "spikes",
    "spectral",
    "noise",
    "surprise",
)
"""Names that no registered state may have."""


class History:
    """Snapshots of a run, and what is needed to run on from one of them.

    A loop over batches is opened and closed. A snapshot of the open loop is returned to with its
    batches; of one from before, or outside any loop, only the state is put back.

    Args:
        model, optimizer, state: what belongs to the state of the run.
        guard: how many snapshots, how often; none are taken but in recover mode.
        dropped: told of each snapshot that is found unfit.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        state: Mapping[str, Stateful],
        guard: Guard,
        dropped: Callable[[SnapshotDropped], None],
    ) -> None:
        parameters = named_parameters(model, optimizer)
        self._gradients = GradientState(parameters)
        parts: dict[str, Part] = {
            "parameters": NamedTensors(lambda: named_parameters(model, optimizer)),
            "buffers": NamedTensors(lambda: dict(model.named_buffers())),
            _GRADIENTS: self._gradients,
            "optimizer": OptimizerState(optimizer),
            "random": RandomState(),
            **{name: make_part(owner) for name, owner in state.items()},
        }
        self.ring = SnapshotRing(parts, guard.depth, guard.clean_steps, dropped)
        self._guard = guard
        self._places: dict[int, Any] = {}  # of the open loop's batches, by snapshots' steps
        self._returning_to: Snapshot | None = None
        self.has_start = False
        """Whether the first snapshot, of the run or of the open loop, has been tried."""
        self.is_requested = False
        """Whether a snapshot is to be taken after the next clean step, interval or not."""
        self.source: BatchSource | None = None
        """Where the batches of the open loop come from."""

    def open(self, source: BatchSource) -> None:
        """A loop begins; one that was still open is at an end."""
        self.close()
        self.source = source
        self.has_start = False

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
            if self.ring.take(step) is not None and self.source is not None:
                self._places[step] = self.source.capture()
        self._forget_old_batches()

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
        self.ring.restore(snapshot, without=frozenset({_GRADIENTS}))
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
        self.ring.restore(snapshot)
        self.source.restore(self._places[snapshot.step])
        return snapshot.step
