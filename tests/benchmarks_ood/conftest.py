"""Models that several tests look at."""

from __future__ import annotations

import pytest
from benchmarks.ood import digits
from benchmarks.ood.trial import Trial


@pytest.fixture(scope="session")
def trials() -> list[Trial]:
    """Those of one seed, trained for half as long."""
    return digits.trials(seed=0, epochs=30)
