"""Snapshots on their way to disk: written by a thread beside the training."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from foreshock.guard.containers import copy_out
from foreshock.guard.events import SnapshotNotSaved, SnapshotSaved
from foreshock.guard.neighbor import Neighbor
from foreshock.guard.parts import SnapshotFolder
from foreshock.guard.snapshot_file import Content
from foreshock.guard.snapshots import Snapshot, checksum

SaveEvent = SnapshotSaved | SnapshotNotSaved


class Saver:
    """Writes snapshots to disk while training goes on.

    One snapshot is being written and one may wait; one that waits when the next comes is passed
    over, so that a disk that is too slow costs snapshots on disk, not memory and not time.

    With a neighbour, what is written is handed to it too, and what it writes is kept as a copy.
    All ranks then have the same snapshots saved in the same order: none waits when the next comes,
    and none is taken back. If the others do not answer, that is told of once, and no copies are
    made from then on.

    Args:
        folder: where to.
        depth: files kept.
    Cost:
        One thread, two reads of the snapshot and one write to disk each; with a neighbour one more
        read, a second write, and what is sent. The training loop waits for none of it.
    """

    def __init__(self, folder: SnapshotFolder, depth: int) -> None:
        self._folder = folder
        self._depth = depth
        self.neighbor: Neighbor | None = None
        """Whose copy this rank keeps, and who keeps that of this one."""
        self.removes_before: int | None = None
        """Older ones than of this step are removed when there are too many; None: any."""
        self.saved_step = -1
        """Of the snapshot that was written last."""
        self._jobs: deque[Snapshot | int] = deque()
        """Snapshots to be written, and steps after which they are to be removed."""
        self._is_closing = False
        self._is_busy = False
        self._events: list[SaveEvent] = []
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def save(self, snapshot: Snapshot) -> None:
        """Has a snapshot written that is known to be good."""
        with self._changed:
            for waiting in self._withdrawn(after=-1):
                why = "the one after it came before the disk was ready"
                self._events.append(SnapshotNotSaved(waiting.step, why))
            snapshot.is_being_saved = True
            self._add(snapshot)

    def forget_after(self, step: int) -> None:
        """Has those of later steps removed."""
        with self._changed:
            if self.neighbor is None:
                self._withdrawn(after=step)
            self._add(step)

    def events(self) -> list[SaveEvent]:
        """What has happened since this was asked last."""
        with self._changed:
            events, self._events = self._events, []
            return events

    def close(self, timeout_s: float | None = None) -> bool:
        """Waits until all is written, no longer than so long; whether it is."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout_s)
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> None:
        """Waits until nothing is left to be written."""
        with self._changed:
            self._changed.wait_for(lambda: not self.is_at_work)

    @property
    def is_at_work(self) -> bool:
        """Whether something is left to be written or removed."""
        with self._changed:
            return bool(self._jobs) or self._is_busy

    def _withdrawn(self, after: int) -> list[Snapshot]:
        """Takes back the snapshots of later steps that wait."""
        waiting = [job for job in self._jobs if isinstance(job, Snapshot) and job.step > after]
        for snapshot in waiting:
            snapshot.is_being_saved = False
            self._jobs.remove(snapshot)
        return waiting

    def _add(self, job: Snapshot | int) -> None:
        self._jobs.append(job)
        if self._thread is None:
            # A daemon: a disk that hangs must not keep the process from ending.
            self._thread = threading.Thread(
                target=self._run, name="foreshock-snapshot-saver", daemon=True
            )
            self._thread.start()
        self._changed.notify_all()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            self._folder.clear_leftovers()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._is_closing)
                if not self._jobs:
                    return
                job = self._jobs.popleft()
                self._is_busy = True
            events = list(self._work(job))
            with self._changed:
                self._is_busy = False
                self._events += events
                if isinstance(job, Snapshot):
                    job.is_being_saved = False
                self._changed.notify_all()

    def _work(self, job: Snapshot | int) -> Iterator[SaveEvent]:
        step = job.step if isinstance(job, Snapshot) else -1
        try:
            if isinstance(job, Snapshot):
                yield from self._write(job)
            else:
                self._folder.forget_after(job)
        except Exception as error:  # a full disk, and whatever else: training goes on
            yield SnapshotNotSaved(step, f"{type(error).__name__}: {error}")

    def _write(self, snapshot: Snapshot) -> Iterator[SaveEvent]:
        pages: list[memoryview] = []
        step, path = snapshot.step, self._folder.file(snapshot.step)
        size = 0
        try:
            if checksum(snapshot.saved) != snapshot.checksum:
                yield SnapshotNotSaved(step, "its checksum no longer fits")
            else:
                pages = self._folder.pages_of(content_of(snapshot))
                size = self._folder.write(step, pages)
        except Exception as error:
            yield SnapshotNotSaved(step, f"{type(error).__name__}: {error}")
        # Whatever has become of it here: the others wait for it.
        if self.neighbor is not None:
            yield from self._exchange(self.neighbor, step, pages)
        if size:
            self.saved_step = step
            self._folder.keep(self._depth, self.removes_before)
            yield SnapshotSaved(step, str(path), size)

    def _exchange(
        self, neighbor: Neighbor, step: int, pages: Sequence[memoryview]
    ) -> Iterator[SaveEvent]:
        copy = self._folder.incoming_copy(step)
        try:
            if neighbor.hand_on(step, pages, copy.take, by=1):
                copy.finish()
        except OSError as error:
            yield SnapshotNotSaved(step, f"the copy of the rank before: {error}")
        except Exception as error:
            copy.drop()
            self.neighbor = None
            yield SnapshotNotSaved(step, f"no more copies of the rank before are kept: {error}")


def content_of(snapshot: Snapshot) -> Content:
    """What is written of a snapshot."""
    tree = {"saved": snapshot.saved, "place": snapshot.place}
    return Content(snapshot.step, tree, chunks=snapshot.chunks)


def snapshot_in(content: Content) -> Snapshot:
    """The snapshot that was written.

    Raises:
        KeyError, TypeError: there is none in it.
    """
    saved: dict[str, Any] = dict(content.tree["saved"])
    return Snapshot(content.step, saved, place=copy_out(content.tree["place"]))
