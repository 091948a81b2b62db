"""The drill: every scenario on every training, every rule on every trace."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from foreshock.drill.observation import Observation
from foreshock.drill.peer_rules import PEER_RULES
from foreshock.drill.rehearsal import Rehearsal
from foreshock.drill.rules import OWN_RULES
from foreshock.drill.scenarios import SCENARIOS, WINDOW, Scenario, Variant
from foreshock.drill.scoring import Case, Health, case_of, health_of, watch
from foreshock.drill.subjects import SUBJECTS, Subject

RULES = [*OWN_RULES, *PEER_RULES]
"""Ours and the peers', in the order of the tables."""
RULES_BY_NAME = {entry.name: entry for entry in RULES}

Trace = list[Observation]
QUICK_HEALTHY_STEPS = 600


@dataclasses.dataclass(frozen=True)
class DrillOptions:
    """What is to be drilled.

    Raises:
        ValueError: naming the field, what was given and what is accepted.
    """

    scenarios: tuple[str, ...] = tuple(SCENARIOS)
    subjects: tuple[str, ...] = tuple(SUBJECTS)
    seeds: int = 7
    first_seed: int = 0
    fault_step: int = 400
    healthy_steps: int | None = None
    """Of each healthy twin; None: those of the subject."""

    def __post_init__(self) -> None:
        for field, known in (("scenarios", SCENARIOS), ("subjects", SUBJECTS)):
            given = getattr(self, field)
            for name in given:
                if name not in known:
                    raise ValueError(f"{field} has {name!r}; accepted: {', '.join(known)}")
            if not given:
                raise ValueError(f"{field} is empty; accepted: any of {', '.join(known)}")
        for field in ("seeds", "fault_step"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}; accepted: at least 1")
        least = self.fault_step + WINDOW
        if self.healthy_steps is not None and self.healthy_steps < least:
            raise ValueError(
                f"healthy_steps is {self.healthy_steps}; accepted: at least {least}, which is "
                f"fault_step + {WINDOW}, or None"
            )


def quickened(options: DrillOptions) -> DrillOptions:
    """One seed and short healthy twins."""
    steps = max(QUICK_HEALTHY_STEPS, options.fault_step + WINDOW)
    return dataclasses.replace(options, seeds=1, healthy_steps=steps)


@dataclasses.dataclass(frozen=True)
class DrillResults:
    """What came of it."""

    settings: dict[str, Any]
    cases: list[Case]
    healths: list[Health]


@dataclasses.dataclass(frozen=True)
class Twin:
    """A healthy run, and its state before the step of the fault."""

    trace: Trace
    state: dict[str, Any]


def run_twin(rehearsal: Rehearsal, steps: int, fault_step: int) -> Twin:
    """Trains without a fault."""
    trace = list(rehearsal.run(fault_step))
    state = rehearsal.state()
    trace += rehearsal.run(steps - fault_step)
    return Twin(trace, state)


def run_struck(
    rehearsal: Rehearsal, scenario: Scenario, seed: int, twin: Twin, fault_step: int
) -> tuple[Trace, int]:
    """Trains with the fault, from where the healthy twin stood before it.

    Returns:
        The trace from the fault on, and the step of the fault.
    """
    start = 0 if scenario.is_from_start else fault_step
    if scenario.is_from_start:
        rehearsal = Rehearsal(rehearsal.trainee.subject, seed, scenario.variant)
    else:
        rehearsal.load_state(twin.state)
    rehearsal.trainee.reseed(scenario.name, seed)
    return list(rehearsal.run(WINDOW, scenario, start)), start


def run_drill(
    options: DrillOptions, show: Callable[[str, int, int], None] = lambda what, done, of: None
) -> DrillResults:
    """Runs every scenario, and judges every rule on it.

    A run with a fault starts from the state that its healthy twin had before the fault: up to there
    they are the same, bit for bit.

    Args:
        options: what is drilled.
        show: called with what is being done, how many parts are done, and of how many.
    Cost:
        Some 10 ms a step on one core. The defaults take about a quarter of an hour, `quickened`
        about two minutes.
    """
    begun = time.monotonic()
    cases: list[Case] = []
    healths: list[Health] = []
    parts = [
        (SUBJECTS[name], seed)
        for seed in range(options.first_seed, options.first_seed + options.seeds)
        for name in options.subjects
    ]
    for done, (subject, seed) in enumerate(parts):
        what = f"{subject.name}, seed {seed}"
        show(what, done, len(parts))
        more_cases, more_healths = drill_one(options, subject, seed)
        cases += more_cases
        healths += more_healths
    show("done", len(parts), len(parts))
    settings = {
        **dataclasses.asdict(options),
        "window": WINDOW,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "seconds": round(time.monotonic() - begun, 1),
    }
    return DrillResults(settings, cases, healths)


def drill_one(
    options: DrillOptions, subject: Subject, seed: int
) -> tuple[list[Case], list[Health]]:
    """All scenarios of one training with one seed."""
    cases: list[Case] = []
    healths: list[Health] = []
    chosen = [SCENARIOS[name] for name in options.scenarios]
    for variant, scenarios in _by_variant(chosen, subject):
        steps = options.fault_step + WINDOW
        if variant == "plain":
            steps = max(steps, options.healthy_steps or subject.healthy_steps)
        rehearsal = Rehearsal(subject, seed, variant)
        twin = run_twin(rehearsal, steps, options.fault_step)
        rules = [entry for entry in RULES if _applies(entry.name, subject)]
        watching = [watch(entry, twin.trace, options.fault_step) for entry in rules]
        healths += [health_of(w, subject, variant, seed) for w in watching]
        for scenario in scenarios:
            struck, start = run_struck(rehearsal, scenario, seed, twin, options.fault_step)
            of = (scenario, subject, seed, struck, twin.trace, start)
            cases += [case_of(w, *of) for w in watching]
    return cases, healths


def _applies(rule: str, subject: Subject) -> bool:
    return rule != "attention logit" or bool(subject.attention_modules)


def _by_variant(
    chosen: Sequence[Scenario], subject: Subject
) -> Iterator[tuple[Variant, list[Scenario]]]:
    variants: tuple[Variant, ...] = ("plain", "scaled", "replicated")
    for variant in variants:
        fitting = [s for s in chosen if s.variant == variant and subject.name in s.subjects]
        if fitting:
            yield variant, fitting


ACTING = ("non-finite scan", "loss threshold")
"""Rules on which the guard acts by default."""


def broken_promises(results: DrillResults) -> list[str]:
    """What should have held in a drill and did not; empty if all did.

    - A fault that is not finite is found within a step: by the scan of gradients and weights, and
      if it struck one of them, by its name.
    - What acts by default has no false alarm.
    """
    broken = []
    for case in results.cases:
        scenario = SCENARIOS[case.scenario]
        where = f"{case.scenario} on {case.subject}, seed {case.seed}"
        if case.rule != "non-finite scan" or scenario.struck is None:
            continue
        if case.delay is None or case.delay > 1:
            broken.append(f"{where} was not found within a step")
        elif scenario.struck in ("parameter", "gradient") and not case.is_named:
            broken.append(f"{where} was found under another name")
    for health in results.healths:
        if health.rule in ACTING and health.alarms:
            where = f"{health.subject} ({health.variant}), seed {health.seed}"
            broken.append(f"{health.rule}: {health.alarms} false alarms on {where}")
    return broken
