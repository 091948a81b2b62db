"""What the monitor asks of whatever follows one part of a training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class StepWatch(Protocol):
    """Follows one part of a training, and says what it has seen.

    A fault in one ends its watching, is logged once, and reaches nobody else. One that also has
    `state_dict` and `load_state_dict` is rolled back with the run.
    """

    def note_step(self, step: int) -> None:
        """A step was judged; its update has not been made yet."""

    def telemetry(self) -> Mapping[str, object]:
        """What a telemetry record is to have of it, by name; empty before the first look."""

    def close(self) -> None:
        """Stops watching, and leaves nothing on the model."""
