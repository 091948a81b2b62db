"""What each rule says of series made by hand, and what a NaN does to it (traps 1 and 2)."""

from __future__ import annotations

import copy
import dataclasses
import math
import random
from collections.abc import Callable, Sequence

import pytest

from foreshock.drill.campaign import RULES, RULES_BY_NAME
from foreshock.drill.observation import Observation
from foreshock.drill.peer_rules import (
    AnetPrecursor,
    ComposerNan,
    GradienceSlope,
    KillLossSpike,
    LightningSpikes,
    MadCusum,
    MegatronTenfold,
    MetaseqRatio,
    NormRatio,
    OlmoSkipStep,
    ZClip,
)
from foreshock.drill.rules import (
    GuardAtDefaults,
    LossThreshold,
    ModuleScan,
    NonfiniteScan,
    Over,
    Precursor,
    RanksDisagree,
    Rule,
    SpectralLevel,
    Spike,
)
from foreshock.guard import Guard, Reason
from foreshock.signals import RiskLevel, SpectralSettings

NAN = math.nan


def calm(n: int, seed: int = 0) -> list[float]:
    """Values around 1 with a spread of 0.05."""
    draw = random.Random(seed)
    return [1 + draw.gauss(0, 0.05) for _ in range(n)]


def said_of_losses(rule: Rule, losses: Sequence[float]) -> list[bool]:
    return [rule.update(i, Observation(i, loss=x)) for i, x in enumerate(losses)]


def said_of_norms(rule: Rule, norms: Sequence[float]) -> list[bool]:
    return [rule.update(i, Observation(i, grad_norm=x)) for i, x in enumerate(norms)]


def where(said: Sequence[bool]) -> list[int]:
    return [i for i, is_so in enumerate(said) if is_so]


# ---- ours


@pytest.mark.parametrize(
    "reason", [Reason.NONFINITE_WEIGHTS, Reason.NONFINITE_GRADIENT, Reason.NONFINITE_LOSS]
)
def test_the_nonfinite_scan_says_what_the_guard_says(reason: Reason) -> None:
    rule = NonfiniteScan()
    assert not rule.update(0, Observation(0, reasons=(Reason.LOSS_SPIKE,)))
    assert rule.update(1, Observation(1, reasons=(reason,)))
    assert not rule.update(2, Observation(2))


def test_the_module_scan_alarms_where_a_module_is_named() -> None:
    rule = ModuleScan()
    assert not rule.update(0, Observation(0))
    assert rule.update(1, Observation(1, module="middle"))


def test_the_loss_threshold_says_what_the_guard_says() -> None:
    rule = LossThreshold()
    assert not rule.update(0, Observation(0, loss=1e9))
    assert rule.update(1, Observation(1, reasons=(Reason.LOSS_OVER_THRESHOLD,)))


@pytest.mark.parametrize("reason", [Reason.LOSS_SPIKE, Reason.GRADIENT_SPIKE])
def test_our_spike_rule_sees_every_one_of_eight_in_a_row_and_is_not_blinded_by_nan(
    reason: Reason,
) -> None:
    said = said_of_losses if reason is Reason.LOSS_SPIKE else said_of_norms
    series = [*calm(200), *[10.0] * 8, *calm(20, 1), NAN, *calm(20, 2), 10.0]
    assert where(said(Spike(reason), series)) == [*range(200, 208), len(series) - 1]


def test_our_spike_rule_follows_the_guard_that_it_is_given() -> None:
    series = [*calm(200), 1.3]
    assert where(said_of_losses(Spike(Reason.LOSS_SPIKE, Guard(spike_z=4)), series)) == [200]
    assert where(said_of_losses(Spike(Reason.LOSS_SPIKE), series)) == []


def test_the_guard_as_a_whole_alarms_where_a_part_does() -> None:
    rule = GuardAtDefaults()
    for i, x in enumerate(calm(200)):
        assert not rule.update(i, Observation(i, loss=x))
    assert rule.update(200, Observation(200, loss=10.0))
    assert rule.update(201, Observation(201, reasons=(Reason.NONFINITE_WEIGHTS,)))
    assert rule.update(202, Observation(202, grad_norm=100.0))


def test_the_spectral_level_is_not_asked_in_the_first_steps() -> None:
    rule = SpectralLevel(RiskLevel.DANGER)
    levels = {10: RiskLevel.INSTABILITY, 400: RiskLevel.WARNING, 401: RiskLevel.DANGER}
    said = [s for s, level in levels.items() if rule.update(s, Observation(s, level=level))]
    assert said == [401]


