"""The whole fingerprint of a run, a few numbers per step."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from typing import Any

import numpy as np
import pytest

from foreshock.signals import (
    FingerprintSettings,
    NoiseFingerprint,
    NoiseReading,
    NoiseSeries,
    TwoSecondPrecursor,
    entropy_rate,
    processivity,
    theta_consistency,
)

NAN, INF = math.nan, math.inf

SMALL = FingerprintSettings(
    window=24,
    reference_steps=16,
    median_of=11,
    entropy_window=10,
    processivity_window=12,
    precursor_min_count=8,
)


def steps_of(count: int, seed: int = 0) -> list[dict[str, float]]:
    rng = np.random.default_rng(seed)
    return [
        {
            "timestamp_s": 0.25 * i,
            "loss": 2 + rng.normal(scale=0.1),
            "grad_norm": math.exp(rng.normal(scale=0.2)),
            "step_norm": rng.uniform(),
            "alignment": rng.uniform(-1, 1),
        }
        for i in range(count)
    ]


def follow(fingerprint: NoiseFingerprint, steps: list[dict[str, float]]) -> NoiseReading:
    for step in steps:
        fingerprint.update(**step)
    return fingerprint.read()


def noise_of(values: list[float], **options: Any) -> list[float]:
    noise = NoiseSeries(11, **options)
    return [r for r in map(noise.update, values) if r is not None]


def test_a_reading_is_what_the_functions_say_of_the_last_windows() -> None:
    steps = steps_of(100)
    reading = follow(NoiseFingerprint(SMALL), steps)
    loss, grad_norm, step_norm, alignment = (
        [step[key] for step in steps] for key in ("loss", "grad_norm", "step_norm", "alignment")
    )
    noise, residuals = noise_of(grad_norm, is_logarithmic=True), noise_of(loss)
    assert reading.theta == theta_consistency(noise[-24:], noise[:16])
    assert reading.theta_loss == theta_consistency(residuals[-24:], residuals[:16])
    assert reading.theta_healthy == theta_consistency(noise[8:16], noise[:8])
    assert reading.entropy_rate == entropy_rate(noise, 10)
    assert reading.processivity == processivity(grad_norm[-12:], step_norm[-12:])
    assert reading.alignment == pytest.approx(np.mean(alignment[-12:]))
    assert reading.f_total == reading.entropy_rate + reading.processivity
    precursor = TwoSecondPrecursor(min_count=8)
    seen = [precursor.update(s["timestamp_s"], s["loss"]) for s in steps]
    assert (reading.precursor_alert, reading.precursor_z) == seen[-1]
    assert reading.nonfinite == 0


def test_settings_reach_what_they_set() -> None:
    steps = steps_of(120)
    settings = {"w_s": 2.0, "w_p": 0.5, "beta": 1.0, "shared_range": False}
    chosen = SMALL.model_copy(update={**settings, "precursor_series": "grad_norm"})
    one, usual = follow(NoiseFingerprint(chosen), steps), follow(NoiseFingerprint(SMALL), steps)
    noise = noise_of([s["grad_norm"] for s in steps], is_logarithmic=True)
    assert one.entropy_rate == entropy_rate(noise, 10, shared_range=False)
    assert one.f_total == 2 * one.entropy_rate + 0.5 * one.processivity
    assert one.theta == theta_consistency(noise[-24:], noise[:16], 1.0)
    precursor = TwoSecondPrecursor(min_count=8)
    seen = [precursor.update(s["timestamp_s"], s["grad_norm"]) for s in steps]
    assert one.precursor_z == seen[-1].score != usual.precursor_z
    late = SMALL.model_copy(update={"reference_start": 30})
    assert follow(NoiseFingerprint(late), steps).theta == theta_consistency(
        noise[-24:], noise[22:38]
    )


def test_what_is_not_known_yet_is_none() -> None:
    fingerprint = NoiseFingerprint()
    empty = (None,) * 9
    assert dataclasses.astuple(fingerprint.read()) == (*empty, 0)
    fingerprint.update(0.0, 2.0, 1.0)
    assert dataclasses.astuple(fingerprint.read()) == (*empty, 0)
    reading = follow(NoiseFingerprint(), [{**s, "step_norm": None} for s in steps_of(300)])
    assert reading.processivity is reading.f_total is None
    assert None not in (reading.theta, reading.entropy_rate, reading.precursor_z)


def test_steps_without_gradients_are_taken_in() -> None:
    steps = steps_of(100)
    without = [{**s, "grad_norm": None} if i % 4 == 0 else s for i, s in enumerate(steps)]
    reading = follow(NoiseFingerprint(SMALL), without)
    noise = noise_of([s["grad_norm"] for s in without if s["grad_norm"]], is_logarithmic=True)
    assert reading.theta == theta_consistency(noise[-24:], noise[:16])
    assert reading.nonfinite == 0


@pytest.mark.parametrize("bad", [NAN, INF])
def test_one_step_that_is_not_finite_alerts_and_does_not_blind(bad: float) -> None:
    steps = steps_of(200)
    clean, spoilt = NoiseFingerprint(SMALL), NoiseFingerprint(SMALL)
    for i, step in enumerate(steps):
        if i in (0, 5, 120):
            nothing = {"loss": bad, "grad_norm": bad, "step_norm": bad, "alignment": NAN}
            assert spoilt.update(**{**step, **nothing}) == (True, INF)
            assert (spoilt.read().precursor_alert, spoilt.read().precursor_z) == (True, INF)
        assert spoilt.update(**step) == clean.update(**step)
    assert dataclasses.replace(spoilt.read(), nonfinite=0) == clean.read()
    assert spoilt.read().nonfinite == 6
    assert None not in dataclasses.astuple(clean.read())


def test_noise_that_changes_its_rhythm_falls_below_the_healthy_one() -> None:
    """White noise that turns into an oscillation, as the gradients' at the edge of stability."""
    rng = np.random.default_rng(0)
    fingerprint = NoiseFingerprint()
    theta = []
    for i in range(900):
        wave = 3 * math.sin(2 * math.pi * i / 12) if i >= 600 else 0.0
        fingerprint.update(0.1 * i, 2.0, math.exp(0.1 * (rng.normal() + wave)))
        theta.append(fingerprint.read().theta if i % 20 == 0 else None)
    healthy = [t for t in theta[:600] if t is not None]
    late = [t for t in theta[760:] if t is not None]
    assert max(late) < min(healthy)


