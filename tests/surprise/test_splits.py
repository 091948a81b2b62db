"""Who fits, who normalises and who calibrates."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest

from foreshock.surprise.splits import THREE_WAYS, TWO_WAYS, Role, roles


@pytest.mark.parametrize("shares", [THREE_WAYS, TWO_WAYS], ids=["three", "two"])
def test_every_block_of_a_stream_is_shared_exactly(shares: dict[Role, int]) -> None:
    stream, size = roles(shares, 3), sum(shares.values())
    blocks = [tuple(islice(stream, size)) for _ in range(50)]
    assert all(Counter(block) == shares for block in blocks)
    assert len(set(blocks)) > 40


def test_the_shares_are_70_15_and_15_percent() -> None:
    assert [20 * share for share in THREE_WAYS.values()] == [20 * 14, 20 * 3, 20 * 3]
    counts = Counter(islice(roles(THREE_WAYS, 0), 1000))
    assert counts == {Role.FIT: 700, Role.NORMALISE: 150, Role.CALIBRATE: 150}


def test_the_seed_decides_and_nothing_else() -> None:
    first, second, other = (list(islice(roles(THREE_WAYS, seed), 200)) for seed in (1, 1, 2))
    assert first == second != other
