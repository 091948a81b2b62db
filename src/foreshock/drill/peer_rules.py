"""Rules of other projects, written from their definitions, weaknesses and all.

What a NaN does to each is part of its definition; where a definition leaves a number open, the
number is ours and is said to be.
"""

from __future__ import annotations

import math
import statistics
from collections import deque

from foreshock.drill.observation import Observation
from foreshock.drill.rules import Rule, RuleEntry
from foreshock.signals import RiskLevel, risk_level, two_second_precursor


class OlmoSkipStep:
    """OLMo-core: loss or gradient norm is not within mean + 6 std of the previous 128.

    Active from 64 values. A NaN within the window makes every comparison false, and so every step
    one that is not within.
    """

    def __init__(self, window: int = 128, least: int = 64, sigmas: float = 6.0) -> None:
        self._least, self._sigmas = least, sigmas
        self._windows: tuple[deque[float], ...] = (deque(maxlen=window), deque(maxlen=window))

    def update(self, step: int, seen: Observation) -> bool:
        values = (seen.loss, seen.grad_norm)
        pairs = list(zip(self._windows, values, strict=True))
        is_active = len(self._windows[0]) >= self._least
        is_skipped = is_active and not all(self._is_within(w, v) for w, v in pairs)
        for window, value in pairs:
            window.append(value)
        return is_skipped

    def _is_within(self, window: deque[float], value: float) -> bool:
        mean = sum(window) / len(window)
        spread = math.sqrt(sum((x - mean) ** 2 for x in window) / (len(window) - 1))
        return value <= mean + self._sigmas * spread


class ZClip:
    """ZClip: z of the gradient norm over 2.5, by running mean and variance, alpha 0.97.

    They start from the first 25 norms. A spike enters them clipped, to mean + 2.5 / (z / 2.5) std;
    a NaN enters as it is, and stays for ever.
    """

    def __init__(self, alpha: float = 0.97, z: float = 2.5, warmup: int = 25) -> None:
        self._alpha, self._z, self._warmup = alpha, z, warmup
        self._first: list[float] = []
        self._mean = self._variance = 0.0

    def update(self, step: int, seen: Observation) -> bool:
        norm = seen.grad_norm
        if len(self._first) < self._warmup:
            self._first.append(norm)
            if len(self._first) == self._warmup:
                self._mean = sum(self._first) / self._warmup
                self._variance = sum((x - self._mean) ** 2 for x in self._first) / self._warmup
            return False
        spread = math.sqrt(self._variance)
        z = (norm - self._mean) / (spread + 1e-6)
        is_spike = z > self._z
        if is_spike:
            norm = self._mean + self._z * spread / (z / self._z)
        self._mean += (1 - self._alpha) * (norm - self._mean)
        self._variance *= self._alpha
        self._variance += (1 - self._alpha) * (norm - self._mean) ** 2
        return is_spike


class LightningSpikes:
    """Lightning SpikeDetection: loss at least 3 times the mean of the last 10, from the second on.

    `finite_only`, its default, takes what is not finite for a spike; without it a NaN is none. A
    spike does not enter the mean.
    """

    def __init__(self, window: int = 10, warmup: int = 1, finite_only: bool = True) -> None:
        self._warmup, self._finite_only = warmup, finite_only
        self._window: deque[float] = deque(maxlen=window)

    def update(self, step: int, seen: Observation) -> bool:
        is_warm = len(self._window) >= self._warmup
        if is_warm and self._is_spike(seen.loss):
            return True
        self._window.append(seen.loss)
        return False

    def _is_spike(self, loss: float) -> bool:
        if self._finite_only and not math.isfinite(loss):
            return True
        return loss >= 3 * sum(self._window) / len(self._window)


