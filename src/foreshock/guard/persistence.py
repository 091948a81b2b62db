"""Snapshots on their way to disk: written by a thread beside the training."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

from foreshock.guard.containers import copy_out
from foreshock.guard.events import SnapshotNotSaved, SnapshotSaved
from foreshock.guard.parts import SnapshotFolder
from foreshock.guard.snapshot_file import Content
from foreshock.guard.snapshots import Snapshot, checksum

SaveEvent = SnapshotSaved | SnapshotNotSaved


class Saver:
    """Writes snapshots to disk while training goes on.

    One snapshot is being written and one may wait; one that waits when the next comes is passed
    over, so that a disk that is too slow costs snapshots on disk, not memory and not time.

    Args:
        folder: where to.
        depth: files kept.
    Cost:
        One thread, two reads of the snapshot and one write to disk each. The training loop waits
        for none of it.
    """

    def __init__(self, folder: SnapshotFolder, depth: int) -> None:
        self._folder = folder
        self._depth = depth
        self.removes_before: int | None = None
        """Older ones than of this step are removed when there are too many; None: any."""
        self.saved_step = -1
        """Of the snapshot that was written last."""
        self._waiting: Snapshot | None = None
        self._forget_after: int | None = None
        self._is_closing = False
        self._is_busy = False
        self._events: list[SaveEvent] = []
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def save(self, snapshot: Snapshot) -> None:
        """Has a snapshot written that is known to be good."""
        with self._changed:
            if self._waiting is not None:
                self._waiting.is_being_saved = False
                why = "the one after it came before the disk was ready"
                self._events.append(SnapshotNotSaved(self._waiting.step, why))
            snapshot.is_being_saved = True
            self._waiting = snapshot
            self._start()
            self._changed.notify_all()

    def forget_after(self, step: int) -> None:
        """Has those of later steps removed."""
        with self._changed:
            if self._waiting is not None and self._waiting.step > step:
                self._waiting.is_being_saved = False
                self._waiting = None
            before = self._forget_after
            self._forget_after = step if before is None else min(step, before)
            self._start()
            self._changed.notify_all()

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
            self._changed.wait_for(lambda: not self._has_work() and not self._is_busy)

    def _has_work(self) -> bool:
        return self._waiting is not None or self._forget_after is not None

    def _start(self) -> None:
        if self._thread is None:
            # A daemon: a disk that hangs must not keep the process from ending.
            self._thread = threading.Thread(
                target=self._run, name="foreshock-snapshot-saver", daemon=True
            )
            self._thread.start()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            self._folder.clear_leftovers()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._has_work() or self._is_closing)
                if not self._has_work():
                    return
                snapshot, self._waiting = self._waiting, None
                forget_after, self._forget_after = self._forget_after, None
                self._is_busy = True
            event = self._work(snapshot, forget_after)
            with self._changed:
                self._is_busy = False
                if event is not None:
                    self._events.append(event)
                if snapshot is not None:
                    snapshot.is_being_saved = False
                self._changed.notify_all()

    def _work(self, snapshot: Snapshot | None, forget_after: int | None) -> SaveEvent | None:
        step = -1 if snapshot is None else snapshot.step
        try:
            if forget_after is not None:
                self._folder.forget_after(forget_after)
            if snapshot is None:
                return None
            if checksum(snapshot.saved) != snapshot.checksum:
                return SnapshotNotSaved(step, "its checksum no longer fits")
            size = self._folder.write(content_of(snapshot))
            self.saved_step = step
            self._folder.keep(self._depth, self.removes_before)
            return SnapshotSaved(step, str(self._folder.file(step)), size)
        except Exception as error:  # a full disk, and whatever else: training goes on
            return SnapshotNotSaved(step, f"{type(error).__name__}: {error}")


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
