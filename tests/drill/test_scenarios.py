"""Each scenario does what it says, to the tensor it names, at its step, and nothing before."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from foreshock.drill import faults
from foreshock.drill.campaign import RULES_BY_NAME, Twin, run_struck, run_twin
from foreshock.drill.observation import Observation
from foreshock.drill.rehearsal import Rehearsal
from foreshock.drill.scenarios import SCENARIOS, Scenario, Variant
from foreshock.drill.scoring import standing, watch
from foreshock.drill.subjects import SUBJECTS
from foreshock.drill.trainee import Trainee

FAULT_STEP = 8
CASES = [
    pytest.param(subject, scenario, id=f"{scenario.name}-{subject}")
    for scenario in SCENARIOS.values()
    for subject in scenario.subjects
]
NONFINITE = [case for case in CASES if case.values[1].struck is not None]  # type: ignore[union-attr]

_FOUND: dict[tuple[str, Variant], tuple[Rehearsal, Twin]] = {}


def twin_of(subject: str, variant: Variant) -> tuple[Rehearsal, Twin]:
    """A healthy run, made once."""
    if (subject, variant) not in _FOUND:
        rehearsal = Rehearsal(SUBJECTS[subject], 0, variant)
        _FOUND[subject, variant] = rehearsal, run_twin(rehearsal, FAULT_STEP + 6, FAULT_STEP)
    return _FOUND[subject, variant]


@pytest.fixture(autouse=True, scope="module")
def forget() -> Iterator[None]:
    yield
    _FOUND.clear()


def tensors_of(on: Trainee) -> dict[str, torch.Tensor]:
    """Everything that a fault could change, by name."""
    found: dict[str, torch.Tensor] = {}
    for rank, replica in enumerate(on.replicas):
        for name, p in replica.model.named_parameters():
            found[f"rank {rank}, weight {name}"] = p
            if p.grad is not None:
                found[f"rank {rank}, gradient {name}"] = p.grad
            for key, moment in replica.optimizer.state[p].items():
                found[f"rank {rank}, {key} {name}"] = moment
    found["x"], found["y"] = on.batch
    return found


def numbers_of(on: Trainee) -> dict[str, float]:
    group = on.optimizer.param_groups[0]
    scale = 1.0 if on.scaler is None else on.scaler.get_scale()
    return {"lr": group["lr"], "eps": group["eps"], "scale": scale, "hooks": len(on._altering)}


@dataclasses.dataclass
class Spied:
    """What a scenario has changed when it struck."""

    step_of: list[int]
    changed: dict[str, int]
    """Elements that differ, by the tensor's name."""
    numbers: dict[str, tuple[float, float]]
    before: dict[str, torch.Tensor]
    after: dict[str, torch.Tensor]


def spy_on(scenario: Scenario, rehearsal: Rehearsal) -> tuple[Scenario, Spied]:
    spied = Spied([], {}, {}, {}, {})

    def inject(on: Trainee, age: int) -> None:
        spied.step_of.append(rehearsal.step)
        first = not spied.before
        before = {name: t.detach().clone() for name, t in tensors_of(on).items()}
        numbers = numbers_of(on)
        scenario.inject(on, age)
        if not first:
            return
        spied.before, spied.after = before, tensors_of(on)
        for name, t in spied.after.items():
            is_same = (t == before[name]) | ((t != t) & (before[name] != before[name]))
            if not is_same.all():
                spied.changed[name] = int((~is_same).sum())
        spied.after = {name: t.detach().clone() for name, t in spied.after.items()}
        now = numbers_of(on)
        spied.numbers = {k: (numbers[k], now[k]) for k in now if now[k] != numbers[k]}

    return dataclasses.replace(scenario, inject=inject), spied