@pytest.mark.parametrize("cut", [0, 1, 20, 60, 150])
def test_a_restored_fingerprint_goes_on_as_the_saved_one(cut: int) -> None:
    steps = steps_of(250)
    steps[17]["loss"] = steps[cut - 1]["loss"] = NAN
    one, other = NoiseFingerprint(SMALL), NoiseFingerprint(SMALL)
    follow(one, steps[:cut])
    follow(other, steps[100:190])
    other.load_state_dict(json.loads(json.dumps(one.state_dict(), allow_nan=False)))
    assert other.read() == one.read()
    for step in steps[cut:]:
        assert one.update(**step) == other.update(**step)
    assert one.read() == other.read()
    assert one.state_dict() == other.state_dict()


def test_the_reference_of_an_earlier_run_is_compared_with() -> None:
    earlier, later = NoiseFingerprint(SMALL), NoiseFingerprint(SMALL)
    follow(earlier, steps_of(100, seed=1))
    later.load_reference(json.loads(json.dumps(earlier.state_dict())))
    reading = follow(later, steps_of(100, seed=2))
    noise = [
        noise_of([s["grad_norm"] for s in steps_of(100, seed=seed)], is_logarithmic=True)
        for seed in (1, 2)
    ]
    assert reading.theta == theta_consistency(noise[1][-24:], noise[0][:16])
    assert reading.theta_healthy == earlier.read().theta_healthy


def test_a_reference_that_does_not_fit_is_refused_and_nothing_is_loaded() -> None:
    fingerprint = NoiseFingerprint(SMALL)
    follow(fingerprint, steps_of(100))
    before = fingerprint.state_dict()
    unlike = NoiseFingerprint(SMALL.model_copy(update={"median_of": 13}))
    half = NoiseFingerprint(SMALL)
    follow(half, [{**s, "loss": NAN} for s in steps_of(100)])  # of the loss there is none
    for other, words in ((unlike, "median_of"), (half, "holds 0 values; accepted: 16")):
        with pytest.raises(ValueError, match=words):
            fingerprint.load_reference(other.state_dict())
        assert fingerprint.state_dict() == before


def test_memory_does_not_grow() -> None:
    fingerprint = NoiseFingerprint(SMALL)
    steps = steps_of(2000)
    follow(fingerprint, steps[:400])
    before = len(json.dumps(fingerprint.state_dict()))
    follow(fingerprint, steps)
    assert len(json.dumps(fingerprint.state_dict())) < 1.1 * before


def test_an_update_costs_next_to_nothing() -> None:
    """The claim is 20 us; the guard is twenty-five times that, for a busy machine."""
    fingerprint, steps = NoiseFingerprint(), steps_of(1000)
    follow(fingerprint, steps[:500])
    begun = time.process_time()
    for step in steps[500:]:
        fingerprint.update(**step)
    assert (time.process_time() - begun) / 500 < 500e-6


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"timestamp_s": NAN}, ValueError, "timestamp_s is nan; accepted"),
        ({"loss": "2"}, TypeError, "loss is '2'; accepted"),
        ({"loss": None}, TypeError, "loss is None; accepted"),
        ({"grad_norm": -1.0}, ValueError, "grad_norm is -1.0; accepted"),
        ({"step_norm": -1.0}, ValueError, "step_norm is -1.0; accepted"),
        ({"alignment": 2.0}, ValueError, "alignment is 2.0; accepted"),
    ],
)
def test_bad_steps_are_named_and_not_taken_in(arguments: Any, error: Any, words: str) -> None:
    fingerprint = NoiseFingerprint(SMALL)
    steps = steps_of(61)
    follow(fingerprint, steps[:60])
    before = fingerprint.state_dict()
    with pytest.raises(error, match=words):
        fingerprint.update(**{**steps[60], **arguments})
    assert fingerprint.state_dict() == before


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: NoiseFingerprint({}), TypeError, "settings is a dict; accepted"),  # type: ignore[arg-type]
        (lambda: FingerprintSettings(windw=5), ValueError, "did you mean 'window'"),
        (lambda: FingerprintSettings(beta=NAN), ValueError, "beta"),
        (lambda: FingerprintSettings(median_of=5), ValueError, "median_of"),
        (lambda: FingerprintSettings(w_s=INF), ValueError, "w_s"),
        (lambda: FingerprintSettings(precursor_series="logits"), ValueError, "precursor_series"),
        (lambda: FingerprintSettings(precursor_min_count=9000), ValueError, "precursor_min_count"),
        (
            lambda: NoiseFingerprint().load_state_dict(NoiseFingerprint(SMALL).state_dict()),
            ValueError,
            r"state_dict\['settings'\]",
        ),
    ],
)
def test_bad_configuration_is_named(call: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()