@pytest.mark.parametrize("interval", [1, 50])
def test_the_spectral_level_follows_its_own_tracker(interval: int) -> None:
    rule = SpectralLevel(RiskLevel.INSTABILITY, interval, SpectralSettings())
    draw = random.Random(0)
    found = []
    for step in range(600):
        kappa = 20.0 if step < 455 else 20.0 * math.exp(draw.gauss(0, 0.1))
        seen = Observation(step, kappa=(kappa,), sigma_max=(1.0,), stable_rank=(4.0,))
        if rule.update(step, seen):
            found.append(step)
    assert found[0] in (range(455, 465) if interval == 1 else range(500, 510))


def test_the_precursor_alarms_on_a_rise_and_on_a_nan_but_not_after_it() -> None:
    said = said_of_losses(Precursor(), [*calm(200), *[1.5] * 20])
    assert 200 < where(said)[0] <= 220
    assert where(said_of_losses(Precursor(), [*calm(200), NAN, *calm(50, 1)])) == [200]


def test_a_number_is_over_its_limit_only_if_it_is_known() -> None:
    rule = Over(lambda seen: seen.max_attention_logit, 100.0, warmup=2)
    values = [500.0, 500.0, None, NAN, 100.0, 100.5, math.inf]
    said = [
        rule.update(i, Observation(i, max_attention_logit=value)) for i, value in enumerate(values)
    ]
    assert where(said) == [5, 6]


def test_ranks_that_disagree_are_an_alarm() -> None:
    rule = RanksDisagree()
    assert not rule.update(0, Observation(0))
    assert rule.update(1, Observation(1, do_ranks_agree=False))


# ---- the peers'


def test_olmo_skip_step_skips_a_spike_and_is_silent_for_64_steps() -> None:
    series = [*calm(40), 100.0, *calm(100, 1), 100.0, 1.0]
    assert where(said_of_losses(OlmoSkipStep(), series)) == [141]
    assert where(said_of_norms(OlmoSkipStep(), [*calm(100), 5.0])) == [100]


def test_olmo_skip_step_skips_128_clean_steps_after_one_nan() -> None:
    said = said_of_losses(OlmoSkipStep(), [*calm(200), NAN, *calm(200, 1)])
    assert where(said) == list(range(200, 200 + 129))


def test_olmo_skip_step_misses_the_last_of_eight_spikes_in_a_row() -> None:
    said = said_of_losses(OlmoSkipStep(), [*calm(200), *[10.0] * 8])
    assert where(said) == [200, 201, 202, 203]


def test_zclip_sees_spikes_after_its_warmup() -> None:
    series = [*calm(20), 9.0, *calm(60, 1), 9.0, 9.0, *calm(5, 2)]
    said = said_of_norms(ZClip(), [*calm(25), *series])
    assert {45, 106, 107} <= set(where(said))
    assert len(where(said)) < 10


def test_zclip_is_blind_for_ever_after_one_nan() -> None:
    said = said_of_norms(ZClip(), [*calm(100), NAN, *calm(500, 1), 1e6])
    assert not any(said[100:])


def test_lightning_sees_three_times_the_mean_of_ten() -> None:
    assert where(said_of_losses(LightningSpikes(), [1.0] * 5 + [2.9, 3.5, 5.0, 1.0])) == [7]
    assert where(said_of_losses(LightningSpikes(), [1.0, 3.0])) == [1]


def test_lightning_takes_nan_for_a_spike_only_with_finite_only() -> None:
    series = [*calm(20), NAN, *calm(5, 1), 100.0]
    assert where(said_of_losses(LightningSpikes(), series)) == [20, 26]
    assert where(said_of_losses(LightningSpikes(finite_only=False), series)) == []


def test_kill_loss_spike_wants_five_outliers_in_a_row() -> None:
    four = [*calm(120), *[3.0] * 4, *calm(10, 1)]
    assert where(said_of_losses(KillLossSpike(), four)) == []
    assert where(said_of_losses(KillLossSpike(), [*calm(120), *[3.0] * 6])) == [124, 125]


def test_kill_loss_spike_misses_everything_for_a_window_after_one_nan() -> None:
    said = said_of_losses(KillLossSpike(), [*calm(120), NAN, *[100.0] * 49])
    assert not any(said)


def test_kill_loss_spike_sees_half_a_window_over_the_cap() -> None:
    said = said_of_losses(KillLossSpike(cap=5.0), [*[4.0] * 60, *[7.0] * 60])
    assert where(said)[0] == 109


