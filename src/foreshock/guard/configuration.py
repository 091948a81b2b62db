"""What the guard may do, and when."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from foreshock.settings import Settings


class Guard(Settings):
    """What is done about a bad step.

    >>> Guard(mode="recover", snapshot_interval=50)
    """

    mode: Literal["observe", "skip", "recover"] = "observe"
    """observe: log what would be done, touch nothing. skip: withhold bad updates. recover: withhold
    them, and roll back when the state itself is bad."""
    snapshot_interval: PositiveInt = 100
    """Steps between snapshots."""
    depth: PositiveInt = 3
    """Snapshots kept; each is a full copy of model, optimizer and registered state in memory. There
    is one more while the newest is not proven, and one more while one that is no longer kept is
    being written to disk."""
    persist_dir: Path | None = None
    """Directory, of this run alone, to which snapshots that are known to be good are written, the
    newest `depth` of them; see `Monitor.resume`. None: they are kept in memory only."""
    neighbor_copies: bool = False
    """Whether each rank also keeps a copy of the parts that the rank before it writes, for where
    `persist_dir` is on a disk of each machine: what one rank has lost is fetched from the next.
    Each snapshot is sent and written once more. Nothing where one process trains."""
    clean_steps: NonNegativeInt = 2
    """Clean steps, each with an update, that must follow a snapshot before it may be restored."""
    min_depth: NonNegativeInt = 0
    """Steps that a snapshot must be old to be restored."""
    check_interval: PositiveInt = 1
    """Steps between scans of the parameters; gradients are scanned at every step."""
    verify_state: bool = False
    """Whether parameters and optimizer state are summed up after each update and before the next: a
    bit that has flipped in between, however finite the outcome, is a bad state. Costs two reads of
    both a step. Not for loops that change parameters outside of `optimizer.step`."""
    replica_interval: NonNegativeInt = 100
    """Steps between comparisons of the parameters that several ranks hold copies of, and of their
    state in an optimizer of torch's own; a snapshot is always followed by one. 0: none. Costs a
    read of them, and nothing where one process trains."""
    straggler_ratio: PositiveFloat = 1.5
    """A rank is told of that takes so many times as long as the others for its own work, in three
    measured steps in a row; one step of ten is measured. `inf`: none is."""
    violation_threshold: PositiveFloat = 1e6
    """A finite loss over this is a violation: the state counts as bad."""
    spike_window: int = Field(default=128, ge=2)
    """Losses and gradient norms that the next one is held against."""
    spike_min_count: int = Field(default=32, ge=2)
    """How many of them there must be."""
    spike_z: PositiveFloat = 8.0
    """Standard deviations above their mean at which a loss is a spike; `inf`: never."""
    spike_grad_z: PositiveFloat = 32.0
    """Likewise of a gradient norm, which has spikes of its own on healthy runs (docs/drill.md)."""
    spike_warmup_ratio: float = Field(default=10.0, gt=1)
    """Until there are as many, a value so many times the largest one before is."""
    spike_response: Literal["log", "skip"] = "log"
    """log: record a spike. skip: withhold the update, as for a loss that is not finite."""
    max_consecutive_skips: PositiveInt = 3
    """The last of so many bad updates in a row is a sign of a bad state: recover mode rolls back,
    skip mode, which cannot, tells training to stop."""
    max_rollbacks: NonNegativeInt = 3
    """Rollbacks allowed within `rollback_window`, and before a failing step has been passed; one
    more aborts the run."""
    rollback_window: PositiveInt = 200
    """Steps, as they were run, over which rollbacks are counted."""
    lr_backoff: float = Field(default=0.5, gt=0, le=1)
    """Factor on the learning rate after a rollback; 1 leaves it alone."""
    lr_recovery_steps: NonNegativeInt = 100
    """Steps over which that factor returns to 1, linearly."""
    skip_batches: NonNegativeInt = 0
    """Batches left out from the failing one on when steps are run again after a rollback."""

    @model_validator(mode="after")
    def _only_recover_mode_takes_snapshots(self) -> Guard:
        if self.persist_dir is not None and self.mode != "recover":
            raise ValueError(
                f"persist_dir is {str(self.persist_dir)!r} with mode={self.mode!r}, which takes no "
                "snapshots; accepted: with mode='recover'"
            )
        return self

    @model_validator(mode="after")
    def _copies_are_of_files(self) -> Guard:
        if self.neighbor_copies and self.persist_dir is None:
            raise ValueError(
                "neighbor_copies is True without persist_dir, where the copies would be; accepted: "
                "with persist_dir"
            )
        return self

    @model_validator(mode="after")
    def _a_snapshot_must_outlive_a_check_of_the_state(self) -> Guard:
        if self.verify_state and self.mode == "recover" and self.clean_steps < 1:
            raise ValueError(
                "clean_steps is 0 with verify_state=True, which finds a change only in the step "
                "after a snapshot; accepted: 1 and more"
            )
        return self

    @model_validator(mode="after")
    def _window_must_hold_the_least_count(self) -> Guard:
        if self.spike_min_count > self.spike_window:
            raise ValueError(
                f"spike_min_count={self.spike_min_count} is more than "
                f"spike_window={self.spike_window}; accepted: at most as many"
            )
        return self
