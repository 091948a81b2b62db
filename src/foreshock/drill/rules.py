"""Rules that say of each step whether something is wrong, and those that are ours.

A rule is a streaming object: what it says of a step depends on the steps before, not on later ones.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple, Protocol

from foreshock.drill.observation import Observation
from foreshock.guard import Guard, Reason
from foreshock.guard.spikes import SpikeDetector
from foreshock.signals import (
    FingerprintSettings,
    RiskLevel,
    RiskThresholds,
    SpectralSettings,
    SpectralTracker,
    TwoSecondPrecursor,
)

SPECTRAL_WARMUP = 300
"""As `MonitorSettings.spectral_warmup`."""
RMS_LIMIT = 2.3
"""What arXiv 2304.13013 calls an RMS spike."""
MUON_LIMIT = 1.0
SLOPE_LIMIT = 0.004
"""Of sigma_max and of the stable rank per step: that at which kappa is in DANGER."""
LOGIT_LIMIT = 100.0
"""At which QK-clip steps in (Kimi K2)."""


class Rule(Protocol):
    """Says of each step whether its alarm stands. A deep copy goes on by itself."""

    def update(self, step: int, seen: Observation) -> bool:
        """Takes in a step; steps come in order, none is left out."""


class NonfiniteScan:
    """Something in gradients, weights or loss is NaN or infinite; names the tensor."""

    _REASONS = frozenset(
        {Reason.NONFINITE_WEIGHTS, Reason.NONFINITE_GRADIENT, Reason.NONFINITE_LOSS}
    )

    def update(self, step: int, seen: Observation) -> bool:
        return not self._REASONS.isdisjoint(seen.reasons)


class ModuleScan:
    """The output of a module, or the batch, is NaN or infinite; names the module."""

    def update(self, step: int, seen: Observation) -> bool:
        return seen.module is not None


class LossThreshold:
    """The loss is over `Guard.violation_threshold`."""

    def update(self, step: int, seen: Observation) -> bool:
        return Reason.LOSS_OVER_THRESHOLD in seen.reasons


class Spike:
    """What the guard's spike detector says of the loss, or of the gradient norm."""

    def __init__(self, reason: Reason, guard: Guard | None = None) -> None:
        self._reason = reason
        self._guard = guard or Guard()
        self._detector = SpikeDetector(self._guard)

    def update(self, step: int, seen: Observation) -> bool:
        return self._reason in self._detector.update(seen.loss, seen.grad_norm)

    def __deepcopy__(self, memo: object) -> Spike:
        # The detector's window lives in memory that only it can copy.
        twin = Spike(self._reason, self._guard)
        twin._detector.load_state_dict(copy.deepcopy(self._detector.state_dict()))
        return twin


class GuardAtDefaults:
    """Everything that the guard looks at in each step: any of the rules above but the modules'."""

    def __init__(self) -> None:
        self._parts: list[Rule] = [NonfiniteScan(), LossThreshold(), *_spikes()]

    def update(self, step: int, seen: Observation) -> bool:
        found = [part.update(step, seen) for part in self._parts]  # each has to see every step
        return any(found)


def _spikes() -> list[Spike]:
    return [Spike(Reason.LOSS_SPIKE), Spike(Reason.GRADIENT_SPIKE)]


class SpectralLevel:
    """The spectral risk is at least `level`, after the steps in which no level is answered.

    Args:
        level: DANGER or INSTABILITY.
        interval: steps between looks, as long as the risk is below WARNING.
        settings: of the tracker, if not the defaults.
    """

    def __init__(
        self, level: RiskLevel, interval: int = 1, settings: SpectralSettings | None = None
    ) -> None:
        self._level = level
        self._interval = interval
        self._settings = settings
        self._is_as_observed = interval == 1 and settings is None
        self._tracker: SpectralTracker | None = None

    def update(self, step: int, seen: Observation) -> bool:
        level = seen.level if self._is_as_observed else self._look(step, seen)
        return step >= SPECTRAL_WARMUP and level >= self._level

    def _look(self, step: int, seen: Observation) -> RiskLevel:
        if self._tracker is None:
            names = [str(i) for i in range(len(seen.kappa))]
            self._tracker = SpectralTracker(names, self._settings)
        raw = self._tracker.raw_level or RiskLevel.STABLE
        is_restless = max(self._tracker.level, raw) >= RiskLevel.WARNING
        if step % self._interval == 0 or is_restless:
            self._tracker.update(step, seen.kappa, seen.sigma_max, seen.stable_rank)
        return self._tracker.level

    def __deepcopy__(self, memo: object) -> SpectralLevel:
        twin = SpectralLevel(self._level, self._interval, self._settings)
        if self._tracker is not None:
            saved = self._tracker.state_dict()
            twin._tracker = SpectralTracker(saved["names"], self._settings)
            twin._tracker.load_state_dict(saved)
        return twin


