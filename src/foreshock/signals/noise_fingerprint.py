"""The noise fingerprint of a run as it goes, from a few numbers per step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from foreshock.signals.configuration import FingerprintSettings
from foreshock.signals.given_numbers import as_count, as_finite, as_number
from foreshock.signals.noise_statistics import Precursor, f_total
from foreshock.signals.noise_streams import (
    EntropyRateStream,
    NoiseSeries,
    ProcessivityStream,
    ThetaStream,
    checked_alignment,
    checked_norm,
)
from foreshock.signals.precursor import TwoSecondPrecursor
from foreshock.signals.saved_state import check_settings, saved_number

_INFINITIES = ("inf", "-inf")  # JSON has none


@dataclasses.dataclass(frozen=True)
class NoiseReading:
    """The fingerprint at one moment. None: not enough history yet."""

    theta: float | None
    """`theta_consistency` of the gradient noise against its reference."""
    theta_loss: float | None
    """The same of the loss residuals."""
    theta_healthy: float | None
    """Theta of the gradient noise's reference against itself, half by half: what to hold `theta`
    against, since that of healthy noise is nowhere near 1."""
    entropy_rate: float | None
    """`entropy_rate` of the gradient noise, in nats."""
    processivity: float | None
    """`processivity` of the gradient norms and step norms."""
    alignment: float | None
    """Mean of the last cos(-gradient, update) that were given."""
    f_total: float | None
    """w_s * entropy_rate + w_p * processivity."""
    precursor_z: float | None
    """Score of the precursor; inf if the last value was not finite."""
    precursor_alert: bool | None
    """Whether the precursor's score is over its threshold."""
    nonfinite: int
    """Losses and gradient norms so far that were not finite, and entered no window."""