class KillLossSpike:
    """llm-foundry KillLossSpike: 5 losses in a row over twice the running mean.

    Or half of the window over a cap on the loss. The window is max(100, 5 % of the steps). What is
    compared with is the mean of the window before; a NaN in it makes every comparison false.

    Args:
        steps: planned; 2000, ours.
        cap: 10, ours.
    """

    def __init__(self, steps: int = 2000, cap: float = 10.0) -> None:
        self._window: deque[float] = deque(maxlen=max(100, steps // 20))
        self._cap = cap
        self._in_a_row = 0

    def update(self, step: int, seen: Observation) -> bool:
        window = self._window
        is_full = len(window) == window.maxlen
        mean = sum(window) / len(window) if window else math.nan
        is_outlier = is_full and seen.loss >= 2 * mean
        self._in_a_row = self._in_a_row + 1 if is_outlier else 0
        window.append(seen.loss)
        is_too_high = is_full and sum(x > self._cap for x in window) >= len(window) / 2
        return self._in_a_row >= 5 or is_too_high


class MegatronTenfold:
    """Megatron: a value over 10 times the largest |x| of the first 100; ours: loss or norm.

    A NaN is over nothing, and largest of nothing.
    """

    def __init__(self, samples: int = 100, factor: float = 10.0) -> None:
        self._samples, self._factor = samples, factor
        self._largest = [0.0, 0.0]
        self._count = 0

    def update(self, step: int, seen: Observation) -> bool:
        values = (abs(seen.loss), abs(seen.grad_norm))
        self._count += 1
        if self._count <= self._samples:
            pairs = zip(values, self._largest, strict=True)
            self._largest = [v if v > most else most for v, most in pairs]
            return False
        pairs = zip(values, self._largest, strict=True)
        return any(v > self._factor * most for v, most in pairs)


class MetaseqRatio:
    """metaseq: the loss over its exponential mean (span 9) is over a limit; ours: 1.5.

    A spike does not enter the mean; a NaN does, and stays for ever.
    """

    def __init__(self, limit: float = 1.5, span: int = 9) -> None:
        self._limit, self._alpha = limit, 2 / (span + 1)
        self._mean: float | None = None

    def update(self, step: int, seen: Observation) -> bool:
        if self._mean is None:
            self._mean = seen.loss
        if self._mean and seen.loss / self._mean > self._limit:
            return True
        self._mean += self._alpha * (seen.loss - self._mean)
        return False


class ComposerNan:
    """Composer NaNMonitor: the loss is NaN. An infinite one is not."""

    def update(self, step: int, seen: Observation) -> bool:
        return math.isnan(seen.loss)


class NormRatio:
    """GNMR: the gradient norm over its mean, with a budget and a lock.

    All numbers are ours: 3 times the mean of the last 100 accepted ones, from 20 on; at most 10
    alarms in 100 steps, after which it is locked for 100. A NaN is over nothing, enters, and
    blinds.
    """

    def __init__(
        self, ratio: float = 3.0, window: int = 100, least: int = 20, budget: int = 10
    ) -> None:
        self._ratio, self._least, self._budget = ratio, least, budget
        self._norms: deque[float] = deque(maxlen=window)
        self._alarms: deque[int] = deque()
        self._span = window
        self._locked_until = 0

    def update(self, step: int, seen: Observation) -> bool:
        norms = self._norms
        is_known = len(norms) >= self._least
        is_over = is_known and seen.grad_norm > self._ratio * sum(norms) / len(norms)
        if not is_over or step < self._locked_until:
            norms.append(seen.grad_norm)
            return False
        while self._alarms and self._alarms[0] <= step - self._span:
            self._alarms.popleft()
        if len(self._alarms) >= self._budget:
            self._locked_until = step + self._span
            return False
        self._alarms.append(step)
        return True


class MadCusum:
    """median / MAD over 200 with CUSUM: slack 1, threshold 6.

    sum = max(0, sum + (loss - median) / (1.4826 MAD) - 1), an alarm over 6, upon which the sum
    starts anew. Ours: from 50 values on. A NaN enters neither window nor sum.
    """

    def __init__(self, window: int = 200, slack: float = 1.0, threshold: float = 6.0) -> None:
        self._slack, self._threshold = slack, threshold
        self._losses: deque[float] = deque(maxlen=window)
        self._sum = 0.0

    def update(self, step: int, seen: Observation) -> bool:
        loss = seen.loss
        if not math.isfinite(loss):
            return False
        is_over = False
        if len(self._losses) >= 50:
            middle = statistics.median(self._losses)
            spread = 1.4826 * statistics.median(abs(x - middle) for x in self._losses)
            score = (loss - middle) / (spread + 1e-12)
            self._sum = max(0.0, self._sum + score - self._slack)
            is_over = self._sum > self._threshold
            self._sum = 0.0 if is_over else self._sum
        self._losses.append(loss)
        return is_over


class AnetPrecursor:
    """anet-lite two_second_precursor: the last 20 losses against all before, z 2.5.

    The whole series is held. A NaN in it is an alert for as long as it is there, which is for ever.
    """

    def __init__(self) -> None:
        self._losses: list[float] = []

    def update(self, step: int, seen: Observation) -> bool:
        self._losses.append(seen.loss)
        return two_second_precursor(self._losses).alert


class GradienceSlope:
    """Gradience: kappa of the first matrix, by power iteration from a random start each time.

    Slope of kappa over 50 observations over 0.004, or its standard deviation over 0.003. A NaN
    makes both NaN, which is over nothing.
    """

    def __init__(self, window: int = 50) -> None:
        self._kappas: deque[float] = deque(maxlen=window)

    def update(self, step: int, seen: Observation) -> bool:
        self._kappas.append(seen.restarted_kappa)
        n = len(self._kappas)
        if n < 3 or not all(map(math.isfinite, self._kappas)):
            return False
        mean, middle = sum(self._kappas) / n, (n - 1) / 2
        rise = sum((i - middle) * k for i, k in enumerate(self._kappas))
        slope = rise / sum((i - middle) ** 2 for i in range(n))
        spread = math.sqrt(sum((k - mean) ** 2 for k in self._kappas) / n)
        level = risk_level(slope, spread)
        return level is not None and level >= RiskLevel.DANGER


PEER_RULES = [
    RuleEntry("SkipStep", "OLMo-core", OlmoSkipStep),
    RuleEntry("ZClip", "ZClip", ZClip),
    RuleEntry("SpikeDetection", "Lightning", LightningSpikes),
    RuleEntry("KillLossSpike", "llm-foundry", KillLossSpike),
    RuleEntry("tenfold", "Megatron", MegatronTenfold),
    RuleEntry("loss ratio", "metaseq", MetaseqRatio),
    RuleEntry("NaNMonitor", "Composer", ComposerNan),
    RuleEntry("norm ratio", "GNMR", NormRatio),
    RuleEntry("MAD and CUSUM", "statistics", MadCusum),
    RuleEntry("two_second_precursor", "anet-lite", AnetPrecursor),
    RuleEntry("kappa slope", "Gradience", GradienceSlope),
]

__all__ = ["PEER_RULES", "Rule"]