def expected_of(name: str, subject: str) -> tuple[dict[str, int | None], set[str]]:
    """What a scenario changes: tensors, with the number of elements if it is fixed, and numbers."""
    struck = SUBJECTS[subject].struck_parameter
    weight, gradient = f"rank 0, weight {struck}", f"rank 0, gradient {struck}"
    first, second = f"rank 0, exp_avg {struck}", f"rank 0, exp_avg_sq {struck}"
    has_hooked_input = subject == "gpt"
    on_input: tuple[dict[str, int | None], set[str]] = (
        ({}, {"hooks"}) if has_hooked_input else ({"x": 1}, set())
    )
    table: dict[str, tuple[dict[str, int | None], set[str]]] = {
        **{f"{v}-weight": ({weight: 1}, set()) for v in ("nan", "inf", "exponent", "mantissa")},
        **{f"{v}-gradient": ({gradient: 1}, set()) for v in ("nan", "inf", "exponent", "mantissa")},
        **{f"{v}-activation": ({}, {"hooks"}) for v in ("nan", "inf")},
        **{f"{v}-input": on_input for v in ("nan", "inf")},
        "exponent-first-moment": ({first: 1}, set()),
        "mantissa-first-moment": ({first: 1}, set()),
        "exponent-second-moment": ({second: 1}, set()),
        "shuffled-labels": ({"y": None}, set()),
        "constant-input": ({"x": None}, set()),
        "scaled-input": ({} if has_hooked_input else {"x": None}, on_input[1]),
        "rate-x10": ({}, {"lr"}),
        "rate-x100": ({}, {"lr"}),
        "no-warmup": ({}, {"lr"}),
        "epsilon-too-small": ({second: None}, {"eps"}),
        "loss-scale-overflow": ({}, {"scale"}),
        "growing-logits": (
            {f"rank 0, weight {m}.qkv.weight": None for m in SUBJECTS[subject].attention_modules},
            set(),
        ),
        "lost-moments": (
            {
                f"rank 0, {moment} {p}": None
                for p, _ in Trainee(SUBJECTS[subject], 0).model.named_parameters()
                for moment in ("exp_avg", "exp_avg_sq")
            },
            set(),
        ),
        "corrupt-rank": ({f"rank 1, weight {struck}": 1}, set()),
    }
    return table[name]


def struck_by(subject: str, scenario: Scenario, steps: int = 3) -> tuple[list[Observation], Spied]:
    """The first steps with the fault, forked off the healthy twin."""
    rehearsal, twin = twin_of(subject, scenario.variant)
    start = 0 if scenario.is_from_start else FAULT_STEP
    if scenario.is_from_start:
        rehearsal = Rehearsal(SUBJECTS[subject], 0, scenario.variant)
    else:
        rehearsal.load_state(twin.state)
    rehearsal.trainee.reseed(scenario.name, 0)
    spying, spied = spy_on(scenario, rehearsal)
    return list(rehearsal.run(steps, spying, start)), spied


@pytest.mark.parametrize(("subject", "scenario"), CASES)
def test_a_scenario_changes_what_it_says_at_its_step_and_nothing_else(
    subject: str, scenario: Scenario
) -> None:
    _, spied = struck_by(subject, scenario)
    start = 0 if scenario.is_from_start else FAULT_STEP
    assert spied.step_of == [start + age for age in range(min(scenario.duration, 3))]
    tensors, numbers = expected_of(scenario.name, subject)
    assert set(spied.changed) == set(tensors)
    assert set(spied.numbers) == numbers
    for name, count in tensors.items():
        assert count is None or spied.changed[name] == count


@pytest.mark.parametrize(("subject", "scenario"), CASES)
def test_the_size_of_a_fault_is_the_one_it_tells_of(subject: str, scenario: Scenario) -> None:
    _, spied = struck_by(subject, scenario, steps=1)
    value = scenario.name.partition("-")[0]
    changed = [
        (spied.before[name][is_new].double(), spied.after[name][is_new].double())
        for name in spied.changed
        for is_new in [spied.after[name] != spied.before[name]]
    ]
    for before, after in changed:
        if value in ("nan", "inf"):
            assert bool(after.isnan().all() if value == "nan" else after.isinf().all())
        if value == "exponent":
            assert math.log2(float(after / before)) == 128
        if value == "mantissa" or scenario.name == "corrupt-rank":
            assert 4 / 3 <= max(float(after / before), float(before / after)) <= 1.5
    if scenario.name == "shuffled-labels":
        assert torch.equal(
            spied.after["y"].flatten().sort().values, spied.before["y"].flatten().sort().values
        )
    if scenario.name == "constant-input":
        assert len(spied.after["x"].unique()) == 1
    if scenario.name == "lost-moments":
        assert not any(after.any() for _, after in changed)
    factors = {"rate-x10": 10.0, "rate-x100": 100.0, "no-warmup": 21.0}
    if scenario.name in factors:
        before_lr, after_lr = spied.numbers["lr"]
        assert after_lr / before_lr == pytest.approx(factors[scenario.name])


@pytest.mark.parametrize(("subject", "scenario"), CASES)
def test_a_run_with_a_fault_is_its_twin_to_the_last_bit_until_then(
    subject: str, scenario: Scenario
) -> None:
    _, twin = twin_of(subject, scenario.variant)
    forked, _ = struck_by(subject, scenario, steps=2)
    if scenario.is_from_start:
        assert repr(forked[0]) == repr(twin.trace[0])  # the update of step 0 is the first to differ
        assert repr(forked[1]) != repr(twin.trace[1])
        return
    whole = Rehearsal(SUBJECTS[subject], 0, scenario.variant)
    list(whole.run(FAULT_STEP))
    saved = whole.state()
    assert repr(saved["trainee"]) == repr(twin.state["trainee"])
    for mine, twins in zip(
        whole.trainee.replicas, twin_of(subject, scenario.variant)[0].trainee.replicas, strict=True
    ):
        assert mine.model.state_dict().keys() == twins.model.state_dict().keys()
    whole.trainee.reseed(scenario.name, 0)
    unforked = list(whole.run(2, scenario, FAULT_STEP))
    assert repr(unforked) == repr(forked)


