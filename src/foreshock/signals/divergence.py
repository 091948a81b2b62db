"""How unlike two distributions are."""

from __future__ import annotations

import math

import numpy as np

from foreshock.signals.trend import Floats


def jensen_shannon(p: Floats, q: Floats) -> float:
    """The Jensen-Shannon divergence of two distributions.

    JSD(p, q) = KL(p|m)/2 + KL(q|m)/2, m = (p + q)/2, natural logarithm

    Args:
        p: (k,) shares, which sum to 1.
        q: (k,) likewise.
    Returns:
        In nats, from 0, the same, to ln 2, nothing in common.
    Source:
        Lin 1991.
    """
    # Rounding may lead over either end.
    return min(max(0.5 * (_to_the_middle(p, q) + _to_the_middle(q, p)), 0.0), math.log(2))


def _to_the_middle(p: Floats, q: Floats) -> float:
    """KL(p | (p + q) / 2)."""
    is_there = p > 0
    p, q = p[is_there], q[is_there]
    # Not p / m: a half of the smallest number there is would be 0.
    return float((p * np.log(2.0 * (p / (p + q)))).sum())