def test_megatron_wants_ten_times_the_largest_of_the_first_hundred() -> None:
    series = [*calm(99), 2.0, 19.0, 21.0, NAN, 21.0]
    assert where(said_of_losses(MegatronTenfold(), series)) == [101, 103]
    assert where(said_of_norms(MegatronTenfold(), series)) == [101, 103]


def test_megatron_is_not_blinded_by_a_nan_in_its_first_hundred() -> None:
    assert where(said_of_losses(MegatronTenfold(), [NAN, *calm(99), 50.0])) == [100]


def test_metaseq_ratio_sees_a_spike_and_not_a_nan_and_is_blind_after_it() -> None:
    assert where(said_of_losses(MetaseqRatio(), [*calm(20), 1.8, 1.8, 1.0])) == [20, 21]
    assert where(said_of_losses(MetaseqRatio(), [*calm(20), NAN, 100.0])) == []


def test_composer_sees_nan_and_nothing_else() -> None:
    assert where(said_of_losses(ComposerNan(), [1.0, math.inf, NAN, 1e9])) == [2]


def test_norm_ratio_has_a_budget_and_a_lock() -> None:
    said = said_of_norms(NormRatio(), [*calm(50), *[10.0] * 12])
    assert where(said) == list(range(50, 60))


def test_norm_ratio_is_blinded_by_a_nan() -> None:
    assert where(said_of_norms(NormRatio(), [*calm(50), NAN, *calm(20, 1), 10.0])) == []


def test_mad_cusum_sees_a_small_shift_that_lasts_and_not_a_nan() -> None:
    said = where(said_of_losses(MadCusum(), [*calm(150), NAN, *calm(50, 1), *[1.15] * 10]))
    assert said
    assert min(said) > 200


def test_anet_precursor_alarms_on_a_rise_and_for_ever_after_a_nan() -> None:
    said = said_of_losses(AnetPrecursor(), [*calm(100), *[1.5] * 20])
    assert 100 < where(said)[0] < 120
    said = said_of_losses(AnetPrecursor(), [*calm(100), NAN, *calm(50, 1)])
    assert where(said) == list(range(100, 151))


def test_gradience_slope_alarms_by_noise_of_the_restarts_alone() -> None:
    def said(kappas: Sequence[float]) -> list[bool]:
        rule = GradienceSlope()
        return [rule.update(i, Observation(i, restarted_kappa=k)) for i, k in enumerate(kappas)]

    assert not any(said([20.0] * 100))
    assert all(said([20 * x for x in calm(100)])[2:])
    assert said([20.0 + 0.005 * i for i in range(100)])[-1]
    assert not any(said([20.0, 21.0, NAN, *[20 * x for x in calm(40)]]))


# ---- all of them


def test_every_peer_of_the_list_is_there() -> None:
    peers = {entry.owner for entry in RULES} - {"foreshock"}
    assert peers == {
        "OLMo-core",
        "ZClip",
        "Lightning",
        "llm-foundry",
        "Megatron",
        "metaseq",
        "Composer",
        "GNMR",
        "statistics",
        "anet-lite",
        "Gradience",
    }
    assert len(RULES_BY_NAME) == len(RULES)


def healthy(step: int, draw: random.Random) -> Observation:
    return Observation(
        step,
        loss=1 + draw.gauss(0, 0.05),
        grad_norm=1 + draw.gauss(0, 0.05),
        kappa=(20.0, 12.0),
        sigma_max=(2.0, 1.0),
        stable_rank=(4.0, 9.0),
        restarted_kappa=20.0,
    )


@pytest.mark.parametrize("make", [pytest.param(entry.make, id=entry.name) for entry in RULES])
def test_a_deep_copy_of_a_rule_goes_on_as_the_rule_itself_does(make: Callable[[], Rule]) -> None:
    draw = random.Random(3)
    trace = [healthy(step, draw) for step in range(420)]
    wild = dataclasses.replace(trace[0], loss=30.0, grad_norm=50.0, kappa=(90.0, 1.0))
    trace[405:410] = [dataclasses.replace(wild, step=step) for step in range(405, 410)]
    rule = make()
    for seen in trace[:400]:
        rule.update(seen.step, seen)
    twin = copy.deepcopy(rule)
    ahead = [rule.update(seen.step, seen) for seen in trace[400:]]
    assert [twin.update(seen.step, seen) for seen in trace[400:]] == ahead
