"""What happened on the ranks of a run, once each, though several of them tell of the same."""

from __future__ import annotations

import bisect
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from foreshock.records.event_sentence import reasons_of
from foreshock.report.curves import is_step
from foreshock.report.events import MAX_ROWS, Ends, Events

MAX_EVENTS = 20_000
"""That are compared between ranks."""
_OWN_FIELDS = frozenset(
    {"time", "path", "size_bytes", "file", "batch_hash"}
    | {"kappa", "slope", "volatility", "value", "ratio"}
)
"""In which ranks that tell of the same may differ: names of files, and the last digits."""

_Key = tuple[bytes, int]


class RankEvents(Events):
    """Takes in the events of the first rank, then of others; the rows are those of all, in time.

    Attributes:
        offences: by rank, how often it was the `offender`, was `slow`, and `differs`: held a copy
            that was not the same.
        omitted: events that there were too many of to tell whether another rank has told them.
    """

    def __init__(self) -> None:
        super().__init__()
        self._actions, self._risks = _EndsInTime(), _EndsInTime()
        self.offences: dict[int, Counter[str]] = defaultdict(Counter)
        self.omitted = 0
        self._ranks = [0]
        # A bit for each rank that has been begun, by what an event says and how often it did.
        self._told_by: dict[_Key, int] = {}
        self._times_here: Counter[bytes] = Counter()

    def begin(self, rank: int) -> None:
        """What comes from now on is of this other rank."""
        self._ranks.append(rank)
        self._times_here.clear()

    def add(self, record: Mapping[str, Any]) -> None:
        key = self._key(record)
        if key is None and len(self._ranks) > 1:
            self.omitted += 1
            return
        is_news = key is None or key not in self._told_by
        if key is not None:
            self._told_by[key] = self._told_by.get(key, 0) | 1 << (len(self._ranks) - 1)
        if is_news:
            self._note_offences(record)
            rank = self._ranks[-1]
            more = {"key": key, "rank": rank, "when": str(record.get("time"))}
            self._take_in(record, f"rank {rank}: " if rank else "", more)

    def actions(self) -> dict[str, Any]:
        return self._with_ranks(self._actions.drawn())

    def risk_changes(self) -> dict[str, Any]:
        return self._with_ranks(self._risks.drawn())

    def _key(self, record: Mapping[str, Any]) -> _Key | None:
        """The same for ranks that tell of the same; None if there are too many."""
        said = {name: value for name, value in record.items() if name not in _OWN_FIELDS}
        text = json.dumps(said, sort_keys=True).encode()
        digest = hashlib.blake2b(text, digest_size=16).digest()
        if digest not in self._times_here and len(self._times_here) >= MAX_EVENTS:
            return None
        self._times_here[digest] += 1
        key = digest, self._times_here[digest]
        return key if key in self._told_by or len(self._told_by) < MAX_EVENTS else None

    def _note_offences(self, record: Mapping[str, Any]) -> None:
        if record.get("event") == "straggler_seen":
            self._count("slow", [record.get("rank")])
        offender = record.get("offender")
        if isinstance(offender, dict) and isinstance(offender.get("ranks"), list):
            is_bad = offender.get("nan") or offender.get("inf")
            is_of_copies = not is_bad and "REPLICAS_DIFFER" in reasons_of(record)
            self._count("differs" if is_of_copies else "offender", offender["ranks"])

    def _count(self, what: str, ranks: Sequence[object]) -> None:
        for rank in ranks:
            if isinstance(rank, int) and is_step(rank):
                self.offences[rank][what] += 1

    def _with_ranks(self, drawn: dict[str, Any]) -> dict[str, Any]:
        spelt = {end: [self._with_rank(row) for row in drawn[end]] for end in ("first", "last")}
        return drawn | spelt

    def _with_rank(self, row: Mapping[str, Any]) -> dict[str, Any]:
        shown = dict(row)
        key, rank = shown.pop("key"), shown.pop("rank")
        bits = self._told_by.get(key, 0)
        told = [rank for place, rank in enumerate(self._ranks) if bits >> place & 1] or [rank]
        is_all = len(told) == len(self._ranks) > 1
        return shown | {"ranks": "all" if is_all else spell_ranks(told)}


class _EndsInTime(Ends):
    """Rows that come in any order, by the time that they state."""

    def __init__(self) -> None:
        # Time, number and row; rows of one time are in the order in which they came.
        self._earliest: list[tuple[str, int, dict[str, Any]]] = []
        self._latest: list[tuple[str, int, dict[str, Any]]] = []
        self._total = 0

    def add(self, row: dict[str, Any]) -> None:
        self._total += 1
        bisect.insort(self._earliest, (row.pop("when"), self._total, row))
        if len(self._earliest) > MAX_ROWS // 2:
            bisect.insort(self._latest, self._earliest.pop())
        if len(self._latest) > MAX_ROWS // 2:
            del self._latest[0]

    def drawn(self) -> dict[str, Any]:
        first, last = ([row for *_, row in rows] for rows in (self._earliest, self._latest))
        return {"first": first, "left_out": self._total - len(first) - len(last), "last": last}


def spell_ranks(ranks: Sequence[int]) -> str:
    """Numbers in their order, three or more in a row as one: 0 to 3, 5."""
    rows: list[list[int]] = []
    for rank in ranks:
        if rows and rank == rows[-1][-1] + 1:
            rows[-1].append(rank)
        else:
            rows.append([rank])
    spelt = (f"{r[0]} to {r[-1]}" if len(r) > 2 else ", ".join(map(str, r)) for r in rows)
    return ", ".join(spelt)
