"""What `soft_assign` and `SoftAssigner` refuse alike."""

from __future__ import annotations

import math


def check_number(value: float, name: str, accepted: str, is_accepted: bool) -> None:
    """Raises ValueError for what is not accepted, or not finite."""
    if not is_accepted or not math.isfinite(value):
        raise ValueError(f"{name} is {value}; accepted: {accepted}")
