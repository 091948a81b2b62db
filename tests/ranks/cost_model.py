"""What the ranks send each other, by formula; held against what is counted, and shown in docs."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

SHARE, NUMBER, PAIR, MESSAGE = 144, 8, 16, 1024
SUMS, SLOTS = 48, 72


class Cost(NamedTuple):
    what: str
    formula: str
    sizes: Callable[[int, int], list[int]]
    """Bytes of each all_reduce in turn, for R ranks and P parameters."""


COSTS = (
    Cost("clean step", "144", lambda R, P: [SHARE]),
    Cost(
        "update withheld, its gradient named",
        "144 + 8 + 1024",
        lambda R, P: [SHARE, NUMBER, MESSAGE],
    ),
    Cost(
        "rollback, the weight named",
        "144 + 16 + 8 + 1024",
        lambda R, P: [SHARE, PAIR, NUMBER, MESSAGE],
    ),
    Cost(
        "rollback, copies that differ named",
        "144 + 48 P + 16 + 72 R",
        lambda R, P: [SHARE, SUMS * P, PAIR, SLOTS * R],
    ),
    Cost("overflow that a GradScaler sees to", "144 + 8", lambda R, P: [SHARE, NUMBER]),
    Cost("step that tells of a slow rank", "144 + 8 R", lambda R, P: [SHARE, NUMBER * R]),
    Cost("monitor made", "16 + 16", lambda R, P: [PAIR, PAIR]),
    Cost("end of a loop", "144", lambda R, P: [SHARE]),
)


def table(parameters: int = 1000) -> str:
    """For the documentation."""
    ranks = (2, 4, 1000, 10_000)
    head = "".join(f" {r} ranks |" for r in ranks)
    lines = [f"| | all_reduces | bytes, each once |{head}", "|---|---:|---|" + "---:|" * len(ranks)]
    for cost in COSTS:
        found = "".join(f" {sum(cost.sizes(r, parameters))} |" for r in ranks)
        lines.append(f"| {cost.what} | {len(cost.sizes(2, 1))} | {cost.formula} |{found}")
    return "\n".join(lines)
