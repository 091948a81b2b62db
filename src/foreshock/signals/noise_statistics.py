"""The noise fingerprint of a run: what its fluctuations look like, from series of numbers.

Values that are not finite are left out of every statistic, and leave no trace in it; only the
precursor answers them, with an alert.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from foreshock.signals.divergence import jensen_shannon
from foreshock.signals.given_numbers import as_count, as_finite, as_number, as_positive, as_series
from foreshock.signals.trend import Floats

Series = ArrayLike | Iterable[float]


class Precursor(NamedTuple):
    """What the precursor says of the present."""

    alert: bool
    score: float
    """Rise of the last seconds' mean, in standard deviations of what came before; inf for a value
    that is not finite, 0 while there is too little history."""


@dataclasses.dataclass(frozen=True)
class NoiseSnapshot:
    """The whole fingerprint at one moment."""

    theta: float
    """Likeness of the noise's spectrum to the reference's; `theta_consistency`."""
    entropy_rate: float
    """Change of entropy from one window to the next, in nats; `entropy_rate`."""
    processivity: float
    """Cosine of the series of gradient norms and step norms; `processivity`."""
    f_total: float
    """w_s * entropy_rate + w_p * processivity; `f_total`."""
    precursor_alert: bool
    """Whether the last seconds lie too high; `two_second_precursor`."""
    precursor_score: float
    """By how many standard deviations."""


def theta_consistency(noise_seq: Series, ref_seq: Series, beta: float = 3.0) -> float:
    """How much a noise's spectrum is like that of a reference.

    P(x) = |rfft(x - mean(x), n)|^2 / sum, n = next power of two >= the longer length, at least 2
    JSD(p, q) = KL(p|m)/2 + KL(q|m)/2, m = (p + q)/2, natural logarithm
    theta = exp(-beta * JSD(P(noise_seq), P(ref_seq)))

    Free of scale and offset of either series. Two independent series of one and the same process
    are NOT at 1: see the page on the fingerprint.

    Args:
        noise_seq: (n,) evenly spaced; values not finite are left out.
        ref_seq: (m,) likewise.
        beta: how fast unlikeness counts, from 0 up.
    Returns:
        From exp(-beta ln 2), nothing in common, to 1, the same spectrum. A series that does not
        vary has no spectrum: two of them are at 1, one of them and one that varies have nothing in
        common. With fewer than 2 values given for either, 1: nothing speaks against it.
    Raises:
        TypeError, ValueError: naming the argument, what was given and what is accepted.
    Cost:
        O(n log n); some 50 microseconds for 128 values.
    Source:
        foreshock's specification; Lin 1991 for the Jensen-Shannon divergence.
    """
    noise, reference = as_series(noise_seq, "noise_seq"), as_series(ref_seq, "ref_seq")
    beta = as_beta(beta)
    if min(len(noise), len(reference)) < 2:
        return 1.0
    noise, reference = noise[np.isfinite(noise)], reference[np.isfinite(reference)]
    nfft = 1 << (max(len(noise), len(reference), 2) - 1).bit_length()
    p, q = _spectrum(noise, nfft), _spectrum(reference, nfft)
    if p is None or q is None:
        return 1.0 if p is q else math.exp(-beta * math.log(2))
    return math.exp(-beta * jensen_shannon(p, q))


def entropy_rate(values: Series, window: int = 32, *, shared_range: bool = True) -> float:
    """By how much the last values are more disordered than those before them.

    entropy_rate = H(last window) - H(the window before it)
    H = -sum p ln p over the bins of a histogram with max(8, floor(sqrt(window))) bins

    Args:
        values: (n,); those not finite are left out.
        window: values per window.
        shared_range: whether both histograms span the joint range of both windows; if not, each
            spans its own, and a pure change of spread is invisible.
    Returns:
        In nats, from -ln(bins) to ln(bins); 0 with fewer than 2 * window values.
    Raises:
        TypeError, ValueError: naming the argument, what was given and what is accepted.
    Cost:
        O(window log bins); some 50 microseconds.
    Source:
        foreshock's specification; Shannon 1948.
    """
    window = as_count(window, "window")
    series = as_series(values, "values")
    series = series[np.isfinite(series)]
    if len(series) < 2 * window:
        return 0.0
    before, last = series[-2 * window : -window], series[-window:]
    bins = max(8, math.isqrt(window))
    if shared_range:
        both = series[-2 * window :]
        return _entropy(last, both, bins) - _entropy(before, both, bins)
    return _entropy(last, last, bins) - _entropy(before, before, bins)


def processivity(grad_norms: Series, step_norms: Series) -> float:
    """Whether the optimizer's steps are large when the gradients are.

    processivity = sum(g * s) / (|g| |s|)

    Norms are not negative, so that theirs lies between 0 and 1, and near 1 if both hardly vary.

    Args:
        grad_norms: (n,) any scale.
        step_norms: (n,) of the same steps; pairs of which one is not finite are left out.
    Returns:
        The cosine, from -1 to 1; 0 if either series is empty or all zeros.
    Raises:
        TypeError, ValueError: naming the argument, what was given and what is accepted; two series
            of different lengths that are not empty are an error.
    Cost:
        O(n).
    Source:
        foreshock's specification.
    """
    g, s = as_series(grad_norms, "grad_norms"), as_series(step_norms, "step_norms")
    if not len(g) or not len(s):
        return 0.0
    if len(g) != len(s):
        raise ValueError(
            f"step_norms holds {len(s)} values; accepted: {len(g)}, as many as grad_norms"
        )
    is_known = np.isfinite(g) & np.isfinite(s)
    g, s = _scaled(g[is_known]), _scaled(s[is_known])
    lengths = math.sqrt(float((g * g).sum())) * math.sqrt(float((s * s).sum()))
    if lengths == 0.0:
        return 0.0
    return min(max(float((g * s).sum()) / lengths, -1.0), 1.0)


def f_total(s_dot: float, p: float, w_s: float = 1.0, w_p: float = 1.0) -> float:
    """Disorder and processivity in one number.

    f_total = w_s * s_dot + w_p * p

    Args:
        s_dot: from `entropy_rate`.
        p: from `processivity`.
        w_s: weight of s_dot.
        w_p: weight of p.
    Raises:
        TypeError: not a number.
        ValueError: not finite; the two functions never are.
    Source:
        foreshock's specification.
    """
    s_dot, p = as_finite(s_dot, "s_dot"), as_finite(p, "p")
    return as_finite(w_s, "w_s") * s_dot + as_finite(w_p, "w_p") * p


def two_second_precursor(
    series: Series, rate_hz: float = 10, window_sec: float = 2.0, z: float = 2.5
) -> Precursor:
    """Whether the last two seconds lie higher than all that came before.

    score = (mean(last w) - mean(rest)) / (std(rest, ddof 0) + 1e-12), w = max(1, int(rate_hz *
    window_sec)); alert = score > z

    Args:
        series: (n,) evenly spaced in time, oldest first.
        rate_hz: values per second.
        window_sec: seconds that count as the present.
        z: score above which there is an alert.
    Returns:
        (alert, score). (False, 0.0) with fewer than 2 w values; (True, inf) if any value is not
        finite, however few there are.
    Raises:
        TypeError, ValueError: naming the argument, what was given and what is accepted.
    Cost:
        O(n).
    Source:
        foreshock's specification.
    """
    rate_hz, window_sec = as_positive(rate_hz, "rate_hz"), as_positive(window_sec, "window_sec")
    z = as_threshold(z)
    values = as_series(series, "series")
    if not np.isfinite(values).all():
        return Precursor(True, math.inf)
    w = max(1, int(min(rate_hz * window_sec, 2.0**62)))
    if len(values) < 2 * w:
        return Precursor(False, 0.0)
    score = rise(values[-w:], values[:-w])
    return Precursor(score > z, score)


def snapshot(
    noise_seq: Series,
    ref_seq: Series,
    grad_norms: Series,
    step_norms: Series,
    *,
    values: Series | None = None,
    series: Series | None = None,
    beta: float = 3.0,
    window: int = 32,
    shared_range: bool = True,
    w_s: float = 1.0,
    w_p: float = 1.0,
    rate_hz: float = 10,
    window_sec: float = 2.0,
    z: float = 2.5,
) -> NoiseSnapshot:
    """All of the fingerprint at once.

    Args:
        noise_seq: for `theta_consistency`.
        ref_seq: likewise.
        grad_norms: for `processivity`.
        step_norms: likewise.
        values: for `entropy_rate`; noise_seq if not given.
        series: for `two_second_precursor`; noise_seq if not given.
        beta: for `theta_consistency`.
        window: for `entropy_rate`.
        shared_range: likewise.
        w_s: for `f_total`.
        w_p: likewise.
        rate_hz: for `two_second_precursor`.
        window_sec: likewise.
        z: likewise.
    Raises:
        TypeError, ValueError: as those do.
    """
    noise = as_series(noise_seq, "noise_seq")
    s_dot = entropy_rate(noise if values is None else values, window, shared_range=shared_range)
    p = processivity(grad_norms, step_norms)
    watched = noise if series is None else series
    alert, score = two_second_precursor(watched, rate_hz, window_sec, z)
    theta = theta_consistency(noise, ref_seq, beta)
    return NoiseSnapshot(theta, s_dot, p, f_total(s_dot, p, w_s, w_p), alert, score)


def rise(last: Floats, rest: Floats) -> float:
    """The score of `two_second_precursor`, of finite values."""
    with np.errstate(all="ignore"):
        score = _rise(last, rest, 1.0)
        if math.isnan(score):
            # A power of two changes no digit.
            score = _rise(last, rest, 2.0**-600)
    return score


def as_beta(beta: Any) -> float:
    """A finite number from 0 up."""
    number = as_finite(beta, "beta", "a finite number from 0 up")
    if number < 0:
        raise ValueError(f"beta is {number}; accepted: a finite number from 0 up")
    return number


def as_threshold(z: Any) -> float:
    """Any number; inf switches alerts off, but for values that are not finite."""
    number = as_number(z, "z")
    if math.isnan(number):
        raise ValueError("z is nan; accepted: a number")
    return number


def _rise(last: Floats, rest: Floats, scale: float) -> float:
    """NaN if sums or squares are too large for a float."""
    if scale != 1.0:
        last, rest = last * scale, rest * scale
    mean = float(np.add.reduce(rest)) / len(rest)
    off = rest - mean
    off *= off
    deviation = math.sqrt(float(np.add.reduce(off)) / len(rest))
    risen = float(np.add.reduce(last)) / len(last) - mean
    if not math.isfinite(risen) or not math.isfinite(deviation):
        return math.nan
    score: np.float64 = np.float64(risen) / (deviation + 1e-12 * scale)  # may overflow
    return float(score)


def _spectrum(series: Floats, nfft: int) -> Floats | None:
    """Share of each frequency in the power; None for a series that does not vary."""
    if not len(series) or series.min() == series.max():
        return None
    off = _scaled(series)
    power: Floats = np.square(np.abs(np.fft.rfft(_scaled(off - off.mean()), nfft)))
    total = float(power.sum())
    return power / total if total > 0 else None


def _entropy(values: Floats, span: Floats, bins: int) -> float:
    """Of a histogram of the values with bins over the span; the last bin has both its ends."""
    low, high = float(span.min()), float(span.max())
    if not math.isfinite(high - low):
        return _entropy(values * 0.5, span * 0.5, bins)
    edges = np.linspace(low, high, bins + 1)
    place = np.searchsorted(edges[1:-1], values, side="right")
    count = np.bincount(place, minlength=bins)
    share = count[count > 0] / len(values)
    return float(-(share * np.log(share)).sum())


def _scaled(series: Floats) -> Floats:
    """Divided by the power of two at its largest magnitude: no digit changes, no square is inf."""
    if not len(series):
        return series
    exponent = math.frexp(float(np.abs(series).max()))[1]
    return np.ldexp(series, -exponent)