class Precursor:
    """The last two seconds of the loss lie too high, on a clock of 10 steps a second."""

    def __init__(self) -> None:
        given = FingerprintSettings()
        self._precursor = TwoSecondPrecursor(
            given.precursor_window_sec,
            given.precursor_z,
            baseline_sec=given.precursor_baseline_sec,
            min_count=given.precursor_min_count,
        )

    def update(self, step: int, seen: Observation) -> bool:
        return self._precursor.update(seen.time_s, seen.loss).alert


class Over:
    """A number of the step is over a limit; one that is not known, or not finite, is not.

    Args:
        of: the number.
        limit: above which the alarm stands.
        warmup: first steps in which it never does.
    """

    def __init__(
        self, of: Callable[[Observation], float | None], limit: float, warmup: int = 0
    ) -> None:
        self._of, self._limit, self._warmup = of, limit, warmup

    def update(self, step: int, seen: Observation) -> bool:
        value = self._of(seen)
        return value is not None and step >= self._warmup and value > self._limit


class RanksDisagree:
    """The ranks' parameters have different checksums."""

    def update(self, step: int, seen: Observation) -> bool:
        return not seen.do_ranks_agree


class RuleEntry(NamedTuple):
    """A rule of the drill."""

    name: str
    owner: str
    """Whose it is: foreshock, or a peer."""
    make: Callable[[], Rule]
    names: Callable[[Observation], str | None] | None = None
    """What it names as the culprit; None: it names nothing."""


def _slope(of: Callable[[Observation], float | None]) -> Callable[[], Rule]:
    return lambda: Over(of, SLOPE_LIMIT, SPECTRAL_WARMUP)


def _spike_at(reason: Reason, z: float) -> Spike:
    return Spike(reason, Guard(spike_z=z, spike_grad_z=z))


def _unstable_over(volatility: float) -> SpectralLevel:
    thresholds = RiskThresholds(instability=volatility)
    return SpectralLevel(RiskLevel.INSTABILITY, 1, SpectralSettings(thresholds=thresholds))


OURS = "foreshock"

OWN_RULES = [
    RuleEntry("guard, all of a step", OURS, GuardAtDefaults, lambda seen: seen.offender),
    RuleEntry("non-finite scan", OURS, NonfiniteScan, lambda seen: seen.offender),
    RuleEntry("module scan", OURS, ModuleScan, lambda seen: seen.module),
    RuleEntry("loss threshold", OURS, LossThreshold),
    RuleEntry("loss spike", OURS, lambda: Spike(Reason.LOSS_SPIKE)),
    RuleEntry("gradient spike", OURS, lambda: Spike(Reason.GRADIENT_SPIKE)),
    RuleEntry("loss spike, z over 5", OURS, lambda: _spike_at(Reason.LOSS_SPIKE, 5)),
    RuleEntry("gradient spike, z over 16", OURS, lambda: _spike_at(Reason.GRADIENT_SPIKE, 16)),
    RuleEntry("gradient spike, z over 8", OURS, lambda: _spike_at(Reason.GRADIENT_SPIKE, 8)),
    RuleEntry("spectral DANGER", OURS, lambda: SpectralLevel(RiskLevel.DANGER)),
    RuleEntry("spectral INSTABILITY", OURS, lambda: SpectralLevel(RiskLevel.INSTABILITY)),
    RuleEntry(
        "spectral INSTABILITY, interval 50",
        OURS,
        lambda: SpectralLevel(RiskLevel.INSTABILITY, interval=50),
    ),
    RuleEntry("spectral INSTABILITY over 0.01", OURS, lambda: _unstable_over(0.01)),
    RuleEntry("sigma growth", OURS, _slope(lambda seen: seen.sigma_growth)),
    RuleEntry("stable-rank fall", OURS, _slope(lambda seen: seen.stable_rank_fall)),
    RuleEntry("precursor", OURS, Precursor),
    RuleEntry("RMS_t", OURS, lambda: Over(lambda seen: seen.rms, RMS_LIMIT)),
    RuleEntry("RMS_t, worst tensor", OURS, lambda: Over(lambda s: s.rms_worst, RMS_LIMIT)),
    RuleEntry("RMS_t, worst tensor, over 4", OURS, lambda: Over(lambda s: s.rms_worst, 4.0)),
    RuleEntry("Muon ratio", OURS, lambda: Over(lambda seen: seen.muon_ratio, MUON_LIMIT)),
    RuleEntry("attention logit", OURS, lambda: Over(lambda s: s.max_attention_logit, LOGIT_LIMIT)),
    RuleEntry("ranks' checksums", OURS, RanksDisagree),
]
