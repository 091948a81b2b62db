"""A ring of copies of the run's state, of which only the proven ones are ever restored."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import xxhash

from foreshock.guard.containers import leaves_in, tensors_in
from foreshock.guard.events import SnapshotDropped
from foreshock.guard.inspection import can_scan, readable
from foreshock.guard.state import Part
from foreshock.host_read import read
from foreshock.ops import health_scan

ALWAYS_FINITE = frozenset({"parameters", "gradients", "optimizer"})
"""Parts that are never right with NaN or infinities in them."""


class Standing(enum.Enum):
    """How far a snapshot is trusted."""

    CAPTURED = "captured"
    VERIFIED = "verified"
    KNOWN_GOOD = "known_good"


@dataclasses.dataclass(eq=False)
class Snapshot:
    """The state between two updates."""

    step: int
    """The step that was about to be run."""
    saved: dict[str, Any]
    """What each part of the state was, by the part's name."""
    standing: Standing = Standing.CAPTURED
    checksum: str = ""
    clean_steps: int = 0
    """Steps without a fault since it was taken."""

    @property
    def size_bytes(self) -> int:
        """Memory that its tensors take."""
        return sum(t.nbytes for _, t in tensors_in(self.saved))


def checksum(saved: Mapping[str, Any]) -> str:
    """XXH3 of the path and the bytes of every tensor and array, in order.

    Cost: one read; some 10 GB/s.
    """
    digest = xxhash.xxh3_128()
    for path, leaf in leaves_in(saved):
        if isinstance(leaf, torch.Tensor):
            leaf = leaf._values() if leaf.is_sparse else leaf
            array = leaf.reshape(-1).view(torch.uint8).numpy()
        elif isinstance(leaf, np.ndarray) and not leaf.dtype.hasobject:
            array = np.ascontiguousarray(leaf).reshape(-1).view(np.uint8)
        else:
            continue
        digest.update(f"{path}:{leaf.dtype}:{tuple(leaf.shape)};".encode())
        digest.update(array.data)
    return digest.hexdigest()


def find_nonfinite(saved: Mapping[str, Any]) -> list[str]:
    """Paths of the tensors with a value that is not finite."""
    named = [(path, t) for path, t in tensors_in(saved) if can_scan(t)]
    nonfinite = read(health_scan([readable(t) for _, t in named]).nonfinite)
    return [path for (path, _), n in zip(named, nonfinite, strict=True) if n]


class SnapshotRing:
    """Takes snapshots, promotes them, and restores the newest that is known to be good.

    captured -> verified (its own scan found only finite values, and its checksum is stored)
    -> known_good (`clean_steps` clean steps came after it).

    What is not finite in the very first capture, outside of parameters, gradients and the
    optimizer's state, is taken to be meant so: a mask of -inf, an observer's bounds.

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
        self._meant_nonfinite: frozenset[str] | None = None

    @property
    def entries(self) -> tuple[Snapshot, ...]:
        """The snapshots, oldest first."""
        return tuple(self._ring)

    @property
    def has_room(self) -> bool:
        """Whether one more may be taken; not while a proven one waits for others to be proven."""
        return len(self._ring) <= self._depth

    def take(self, step: int) -> Snapshot | None:
        """Copies the state as it is between two updates; None if it is not finite.

        Args:
            step: the one that is about to be run; another snapshot of it is replaced.
        Cost:
            One copy of the state, one read of the copy for the scan and one for the checksum.
        """
        snapshot = Snapshot(step, {name: part.capture() for name, part in self._parts.items()})
        bad = self._unmeant(find_nonfinite(snapshot.saved))
        if bad:
            self._dropped(SnapshotDropped(step, f"{bad[0]} is not finite"))
            return None
        snapshot.checksum = checksum(snapshot.saved)
        snapshot.standing = Standing.VERIFIED
        self._ring = [*(kept for kept in self._ring if kept.step < step), snapshot]
        self._promote(snapshot)
        self._make_room()
        return snapshot

    def _unmeant(self, nonfinite: list[str]) -> list[str]:
        if self._meant_nonfinite is None:
            self._meant_nonfinite = frozenset(
                path for path in nonfinite if path.partition(".")[0] not in ALWAYS_FINITE
            )
        return [path for path in nonfinite if path not in self._meant_nonfinite]

    def note_clean_step(self, step: int) -> None:
        """A step was run and nothing was wrong with it.

        Args:
            step: which; it says nothing of a snapshot that was taken after it.
        """
        for snapshot in self._ring:
            if snapshot.step <= step:
                snapshot.clean_steps += 1
                self._promote(snapshot)
        self._make_room()

    def _promote(self, snapshot: Snapshot) -> None:
        if snapshot.clean_steps >= self._clean_steps:
            snapshot.standing = Standing.KNOWN_GOOD

    def _make_room(self) -> None:
        """Drops the oldest, but never the only ones that may be restored for ones that may not."""
        while len(self._ring) > self._depth:
            if not any(kept.standing is Standing.KNOWN_GOOD for kept in self._ring[1:]):
                return
            del self._ring[0]

    def newest_good(self, not_after: int) -> Snapshot | None:
        """The newest snapshot of at most this step that is known to be good and unchanged since.

        Ones whose checksum no longer fits are dropped on the way.
        """
        for snapshot in reversed(self._ring):
            if snapshot.step > not_after or snapshot.standing is not Standing.KNOWN_GOOD:
                continue
            if checksum(snapshot.saved) == snapshot.checksum:
                return snapshot
            self._ring = [kept for kept in self._ring if kept is not snapshot]
            self._dropped(SnapshotDropped(snapshot.step, "its checksum no longer fits"))
        return None

    def restore(self, snapshot: Snapshot, without: frozenset[str] = frozenset()) -> None:
        """Puts the state back in place, and forgets the snapshots taken after it.

        Args:
            snapshot: one that `newest_good` has given.
            without: parts that are left as they are.
        """
        for name, part in self._parts.items():
            if name not in without:
                part.restore(snapshot.saved[name])
        self._ring = [kept for kept in self._ring if kept.step <= snapshot.step]
