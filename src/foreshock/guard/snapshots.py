"""A ring of copies of the run's state, of which only the proven ones are ever restored."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Mapping
from typing import Any

import torch
import xxhash

from foreshock.guard.events import SnapshotDropped
from foreshock.guard.state import Part, tensors_in
from foreshock.ops import health_scan


class Standing(enum.Enum):
    """How far a snapshot is trusted."""

    CAPTURED = "captured"
    VERIFIED = "verified"
    KNOWN_GOOD = "known_good"


@dataclasses.dataclass
class Snapshot:
    """The state between two updates."""

    step: int
    """The step that was about to be run."""
    saved: dict[str, Any]
    standing: Standing = Standing.CAPTURED
    checksum: str = ""
    clean_steps: int = 0

    @property
    def size_bytes(self) -> int:
        """Memory that its tensors take."""
        return sum(t.nbytes for _, t in tensors_in(self.saved))


def checksum(saved: Mapping[str, Any]) -> str:
    """XXH3 of every tensor's bytes and path, in order."""
    digest = xxhash.xxh3_128()
    for path, tensor in tensors_in(saved):
        digest.update(f"{path}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def find_nonfinite(saved: Mapping[str, Any]) -> str | None:
    """Path of the first tensor with a value that is not finite."""
    named = [(path, t) for path, t in tensors_in(saved) if t.is_floating_point()]
    first = int(health_scan([t for _, t in named]).first_nonfinite)
    return named[first][0] if first >= 0 else None


class SnapshotRing:
    """Takes snapshots, promotes them, and restores the newest that is known to be good.

    captured -> verified (its own scan found only finite values, and its checksum is stored)
    -> known_good (`clean_steps` clean steps came after it).

    Args:
        parts: the parts of the state, by name.
        depth: snapshots kept; the oldest makes room, but only for one that is known to be good:
            until then there is one more.
        clean_steps: clean steps that make a verified snapshot known to be good.
        dropped: told of each snapshot that is found unfit.
    """

    def __init__(
        self,
        parts: Mapping[str, Part],
        depth: int,
        clean_steps: int,
        dropped: Callable[[SnapshotDropped], None],
    ) -> None:
        self._parts = parts
        self._depth = depth
        self._clean_steps = clean_steps
        self._dropped = dropped
        self._ring: list[Snapshot] = []

    def take(self, step: int) -> Snapshot | None:
        """Copies the state as it is between two updates; None if it is not finite.

        Cost: one copy of the state, one read of the copy for the scan and one for the checksum.
        """
        snapshot = Snapshot(step, {name: part.capture() for name, part in self._parts.items()})
        bad = find_nonfinite(snapshot.saved)
        if bad is not None:
            self._dropped(SnapshotDropped(step, f"{bad} is not finite"))
            return None
        snapshot.checksum = checksum(snapshot.saved)
        snapshot.standing = Standing.VERIFIED
        self._ring = [*(kept for kept in self._ring if kept.step < step), snapshot]
        self._promote(snapshot)
        self._make_room()
        return snapshot

    def _make_room(self) -> None:
        """Drops the oldest, but never the only ones that may be restored for ones that may not."""
        while len(self._ring) > self._depth:
            if not any(kept.standing is Standing.KNOWN_GOOD for kept in self._ring[1:]):
                return
            del self._ring[0]

    def note_clean_step(self) -> None:
        """A step was run and nothing was wrong with it."""
        for snapshot in self._ring:
            snapshot.clean_steps += 1
            self._promote(snapshot)
        self._make_room()

    def _promote(self, snapshot: Snapshot) -> None:
        if snapshot.clean_steps >= self._clean_steps:
            snapshot.standing = Standing.KNOWN_GOOD

    @property
    def entries(self) -> tuple[Snapshot, ...]:
        """The snapshots, oldest first."""
        return tuple(self._ring)

    def clear(self) -> None:
        """Forgets every snapshot."""
        self._ring = []

    def newest_good(self, not_after: int) -> Snapshot | None:
        """The newest snapshot of at most this step that is known to be good and unchanged since.

        Ones whose checksum no longer fits are dropped on the way.
        """
        for snapshot in reversed(self._ring):
            if snapshot.step > not_after or snapshot.standing is not Standing.KNOWN_GOOD:
                continue
            if checksum(snapshot.saved) == snapshot.checksum:
                return snapshot
            self._ring.remove(snapshot)
            self._dropped(SnapshotDropped(snapshot.step, "its checksum no longer fits"))
        return None

    def restore(self, snapshot: Snapshot) -> None:
        """Puts the state back in place, and forgets the snapshots taken after it."""
        for name, part in self._parts.items():
            part.restore(snapshot.saved[name])
        self._ring = [kept for kept in self._ring if kept.step <= snapshot.step]
