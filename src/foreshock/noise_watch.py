"""The noise fingerprint of the run that a monitor watches."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from foreshock.host_read import Later
from foreshock.records import write_atomically
from foreshock.records.strict_json import dump_json, load_json
from foreshock.signals import FingerprintSettings, NoiseFingerprint, update_alignment

_log = logging.getLogger("foreshock")

FILE_NAME = "fingerprint.json"

T = TypeVar("T")


class NoiseWatch:
    """Feeds a `NoiseFingerprint`, and looks now and then at what an update does.

    A fault in here ends the following of the noise, and nothing else.

    Args:
        parameters: that the optimizer updates.
        settings: of the fingerprint.
        alignment_interval: steps between looks at an update.
    Cost:
        Some 15 microseconds a step. A look at an update: a copy of the parameters, and one read of
        the copy, the parameters and the gradients.
    """

    def __init__(
        self,
        parameters: Sequence[torch.Tensor],
        settings: FingerprintSettings,
        alignment_interval: int,
    ) -> None:
        self._parameters = parameters
        self._fingerprint = NoiseFingerprint(settings)
        self._interval = alignment_interval
        self._before: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._found: Later | None = None
        self._is_broken = False

    def note_step(self, loss: float, grad_norm: float) -> None:
        """A step was judged."""
        self._safely(self._take_in_update)
        self._safely(lambda: self._fingerprint.update(time.monotonic(), loss, grad_norm))

    def note_update_begins(self, step: int) -> None:
        """An update is about to be made."""
        if step % self._interval == 0:
            self._safely(self._copy_parameters)

    def note_update_ends(self, was_made: bool) -> None:
        """It was made, or withheld."""
        if self._before and was_made:
            self._safely(self._look_at_update)
        self._before = []

    def telemetry(self) -> dict[str, float | bool | None]:
        """The fingerprint of this moment.

        Cost: some 200 microseconds.
        """
        now = self._safely(self._fingerprint.read)
        if now is None:
            return {}
        return {
            "theta": now.theta,
            "theta_healthy": now.theta_healthy,
            "entropy_rate": now.entropy_rate,
            "processivity": now.processivity,
            "alignment": now.alignment,
            "f_total": now.f_total,
            "precursor_z": now.precursor_z,
            "precursor_alert": now.precursor_alert,
        }

    def save(self, out_dir: Path) -> None:
        """Writes the fingerprint, for later runs to be compared with; a disk that does not take it
        is only warned of."""
        try:
            write_atomically(out_dir / FILE_NAME, dump_json(self._fingerprint.state_dict()))
        except OSError as error:
            _log.warning("%s could not be written: %s", FILE_NAME, error)

    def load_reference(self, out_dir: Path) -> None:
        """Compares from now on with the noise of an earlier run.

        Raises:
            ValueError: there is none in that directory that fits; says what is accepted.
        """
        file = out_dir / FILE_NAME
        try:
            self._fingerprint.load_reference(load_json(file.read_bytes()))
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"fingerprint_reference is {str(out_dir)!r}, but {FILE_NAME} there cannot be used "
                f"({error}); accepted: the directory of a finished run with the same fingerprint "
                "settings, long enough for its reference"
            ) from error

    def state_dict(self) -> dict[str, Any]:
        return self._fingerprint.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._fingerprint.load_state_dict(state_dict)

    def _copy_parameters(self) -> None:
        present = [p for p in self._parameters if p.grad is not None and not p.grad.is_sparse]
        self._before = [(p, p.detach().clone()) for p in present]

    def _look_at_update(self) -> None:
        after, before = zip(*self._before, strict=True)
        found = update_alignment(before, after, [p.grad for p in after])
        self._found = Later(torch.stack([found.grad_norm, found.step_norm, found.cosine]))

    def _take_in_update(self) -> None:
        """At the next step, so as not to wait for the device."""
        found, self._found = self._found, None
        if found is not None:
            self._fingerprint.note_update(*found.get().tolist())

    def _safely(self, work: Callable[[], T]) -> T | None:
        if self._is_broken:
            return None
        try:
            return work()
        except Exception:
            _log.exception("foreshock no longer follows the noise of the run")
            self._is_broken = True
            return None
