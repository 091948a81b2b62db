"""To TensorBoard, by the writer of torch."""

from __future__ import annotations

import os
from typing import Any

from foreshock.sinks.sink import Record, is_measurement, numbers_of, of_extra, sentence_of

_FLUSH_S = 10


class TensorBoard:
    """Writes event files: numbers as scalars `foreshock/<name>`, events as texts.

    NaN and infinities are written as such, and TensorBoard marks them. After a rollback a further
    event file begins, before which TensorBoard discards the steps that are run again: the curves
    are those of the training that stands. Events of those steps are then only in telemetry.jsonl,
    but for the rollback itself.

    Args:
        log_dir: directory of the event files; made if it is not there.
    Raises:
        ModuleNotFoundError: there is no tensorboard; install `foreshock[tensorboard]`.
        OSError: log_dir cannot be written to.
    Cost:
        A kill loses what is younger than ten seconds.
    """

    def __init__(self, log_dir: str | os.PathLike[str]) -> None:
        self._log_dir = os.fspath(log_dir)
        self._writer = self._open(None)

    def _open(self, first_step: int | None) -> Any:
        with of_extra("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter
        return SummaryWriter(self._log_dir, purge_step=first_step, flush_secs=_FLUSH_S)

    def write(self, record: Record) -> None:
        """Adds its numbers, or what it says."""
        if is_measurement(record):
            for name, number in numbers_of(record).items():
                self._writer.add_scalar("/".join(("foreshock", *name)), number, record["step"])
            return
        again_from = _runs_again_from(record)
        if again_from is not None:
            self._writer.flush()
            # Only then: a writer that is closed opens a file of its own for every record it gets.
            before, self._writer = self._writer, self._open(again_from)
            before.close()
        self._writer.add_text(f"foreshock/{record['event']}", sentence_of(record), record["step"])

    def close(self) -> None:
        """Ends the event file."""
        self._writer.close()


def _runs_again_from(record: Record) -> int | None:
    """The first step that comes again after this event; None if none does."""
    step = {"rollback_success": "to_step", "resumed": "step"}.get(record["event"])
    return None if step is None else int(record[step])
