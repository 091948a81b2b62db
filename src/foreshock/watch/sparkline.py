"""A curve in one line of text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

BLOCKS = "▁▂▃▄▅▆▇█"
ASCII_BLOCKS = "_.-~=+*#"
NONFINITE = "x"


def sparkline(values: Sequence[float], width: int, blocks: str = BLOCKS) -> str:
    """Draws values from the oldest to the newest.

    Args:
        values: those of one place are averaged where there are more than places; a place in which
            one is not finite is an x.
        width: places.
        blocks: characters from the lowest to the highest.

    Returns:
        As many characters as there are values, and no more than `width`.
    """
    places = [_mean(part) for part in _parts(values, max(1, width))]
    finite = [value for value in places if math.isfinite(value)]
    if not finite:
        return NONFINITE * len(places)
    low, span = min(finite), max(finite) - min(finite)
    return "".join(
        blocks[int((value - low) / span * (len(blocks) - 1) + 0.5) if span else 0]
        if math.isfinite(value)
        else NONFINITE
        for value in places
    )


def _parts(values: Sequence[float], width: int) -> list[Sequence[float]]:
    if len(values) <= width:
        return [[value] for value in values]
    all_of_them = list(values)
    ends = [round(len(values) * i / width) for i in range(width + 1)]
    return [all_of_them[a:b] for a, b in pairwise(ends)]


def _mean(values: Sequence[float]) -> float:
    return sum(value / len(values) for value in values)  # a sum may overflow
