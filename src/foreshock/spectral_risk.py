"""From the spectra of the weights to what is done about them."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any, TypeVar

from foreshock.guard import (
    Event,
    Guard,
    Response,
    RiskAnswered,
    RiskLevelChanged,
    Watch,
)
from foreshock.signals import RiskLevel, SpectralObservation, SpectralReading, SpectralWatch

_log = logging.getLogger("foreshock")

T = TypeVar("T")


class SpectralRisk:
    """Looks at the spectra when it is time to, and answers a level that has risen.

    A level that was reached while none is answered, and still holds after that, is answered then.

    Args:
        spectra: of the model's weights.
        watch: asked for what a level calls for.
        guard: whose mode says what can be done at all.
        warmup: first steps in which no level is answered.
        settling: steps after a rollback in which none is: the other learning rate bends the course
            of the spectra, and would be answered by one more rollback.
        lags: whether a look is read at the next step, so as not to wait for the device.
        may_act: whether answers are more than records.
        record: told of each event.
    """

    def __init__(
        self,
        spectra: SpectralWatch,
        watch: Watch,
        guard: Guard,
        warmup: int,
        settling: int,
        lags: bool,
        may_act: bool,
        record: Callable[[Event], None],
    ) -> None:
        self._spectra = spectra
        self._watch = watch
        self._quiet_until = warmup
        self._settling = settling
        self._lags = lags
        self._acts = may_act and guard.mode != "observe"
        self._takes_snapshots = self._acts and guard.mode == "recover"
        self._record = record
        self._seen: SpectralObservation | None = None
        self._highest = RiskLevel.STABLE
        self._answered = RiskLevel.STABLE

    @property
    def calls_for_telemetry(self) -> bool:
        """Whether the level is such that every step is to be told of."""
        return self._spectra.level >= RiskLevel.WARNING

    def look(self) -> bool:
        """Looks if it is time to, and answers what was seen; true: the state is to be rolled back.

        Cost: that of `SpectralWatch.observe`, if it is time.
        """
        if self._watch.are_spectra_lost:
            return False
        if self._lags:
            is_unstable = self._answer_what_is_seen()
            self._safely(self._begin_if_due)
            return is_unstable
        self._safely(self._begin_if_due)
        return self._answer_what_is_seen()

    def look_once_more(self) -> None:
        """At the end of a run, where there is nothing left to be answered."""
        self._take_in()
        if self._spectra.can_begin(self._watch.step):
            self._safely(self._begin)
            self._take_in()

    def _begin_if_due(self) -> None:
        if self._spectra.is_due(self._watch.step):
            self._begin()

    def _begin(self) -> None:
        self._spectra.begin(
            self._watch.step,
            is_stepped=self._watch.was_stepped,
            grad_scale=self._watch.pending_divisor,
        )

    def _answer_what_is_seen(self) -> bool:
        reading = self._take_in()
        if reading is None:
            return False
        self._answered = min(self._answered, reading.level)
        if reading.level <= self._answered or reading.step < self._quiet_until:
            return False
        self._answered = reading.level
        return self._answer(reading.step, reading.level)

    def _take_in(self) -> SpectralReading | None:
        """What was seen, if anything was; tells of a level that has changed."""
        before = self._spectra.level
        seen = self._safely(self._spectra.collect)
        if seen is None:
            return None
        self._seen = seen
        reading = seen.reading
        if reading.level is not before:
            measured = (reading.kappa, reading.slope, reading.volatility)
            changed = (reading.step, reading.level, before, *measured, _worst(reading))
            self._record(RiskLevelChanged(*changed))
        if reading.step >= self._quiet_until:
            self._highest = max(self._highest, reading.level)
        return reading

    def note_rollback(self, step: int) -> None:
        """The guard has rolled back from this step."""
        self._quiet_until = max(self._quiet_until, step + self._settling)
        self._answered = RiskLevel.STABLE

    def _safely(self, work: Callable[[], T]) -> T | None:
        """A fault in here ends the following of spectra, and nothing else."""
        if self._watch.are_spectra_lost:
            return None
        try:
            return work()
        except Exception:
            _log.exception("foreshock no longer follows the spectra of the weights")
            self._watch.lose_spectra()
            return None

    def _answer(self, step: int, level: RiskLevel) -> bool:
        if level is RiskLevel.INSTABILITY:
            if not self._acts:
                self._record(RiskAnswered(step, level, Response.ROLL_BACK, is_done=False))
            return self._acts
        if level >= RiskLevel.WARNING:
            is_taken = self._takes_snapshots
            self._record(RiskAnswered(step, level, Response.TAKE_SNAPSHOT, is_taken))
            if is_taken:
                self._watch.request_snapshot()
        if level is RiskLevel.DANGER:
            factor = self._watch.lower_learning_rate() if self._acts else None
            lowers = Response.LOWER_LEARNING_RATE
            self._record(RiskAnswered(step, level, lowers, self._acts, factor))
        return False

    def telemetry(self) -> dict[str, float | str | None]:
        """What was seen last; `spectral_step` says when."""
        if self._seen is None:
            return {}
        reading = self._seen.reading
        return {
            "spectral_step": reading.step,
            "spectral_kappa": _kappa(reading),
            "spectral_slope": reading.slope,
            "spectral_volatility": reading.volatility,
            "risk_level": reading.level.name,
            "worst_layer": _worst(reading),
            "sigma_growth": reading.sigma_growth,
            "stable_rank_fall": reading.stable_rank_fall,
            "muon_ratio": self._seen.muon_ratio,
            "second_moment_rms": self._seen.second_moment_rms,
        }

    def summary(self) -> dict[str, Any] | None:
        """The end of the story; None if there was nothing to look at."""
        if self._seen is None:
            return None
        reading = self._seen.reading
        return {
            "final_kappa": _kappa(reading),
            "final_risk_level": reading.level.name,
            "worst_layer": _worst(reading),
            "highest_risk_level": self._highest.name,
        }


def _kappa(reading: SpectralReading) -> float | None:
    return None if math.isnan(reading.kappa) else reading.kappa


def _worst(reading: SpectralReading) -> str | None:
    return reading.worst[0].name if reading.worst else None
