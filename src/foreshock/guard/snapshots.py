"""A ring of copies of the run's state, of which only the proven ones are ever restored."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import enum
import logging
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xxhash

from foreshock.distributed_part import Chunk, chunk_of, local_part
from foreshock.guard.arena import Arena, Filling, in_memory_order
from foreshock.guard.containers import arrays_in, copy_out, copy_with, tensors_in
from foreshock.guard.events import SnapshotDropped
from foreshock.guard.host_memory import as_text, available_bytes
from foreshock.guard.inspection import can_scan, readable
from foreshock.guard.state import Part
from foreshock.guard.transfer import Transfer
from foreshock.host_read import read
from foreshock.ops import health_scan

_log = logging.getLogger("foreshock")

ALWAYS_FINITE = frozenset({"parameters", "gradients", "optimizer"})
"""Parts that are never right with NaN or infinities in them."""
_STEADY = ("parameters", "optimizer")
"""Parts that only an update changes; what else there is may change with the next forward."""


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
    chunks: dict[str, Chunk] = dataclasses.field(default_factory=dict)
    """Of the tensors that are split over ranks, by path: what of them is here; if it was noted."""
    place: Any = None
    """Where the batches were, for another process to find."""
    was_given_to_saver: bool = False
    is_being_saved: bool = False
    """Whether a file is made of it, for which its memory must stay as it is."""
    arena: Arena | None = None
    transfer: Transfer | None = None
    """What brings it here from a device."""
    filling: concurrent.futures.Future[Filling] | None = None
    """What is found in it, while that is not known yet."""

    @property
    def size_bytes(self) -> int:
        """Memory that its tensors take."""
        return sum(t.nbytes for _, t in tensors_in(self.saved))


def checksum(saved: Mapping[str, Any]) -> str:
    """XXH3 of the bytes of every tensor and array, and of their paths, types and shapes.

    Cost: one read; some 10 GB/s.
    """
    dense = [t for _, t in tensors_in(saved) if not t.is_sparse]
    digest = xxhash.xxh3_128()
    for i in in_memory_order(dense):
        digest.update(dense[i].contiguous().view(-1).view(torch.uint8).numpy().data)
    return _with_forms(digest, saved)


def _with_forms(digest: xxhash.xxh3_128, saved: Mapping[str, Any]) -> str:
    """The digest of the dense tensors' bytes, completed by all else."""
    for path, leaf in arrays_in(saved):
        if isinstance(leaf, torch.Tensor):
            digest.update(f"{path}:{leaf.dtype}:{tuple(leaf.shape)};".encode())
            if leaf.is_sparse:
                for part in (leaf._indices(), leaf._values()):
                    digest.update(part.contiguous().view(-1).view(torch.uint8).numpy().data)
        elif not leaf.dtype.hasobject:
            digest.update(f"{path}:{leaf.dtype}:{leaf.shape};".encode())
            digest.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)
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
        notes_chunks: whether a snapshot says how its tensors are split over ranks.
    """

    def __init__(
        self,
        parts: Mapping[str, Part],
        depth: int,
        clean_steps: int,
        dropped: Callable[[SnapshotDropped], None],
        *,
        notes_chunks: bool = False,
    ) -> None:
        self._parts = parts
        self._depth = depth
        self._clean_steps = clean_steps
        self._dropped = dropped
        self._notes_chunks = notes_chunks
        self._ring: list[Snapshot] = []
        self._meant_nonfinite: frozenset[str] | None = None
        self._spare: Arena | None = None
        self._told_bytes = 0
        self._verifier: concurrent.futures.ThreadPoolExecutor | None = None

    @property
    def entries(self) -> tuple[Snapshot, ...]:
        """The snapshots, oldest first."""
        return tuple(self._ring)

    @property
    def has_room(self) -> bool:
        """Whether one more may be taken; not while a proven one waits for others to be proven."""
        self._conclude(wait=True)
        return len(self._ring) <= self._depth

    def take(self, step: int) -> Snapshot | None:
        """Copies the state as it is between two updates.

        Args:
            step: the one that is about to be run; another snapshot of it is replaced.
        Returns:
            The snapshot; None if the state is not finite, or there is no memory for a copy.
        Cost:
            On the CPU one read of the state and one write; scan and checksum work from the cache.
            From a device the copy runs beside what the device is given next, and is scanned and
            summed up by a thread; the host waits for nothing. Memory is allocated `depth` + 1
            times, and used again.
        """
        live = {name: part.live() for name, part in self._parts.items()}
        dense = [(path, local_part(t)) for path, t in tensors_in(live) if not t.is_sparse]
        tensors = [t for _, t in dense]
        arena = self._arena_for(step, tensors)
        if arena is None:
            return None
        copies = iter(arena.views)
        saved = copy_with(live, lambda t: copy_out(t) if t.is_sparse else next(copies))
        snapshot = Snapshot(step, saved, arena=arena)
        if self._notes_chunks:
            found = ((path, chunk_of(t)) for path, t in tensors_in(live))
            snapshot.chunks = {path: chunk for path, chunk in found if chunk is not None}
        if arena.is_pinned:
            steady = [path.startswith(_STEADY) for path, _ in dense]
            snapshot.transfer = transfer = Transfer(arena.views, tensors, steady)
            snapshot.filling = self._thread().submit(_wait_and_look_over, transfer, arena)
        self._forget([kept for kept in self._ring if kept.step >= step])
        self._ring.append(snapshot)
        if snapshot.filling is None:
            self._take_in(snapshot, arena.fill(tensors))
        self._make_room()
        return snapshot if snapshot in self._ring else None

    def settle(self) -> None:
        """Waits until it is known of every snapshot whether it is fit for use."""
        self._conclude(wait=True)

    def keep_only(self, steps: Container[int], why: str) -> None:
        """Drops the snapshots of all other steps."""
        gone = [kept for kept in self._ring if kept.step not in steps]
        self._forget(gone)
        for snapshot in gone:
            self._dropped(SnapshotDropped(snapshot.step, why))

    def hold_back_update(self) -> None:
        """Before an update: has the device wait for the copies that are under way."""
        for snapshot in self._ring:
            if snapshot.transfer is not None:
                snapshot.transfer.hold_back()

    def close(self) -> None:
        """Ends the thread, if there is one."""
        self._conclude(wait=True)
        if self._verifier is not None:
            self._verifier.shutdown()
            self._verifier = None

    def adopt(self, snapshot: Snapshot) -> None:
        """Takes in a snapshot of an earlier process, known to be good, as the only one."""
        snapshot.standing, snapshot.clean_steps = Standing.KNOWN_GOOD, self._clean_steps
        snapshot.checksum = checksum(snapshot.saved)
        if self._meant_nonfinite is None:
            self._meant_nonfinite = frozenset(find_nonfinite(snapshot.saved))
        self._forget(self._ring)
        self._ring = [snapshot]

    # ---- memory

    def _arena_for(self, step: int, tensors: Sequence[torch.Tensor]) -> Arena | None:
        spare, self._spare = self._spare, None
        if spare is not None and spare.fits(tensors):
            return spare
        size = sum(t.nbytes for t in tensors)
        del spare  # before there is another one
        available = available_bytes()
        if available is None or size < available:
            self._tell_of_cost(size, available)
            try:
                return Arena(tensors)
            except (RuntimeError, MemoryError):
                pass
        left = "an unknown amount" if available is None else as_text(available)
        why = f"its copy takes {as_text(size)} of host memory, of which {left} is left"
        self._dropped(SnapshotDropped(step, why))
        return None

    def _tell_of_cost(self, size: int, available: int | None) -> None:
        if size <= 1.25 * self._told_bytes:
            return  # the moments come with the first update; a few bytes more are no news
        self._told_bytes = size
        most = self._depth + 1 - len(self._ring)
        cost = (
            f"a snapshot takes {as_text(size)} of host memory; depth={self._depth} keeps up to "
            f"{self._depth + 1} of them, {as_text((self._depth + 1) * size)}"
        )
        if available is not None and most * size > available:
            _log.warning("%s, and %s is left: lower depth", cost, as_text(available))
        else:
            _log.info("%s", cost)

    def _forget(self, snapshots: Sequence[Snapshot]) -> None:
        """Takes snapshots out of the ring; the memory of one is used for the next."""
        gone = set(map(id, snapshots))
        for snapshot in snapshots:
            is_idle = snapshot.filling is None and not snapshot.is_being_saved
            if is_idle and snapshot.arena is not None:
                self._spare = snapshot.arena
        self._ring = [kept for kept in self._ring if id(kept) not in gone]

    # ---- standing

    def _thread(self) -> concurrent.futures.ThreadPoolExecutor:
        if self._verifier is None:
            self._verifier = concurrent.futures.ThreadPoolExecutor(1, "foreshock-snapshots")
        return self._verifier

    def _conclude(self, *, wait: bool) -> None:
        """Takes in what is found in the copies that have arrived; `wait`: in all."""
        for snapshot in self.entries:
            filling = snapshot.filling
            if filling is not None and (wait or filling.done()):
                snapshot.filling = snapshot.transfer = None
                self._take_in(snapshot, filling.result())

    def _take_in(self, snapshot: Snapshot, filling: Filling) -> None:
        leaves = list(tensors_in(snapshot.saved))
        dense = [path for path, t in leaves if not t.is_sparse]
        nonfinite = [dense[i] for i in filling.nonfinite]
        nonfinite += find_nonfinite({path: t for path, t in leaves if t.is_sparse})
        bad = self._unmeant(nonfinite)
        if bad:
            self._forget([snapshot])
            self._dropped(SnapshotDropped(snapshot.step, f"{bad[0]} is not finite"))
            return
        snapshot.checksum = _with_forms(filling.digest, snapshot.saved)
        snapshot.standing = Standing.VERIFIED
        self._promote(snapshot)

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
        self._conclude(wait=False)
        for snapshot in self._ring:
            if snapshot.step <= step:
                snapshot.clean_steps += 1
                self._promote(snapshot)
        self._make_room()

    def _promote(self, snapshot: Snapshot) -> None:
        is_verified = snapshot.standing is Standing.VERIFIED
        if is_verified and snapshot.clean_steps >= self._clean_steps:
            snapshot.standing = Standing.KNOWN_GOOD

    def _make_room(self) -> None:
        """Drops the oldest, but never the only ones that may be restored for ones that may not."""
        while len(self._ring) > self._depth:
            if not any(kept.standing is Standing.KNOWN_GOOD for kept in self._ring[1:]):
                return
            self._forget(self._ring[:1])

    # ---- the way back

    def newest_good(self, not_after: int) -> Snapshot | None:
        """The newest snapshot of at most this step that is known to be good and unchanged since.

        Ones whose checksum no longer fits are dropped on the way.
        """
        self._conclude(wait=True)
        for snapshot in reversed(self._ring):
            if snapshot.step > not_after or snapshot.standing is not Standing.KNOWN_GOOD:
                continue
            if checksum(snapshot.saved) == snapshot.checksum:
                return snapshot
            self._forget([snapshot])
            self._dropped(SnapshotDropped(snapshot.step, "its checksum no longer fits"))
        return None

    def restore(self, snapshot: Snapshot, without: frozenset[str] = frozenset()) -> None:
        """Puts the state back in place, and forgets the snapshots taken after it.

        Args:
            snapshot: one that `newest_good` has given.
            without: parts that are left as they are.
        """
        for name, part in self._parts.items():
            if name not in without and name in snapshot.saved:
                part.restore(snapshot.saved[name])
        self._forget([kept for kept in self._ring if kept.step > snapshot.step])


def _wait_and_look_over(transfer: Transfer, arena: Arena) -> Filling:
    transfer.wait()
    return arena.look_over()