@pytest.mark.parametrize("variant", ["plain", "scaled", "replicated"])
@pytest.mark.parametrize("subject", list(SUBJECTS))
def test_without_a_fault_a_forked_run_goes_on_as_the_twin_did(
    subject: str, variant: Variant
) -> None:
    rehearsal, twin = twin_of(subject, variant)
    rehearsal.load_state(twin.state)
    assert repr(list(rehearsal.run(6))) == repr(twin.trace[FAULT_STEP:])
    assert all(seen.do_ranks_agree for seen in twin.trace)


@pytest.mark.parametrize(("subject", "scenario"), NONFINITE)
def test_a_nonfinite_fault_is_found_within_one_step_and_its_culprit_named(
    subject: str, scenario: Scenario
) -> None:
    seen, _ = struck_by(subject, scenario, steps=2)
    found = [s for s in seen if NONFINITE_SCAN.make().update(s.step, s)]
    assert found[0].step - FAULT_STEP <= 1
    culprits = scenario.culprits(SUBJECTS[subject])
    if scenario.struck in ("parameter", "gradient"):
        assert found[0].offender in culprits
    else:
        assert next(s.module for s in seen if s.module is not None) in culprits
        assert seen[0].module is not None


NONFINITE_SCAN = RULES_BY_NAME["non-finite scan"]


@pytest.mark.parametrize("subject", list(SUBJECTS))
def test_what_acts_by_default_is_silent_on_healthy_runs(subject: str) -> None:
    for seed in (1, 2):
        trace = list(Rehearsal(SUBJECTS[subject], seed).run(80))
        for rule in ("non-finite scan", "loss threshold", "loss spike", "module scan"):
            assert not any(standing(RULES_BY_NAME[rule].make(), trace)), rule


@pytest.mark.parametrize("subject", list(SUBJECTS))
def test_an_overflow_that_the_scaler_deals_with_is_no_alarm_of_the_guard(subject: str) -> None:
    rehearsal, twin = twin_of(subject, "scaled")
    scenario = SCENARIOS["loss-scale-overflow"]
    struck, start = run_struck(rehearsal, scenario, 0, twin, FAULT_STEP)
    assert math.isinf(struck[0].grad_norm)  # float16 has overflowed, and the scaler withholds
    assert math.isfinite(struck[-1].grad_norm)
    guard = watch(RULES_BY_NAME["non-finite scan"], twin.trace, FAULT_STEP)
    assert not any(guard.of_fault(struck, start))


@pytest.mark.parametrize("subject", list(SUBJECTS))
def test_ranks_agree_until_one_is_corrupt(subject: str) -> None:
    seen, _ = struck_by(subject, SCENARIOS["corrupt-rank"], steps=3)
    assert [s.do_ranks_agree for s in seen] == [False] * 3


def test_growing_logits_grow() -> None:
    rehearsal, twin = twin_of("gpt", "plain")
    rehearsal.load_state(twin.state)
    seen = list(rehearsal.run(20, SCENARIOS["growing-logits"], FAULT_STEP))
    first, last = seen[0].max_attention_logit, seen[-1].max_attention_logit
    assert first is not None
    assert last is not None
    assert last > 3 * first


def test_a_second_moment_that_is_too_small_shows_in_rms() -> None:
    for subject in SUBJECTS:
        seen, _ = struck_by(subject, SCENARIOS["epsilon-too-small"], steps=1)
        assert seen[0].rms_worst > 2.3


def test_a_flipped_bit_flips_back() -> None:
    weight = torch.tensor([0.5, -3.0])
    bits: tuple[faults.Bit, ...] = ("exponent", "mantissa")
    for bit in bits:
        faults.flip(weight, 1, bit)
        assert weight[1] != -3.0
        faults.flip(weight, 1, bit)
        assert weight.tolist() == [0.5, -3.0]


def test_the_digits_name_the_extra_that_brings_them(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from foreshock.drill import subjects

    missing: Any = None
    monkeypatch.setitem(sys.modules, "sklearn", missing)
    subjects.load_digits.cache_clear()
    with pytest.raises(ImportError, match=r"foreshock\[surprise\].*--model gpt"):
        subjects.load_digits()
