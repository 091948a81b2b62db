"""The ranks of a run that keep records of their own, beside the first, which keeps those of all."""

from __future__ import annotations

import dataclasses
import os
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from foreshock.records.verification_story import tell_lines
from foreshock.report.curves import Curves
from foreshock.report.rank_curves import RankCurves
from foreshock.report.rank_events import RankEvents
from foreshock.report.run_files import RunFiles, losses_in
from foreshock.report.telemetry import SOURCE, RunSeen

MAX_RANK_ROWS = 256
_SIGNS_OF_RECORDS = ("telemetry.jsonl", "config.json", "summary.json", "ledger.jsonl")
_SLOW = 1.5
"""Times the median step time of the others."""
_BEHIND = 3
"""Records that a rank may have fewer than another, as they are not read at the same moment."""
_MOST_NAMES = 3


@dataclasses.dataclass
class _Rank:
    """What is known of one rank."""

    records: int = 0
    last_step: int | None = None
    step_seconds: float | None = None
    """Median over the points of the curve of steps a second."""
    ledger: str = ""
    state: str = ""
    """What is wrong with its files; empty if nothing is."""


_NOTHING = _Rank(state="nothing is there")


class Ranks:
    """Reads the directories of ranks, one after the other, and compares what is in them.

    Args:
        folders: of the ranks but for the first.
        events: which the first has told of; gets those of the others.
        seen, curves, ledger: what else is known of the first, and the state of its ledger.

    Attributes:
        problems: what is wrong with the files, in words.

    Cost: one pass over the files, of which the curves are kept, thinned.
    """

    def __init__(
        self,
        folders: Mapping[int, Path],
        events: RankEvents,
        seen: RunSeen,
        curves: Curves,
        ledger: str,
    ) -> None:
        self.problems: list[str] = []
        self._events = events
        self._curves = RankCurves(1 + len(folders))
        self._ranks: dict[int, _Rank] = {}
        self._take_in(0, seen, curves, ledger)
        for rank, folder in folders.items():
            if any(os.path.exists(folder / name) for name in _SIGNS_OF_RECORDS):
                self._read(rank, folder)
            else:
                self._ranks[rank] = _Rank(state="keeps no records")
        self._compared = self._curves.compared()
        if events.omitted:
            self.problems.append(
                f"{events.omitted} events of other ranks are not shown: there are too many to tell "
                "whether the first rank has told of them"
            )

    def told(self) -> dict[str, Any]:
        """A row for each rank, and one for each number in which they differ."""
        rows = list(self._rows())
        shown = rows
        if len(rows) > MAX_RANK_ROWS:  # those of which there is something to say come first
            shown = sorted(rows, key=lambda row: not (row["stands_out"] or row["state"]))
            shown = sorted(shown[:MAX_RANK_ROWS], key=lambda row: int(row["order"]))
        return {
            "rows": shown,
            "left_out": len(rows) - len(shown),
            "numbers": [number.in_numbers() for number in self._compared.numbers],
            "more_numbers": self._compared.left_out,
        }

    def drawn(self, steps: list[list[int]]) -> list[dict[str, Any]]:
        """The curves of these numbers.

        Args:
            steps: lists of steps of other curves, to which those of these are added.
        """
        return [number.drawn(steps) for number in self._compared.numbers]

    def _read(self, rank: int, folder: Path) -> None:
        files, curves = RunFiles(folder), Curves()
        self._events.begin(rank)
        seen = RunSeen(curves, self._events)
        files.telemetry(seen)
        files.other_curves(curves)
        ledger = files.ledger()["state"]
        self._take_in(rank, seen, curves, ledger)
        losses = losses_in(files.summary()) if (folder / "summary.json").exists() else ()
        self.problems += [f"{folder.name}/{problem}" for problem in (*files.problems, *losses)]

    def _take_in(self, rank: int, seen: RunSeen, curves: Curves, ledger: str) -> None:
        self._curves.add(rank, curves)
        speeds = self._curves.means(rank, (SOURCE, "steps_per_second"))
        seconds = 1 / statistics.median(speeds) if speeds else None
        torn = f"{tell_lines(seen.torn_lines)} torn" if seen.torn_lines else ""
        state = seen.trouble or torn
        self._ranks[rank] = _Rank(seen.records, seen.last_step, seconds, ledger, state)

    def _rows(self) -> Iterator[dict[str, Any]]:
        expected = 0
        for rank in sorted({*self._ranks, *self._events.offences}):
            if rank > expected:
                yield self._row([expected, rank - 1], _NOTHING, [])
            expected = rank + 1
            alone = self._compared.alone.get(rank, [])
            yield self._row([rank], self._ranks.get(rank, _NOTHING), alone)

    def _row(self, ranks: Sequence[int], found: _Rank, alone: Sequence[str]) -> dict[str, Any]:
        """Of one rank, or of the first and the last of some in a row of which nothing is known."""
        offences = self._events.offences.get(ranks[0], Counter()) if len(ranks) == 1 else {}
        row = {
            "rank": " to ".join(map(str, dict.fromkeys(ranks))),
            "order": ranks[0],
            **dataclasses.asdict(found),
            "state": "; ".join(filter(None, [found.state, self._how_it_ends(found)])),
            "ratio": self._ratio(ranks[0]),
            **{what: offences.get(what, 0) for what in ("offender", "slow", "differs")},
        }
        return row | {"stands_out": "; ".join(_marks(row, alone))}

    def _ratio(self, rank: int) -> float | None:
        """Of this rank's step time to the median of the others'."""
        times = {r: s.step_seconds for r, s in self._ranks.items() if s.step_seconds is not None}
        mine = times.pop(rank, None)
        return mine / statistics.median(times.values()) if times and mine is not None else None

    def _how_it_ends(self, found: _Rank) -> str:
        if found.last_step is None:
            return ""
        last = max(s.last_step for s in self._ranks.values() if s.last_step is not None)
        is_behind = last - found.last_step > _BEHIND * (found.last_step + 1) / found.records
        return f"ends before the others, which are at step {last}" if is_behind else ""


def _marks(row: Mapping[str, Any], alone: Sequence[str]) -> Iterator[str]:
    """Why a rank stands out."""
    for what, said in (("offender", "offender"), ("slow", "slow"), ("differs", "copy differs")):
        if row[what]:
            yield said
    if row["ratio"] is not None and row["ratio"] > _SLOW:
        yield "long steps"
    if alone:
        more = f" and {len(alone) - _MOST_NAMES} more" if len(alone) > _MOST_NAMES else ""
        yield f"alone in {', '.join(alone[:_MOST_NAMES])}{more}"
