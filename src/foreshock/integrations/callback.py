"""What the callbacks of both trainers are: settings first, and a monitor while training lasts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar

from foreshock.guard import Guard, Stateful
from foreshock.monitor import Monitor


class OnTrainer(Protocol):
    """A monitor on a trainer, until `close`."""

    monitor: Monitor

    def close(self) -> dict[str, Any]:
        """Takes it off, and gives the summary."""
        ...


Attached = TypeVar("Attached", bound=OnTrainer)


class WatchingCallback(Generic[Attached]):
    """Settings of a monitor by the names that a trainer's user gives them.

    Args:
        out_dir: directory of the run's records.
        guard_enabled: whether bad updates are withheld and bad states rolled back (`recover`);
            otherwise they are only told of (`observe`).
        guard_snapshot_interval, guard_violation_threshold, guard_max_rollbacks, guard_lr_backoff:
            fields of `foreshock.Guard`.
        spectral_enabled, spectral_interval, telemetry_interval, parameters: of
            `foreshock.Monitor`.
        guard: the other fields of `foreshock.Guard`, by name.
        more: the other settings of `foreshock.Monitor`.
    Raises:
        TypeError, ValueError: naming the argument, what was given and what is accepted.
    """

    def __init__(
        self,
        out_dir: str | os.PathLike[str],
        *,
        guard_enabled: bool = False,
        guard_snapshot_interval: int = 100,
        guard_violation_threshold: float = 1e6,
        guard_max_rollbacks: int = 3,
        guard_lr_backoff: float = 0.5,
        spectral_enabled: bool = True,
        spectral_interval: int = 50,
        telemetry_interval: int = 10,
        parameters: Literal["trainable", "all"] = "trainable",
        guard: dict[str, Any] | None = None,
        **more: Any,
    ) -> None:
        self._out_dir = Path(out_dir)
        self._guard = Guard(
            mode="recover" if guard_enabled else "observe",
            snapshot_interval=guard_snapshot_interval,
            violation_threshold=guard_violation_threshold,
            max_rollbacks=guard_max_rollbacks,
            lr_backoff=guard_lr_backoff,
            **(guard or {}),
        )
        self._state: dict[str, Stateful] = more.pop("state", {})
        """Beside what the trainer has."""
        self._settings = {
            "spectral_enabled": spectral_enabled,
            "spectral_interval": spectral_interval,
            "telemetry_interval": telemetry_interval,
            "parameters": parameters,
            **more,
        }
        self._attached: Attached | None = None
        self.summary: dict[str, Any] | None = None
        """What `Monitor.finalize` has said of the last training."""

    @property
    def monitor(self) -> Monitor | None:
        """That of the training which is under way."""
        return None if self._attached is None else self._attached.monitor

    def _detach(self) -> None:
        attached, self._attached = self._attached, None
        if attached is not None:
            self.summary = attached.close()
