"""What a rank hands to the next one, so that what one of them loses is not lost."""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from foreshock.guard.consensus import Consensus

_PIECE_BYTES = 4 << 20
_TIMEOUT = datetime.timedelta(minutes=5)
"""Longer than one rank's disk may be behind another's."""

_made: Counter[tuple[int, ...]] = Counter()
"""Rings of the same ranks, each of which has its own place in the store."""

Pages = Sequence[memoryview]


class Neighbor:
    """A ring of the ranks, in which each hands something on while it takes what it is handed.

    It has a group of its own, on gloo, so that a thread may use it beside the training; one at a
    time, and all ranks for the same things in the same order.

    Args:
        ranks: of which all make theirs at the same place.
    """

    def __init__(self, ranks: Consensus) -> None:
        dist: Any = torch.distributed
        store = dist.distributed_c10d._get_default_store()
        self._rank, self._size = ranks.rank, ranks.size
        # Not by new_group, which all ranks of the world would have to call; with its
        # use_local_synchronization, ranks that are in more groups than others miss each other.
        members = tuple(dist.get_process_group_ranks(ranks.group))
        _made[members] += 1
        name = f"foreshock/neighbor/{members}/{_made[members]}"
        store = dist.PrefixStore(name, store)
        self._group = dist.ProcessGroupGloo(store, self._rank, self._size, _TIMEOUT)

    def hand_on(self, step: int, pages: Pages, take: Callable[[memoryview], None], by: int) -> int:
        """Gives bytes to one rank, and takes those of another, a few megabytes at a time.

        Args:
            step: what they are of; the same on all ranks.
            pages: the bytes; none where there is nothing to give.
            take: given what is taken, piece by piece, each of which is gone after the call.
            by: 1 for the next rank, from that before; -1 the other way.
        Returns:
            Bytes taken.
        Raises:
            RuntimeError: a rank does not answer, or is at another step.
        """
        size = sum(map(len, pages))
        heard = torch.zeros(2, dtype=torch.int64)
        self._pass(torch.tensor([step, size]), heard, by)
        their_step, expected = map(int, heard.tolist())
        if their_step != step:
            raise RuntimeError(f"the other rank is at step {their_step}, this one at {step}")
        outgoing = torch.empty(min(size, _PIECE_BYTES), dtype=torch.uint8)
        incoming = torch.empty(min(expected, _PIECE_BYTES), dtype=torch.uint8)
        filled = _cut(pages, outgoing)
        left = expected
        while True:
            given = next(filled, None)
            taken = incoming[: min(left, _PIECE_BYTES)] if left else None
            if given is None and taken is None:
                return expected
            self._pass(given, taken, by)
            if taken is not None:
                take(taken.numpy().data)
                left -= len(taken)

    def _pass(self, given: torch.Tensor | None, taken: torch.Tensor | None, by: int) -> None:
        to, of = (self._rank + by) % self._size, (self._rank - by) % self._size
        under_way = []
        if taken is not None:
            under_way.append(self._group.recv([taken], of, 0))
        if given is not None:
            under_way.append(self._group.send([given], to, 0))
        for work in under_way:
            work.wait()


def _cut(pages: Pages, piece: torch.Tensor) -> Iterator[torch.Tensor]:
    """The bytes in pieces of one size, but for the last, each in the same memory."""
    room = piece.numpy().data
    filled = 0
    for page in pages:
        begin = 0
        while begin < len(page):
            count = min(len(page) - begin, len(room) - filled)
            room[filled : filled + count] = page[begin : begin + count]
            begin, filled = begin + count, filled + count
            if filled == len(room):
                yield piece
                filled = 0
    if filled:
        yield piece[:filled]