class NoiseFingerprint:
    """Follows what the fluctuations of loss and gradient look like.

    >>> fingerprint = NoiseFingerprint()
    >>> for step in range(steps):
    ...     alert, score = fingerprint.update(time.monotonic(), loss, grad_norm, step_norm)
    ...     if step % 10 == 0:
    ...         reading = fingerprint.read()

    Gradient noise is the residual of ln(grad_norm), loss residuals that of the loss, to a running
    median; `NoiseSeries` says why. Its statistics are cheap to keep and not to compute: `update` at
    every step, `read` when someone looks.

    Args:
        settings: default `FingerprintSettings()`.
    Raises:
        TypeError: settings of another kind.
    Cost:
        `update` some 10 microseconds, `read` some 200; O(windows) of memory, no device.
    """

    def __init__(self, settings: FingerprintSettings | None = None) -> None:
        self._settings = chosen = _checked_settings(settings)
        self._gradient_noise = NoiseSeries(chosen.median_of, is_logarithmic=True)
        self._loss_noise = NoiseSeries(chosen.median_of)
        compared = (chosen.window, chosen.reference_steps, chosen.beta)
        self._theta = ThetaStream(*compared)
        self._theta_loss = ThetaStream(*compared)
        self._entropy = EntropyRateStream(chosen.entropy_window, shared_range=chosen.shared_range)
        self._processivity = ProcessivityStream(chosen.processivity_window)
        self._precursor = TwoSecondPrecursor(
            chosen.precursor_window_sec,
            chosen.precursor_z,
            baseline_sec=chosen.precursor_baseline_sec,
            min_count=chosen.precursor_min_count,
        )
        self._score: float | None = None
        self._steps = 0
        self._nonfinite = 0

    def update(
        self,
        timestamp_s: float,
        loss: float,
        grad_norm: float | None,
        step_norm: float | None = None,
        alignment: float | None = None,
    ) -> Precursor:
        """Takes in one step.

        Args:
            timestamp_s: when it was, of any clock that runs on, in seconds.
            loss: as it came; NaN and infinities are counted, alert, and enter nothing.
            grad_norm: total norm of the gradients before clipping; None if there were none.
            step_norm: norm of the update of all parameters; None if not known.
            alignment: cos(-gradient, update) from `update_alignment`; None if not known.
        Returns:
            (alert, score) of the precursor; (False, 0.0) while there is too little history.
        Raises:
            TypeError, ValueError: naming the argument, what was given and what is accepted; nothing
                was taken in.
        Cost:
            Some 10 microseconds.
        """
        timestamp_s, loss = as_finite(timestamp_s, "timestamp_s"), as_number(loss, "loss")
        norm = checked_norm(grad_norm, "grad_norm")
        step, cosine = checked_norm(step_norm, "step_norm"), checked_alignment(alignment)
        self._processivity.update(norm, step, cosine)
        self._take_noise(loss, norm)
        self._nonfinite += not math.isfinite(loss)
        self._nonfinite += grad_norm is not None and not math.isfinite(norm)
        self._steps += 1
        return self._look_ahead(timestamp_s, loss if self._watches_loss() else grad_norm)

    def note_update(self, grad_norm: float, step_norm: float, alignment: float) -> None:
        """Takes in what is known of a step only after its update.

        Args:
            grad_norm: of the gradients that the optimizer was given.
            step_norm: as for `update`, which is then not given it.
            alignment: likewise.
        Raises:
            TypeError, ValueError: naming the argument, what was given and what is accepted; nothing
                was taken in.
        """
        self._processivity.update(grad_norm, step_norm, alignment)

    def read(self) -> NoiseReading:
        """The fingerprint of this moment.

        Cost:
            Some 200 microseconds.
        """
        entropy, processivity = self._entropy.read(), self._processivity.read()
        total = None
        if entropy is not None and processivity is not None:
            total = f_total(entropy, processivity, self._settings.w_s, self._settings.w_p)
        return NoiseReading(
            theta=self._theta.read(),
            theta_loss=self._theta_loss.read(),
            theta_healthy=self._theta.reference.self_consistency(self._settings.beta),
            entropy_rate=entropy,
            processivity=processivity,
            alignment=self._processivity.alignment,
            f_total=total,
            precursor_z=self._score,
            precursor_alert=None if self._score is None else self._is_alert(self._score),
            nonfinite=self._nonfinite,
        )

    def load_reference(self, state_dict: Mapping[str, Any]) -> None:
        """Compares from now on with the healthy noise of an earlier run.

        Args:
            state_dict: of that run's fingerprint, of the same median_of and reference_steps, with
                its references complete.
        Raises:
            KeyError: an entry is missing.
            TypeError, ValueError: they cannot be compared with; nothing was loaded.
        """
        given = state_dict["settings"]
        for key in ("median_of", "reference_steps"):
            mine = getattr(self._settings, key)
            if given[key] != mine:
                raise ValueError(
                    f"state_dict['settings'][{key!r}] is {given[key]!r}; accepted: {mine!r}"
                )
        references = [state_dict[key]["reference"] for key in ("theta", "theta_loss")]
        fresh = NoiseFingerprint(self._settings)
        fresh._theta.load_reference(references[0])  # what does not fit is found before it is loaded
        fresh._theta_loss.load_reference(references[1])
        self._theta, self._theta_loss = fresh._theta, fresh._theta_loss

    def state_dict(self) -> dict[str, Any]:
        """Everything that later readings depend on.

        Returns:
            Numbers, strings, lists and dicts of them: it can be written as JSON and comes back the
            same.
        """
        return {
            "settings": self._settings.model_dump(),
            "steps": self._steps,
            "nonfinite": self._nonfinite,
            "score": str(self._score) if str(self._score) in _INFINITIES else self._score,
            **{name: stream.state_dict() for name, stream in self._streams().items()},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Makes later readings, bit for bit, those that the saved fingerprint would have given.

        Args:
            state_dict: from one of the same settings.
        Raises:
            KeyError: an entry is missing.
            TypeError, ValueError: it is another one's; nothing was loaded.
        """
        check_settings(state_dict, self._settings.model_dump())
        fresh = NoiseFingerprint(self._settings)
        for name, stream in fresh._streams().items():
            stream.load_state_dict(state_dict[name])
        fresh._steps = as_count(state_dict["steps"], "state_dict['steps']", at_least=0)
        fresh._nonfinite = as_count(state_dict["nonfinite"], "state_dict['nonfinite']", at_least=0)
        fresh._score = _saved_score(state_dict)
        vars(self).update(vars(fresh))

    def _streams(self) -> dict[str, Any]:
        return {
            "gradient_noise": self._gradient_noise,
            "loss_noise": self._loss_noise,
            "theta": self._theta,
            "theta_loss": self._theta_loss,
            "entropy_rate": self._entropy,
            "processivity": self._processivity,
            "precursor": self._precursor,
        }

    def _take_noise(self, loss: float, norm: float) -> None:
        noise, residual = self._gradient_noise.update(norm), self._loss_noise.update(loss)
        if self._steps < self._settings.reference_start:
            return
        if noise is not None:
            self._theta.update(noise)
            self._entropy.update(noise)
        if residual is not None:
            self._theta_loss.update(residual)

    def _look_ahead(self, timestamp_s: float, value: float | None) -> Precursor:
        if value is None:
            return Precursor(False, 0.0)
        seen = self._precursor.update(timestamp_s, value)
        is_judged = self._precursor.has_history or seen.alert
        self._score = seen.score if is_judged else None
        return seen

    def _watches_loss(self) -> bool:
        return self._settings.precursor_series == "loss"

    def _is_alert(self, score: float) -> bool:
        return score == math.inf or score > self._settings.precursor_z


def _checked_settings(settings: Any) -> FingerprintSettings:
    if settings is None:
        return FingerprintSettings()
    if not isinstance(settings, FingerprintSettings):
        given = type(settings).__name__
        raise TypeError(f"settings is a {given}; accepted: FingerprintSettings or None")
    return settings


def _saved_score(state_dict: Mapping[str, Any]) -> float | None:
    score = state_dict["score"]
    return float(score) if score in _INFINITIES else saved_number(state_dict, "score")
