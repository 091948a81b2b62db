"""What a recorder could not write: counted, and told of once for each kind."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

Made = TypeVar("Made")

_logger = logging.getLogger("foreshock")

_BEFORE_FORK = "the recorder was made before a fork, and only the parent may write"


class Losses:
    """Rows that are lost and files that are missing, while training goes on.

    Args:
        what: the recorder keeps, for the warnings.
        where: it keeps it.
        counted_as: the name of the property that counts the rows, as users know it.

    Attributes:
        num_rows: how many are lost.
    """

    def __init__(self, what: str, where: Path, counted_as: str) -> None:
        self.num_rows = 0
        self._place = f"{what} in {where}"
        self._counted_as = counted_as
        self._told_of: set[str] = set()

    def add(self, num_rows: int, reason: str) -> None:
        """Counts rows that are lost."""
        self.num_rows += num_rows
        self.tell("rows", reason)

    def add_in_forked_child(self) -> None:
        """Counts a row that only the parent may write. No lock is asked for: one that was held by
        a thread that the fork did not copy is never released."""
        self.add(1, _BEFORE_FORK)

    def attempt(self, kind: str, make: Callable[[], Made], of: str = "") -> Made | None:
        """What `make` gives; None, and a warning, if it fails, whatever with.

        Args:
            kind: of what is made; each is warned of once.
            make: makes it.
            of: what it belongs to.
        """
        try:
            return make()
        except Exception as error:
            self.tell(kind, of + (str(error) or repr(error)))
            return None

    def tell(self, kind: str, reason: str) -> None:
        """Warns that something of a kind is missing, unless that was told before."""
        if kind in self._told_of:
            return
        self._told_of.add(kind)
        # A broken log handler is one more thing that must not stop training.
        with contextlib.suppress(Exception):
            _logger.warning(
                "%s: %s missing: %s. Training goes on; %s counts what is lost, and this is the "
                "only warning of its kind.",
                self._place,
                kind,
                reason,
                self._counted_as,
            )
