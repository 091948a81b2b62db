"""Which samples fit, which normalise and which calibrate; no sample does two of these."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping

import numpy as np


class Role(enum.Enum):
    """What a sample is used for."""

    FIT = "fit"
    NORMALISE = "normalise"
    CALIBRATE = "calibrate"


# 70, 15 and 15 of a hundred; without a part for calibration the others keep their proportion.
THREE_WAYS = {Role.FIT: 14, Role.NORMALISE: 3, Role.CALIBRATE: 3}
TWO_WAYS = {Role.FIT: 14, Role.NORMALISE: 3}


def roles(shares: Mapping[Role, int], seed: int) -> Iterator[Role]:
    """A role for each sample of a stream, for ever.

    Of every sum(shares) samples in a row each role gets exactly its share, at places that the seed
    decides: a stream need not be as long as was thought, nor be seen twice.

    Args:
        shares: how many of each sum(shares) samples.
        seed: of the places.
    """
    block = [role for role, share in shares.items() for _ in range(share)]
    random = np.random.default_rng(seed)
    while True:
        yield from (block[i] for i in random.permutation(len(block)))
