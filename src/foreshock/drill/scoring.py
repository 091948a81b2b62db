"""How well a rule did on a trace: what it found, how early, and how often it cried for nothing."""

from __future__ import annotations

import copy
import dataclasses
import math
import statistics
from collections.abc import Iterable, Sequence

from foreshock.drill.observation import Observation
from foreshock.drill.rules import Rule, RuleEntry
from foreshock.drill.scenarios import WINDOW, Scenario
from foreshock.drill.subjects import Subject

_SMOOTHED = 20


@dataclasses.dataclass(frozen=True)
class Health:
    """A rule on a healthy run."""

    rule: str
    subject: str
    variant: str
    seed: int
    steps: int
    alarms: int
    """Times that it was raised."""
    standing: int
    """Steps on which it stood."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A rule on a run with a fault."""

    rule: str
    scenario: str
    subject: str
    seed: int
    start: int
    """Step of the fault."""
    alarm: int | None
    """Step on which the alarm was raised, within the window after the fault. Not one on which it
    was raised in the healthy twin as well: the batches are the same, and so are their false alarms.
    """
    doubled: int | None
    """Step on which the loss had doubled, within the window, or was not finite."""
    is_named: bool | None
    """Whether the culprit was named rightly; None: the rule names none, or there is none."""

    @property
    def delay(self) -> int | None:
        """Steps from the fault to the alarm."""
        return None if self.alarm is None else self.alarm - self.start

    @property
    def lead(self) -> int | None:
        """Steps from the alarm to the doubled loss; negative: the alarm came after it."""
        both = self.alarm is not None and self.doubled is not None
        return self.doubled - self.alarm if both else None  # type: ignore[operator]


@dataclasses.dataclass(frozen=True)
class Watching:
    """A rule on a healthy twin, and the rule as it was before the step of the fault."""

    entry: RuleEntry
    stands: list[bool]
    """Whether the alarm stands, step by step."""
    at_fault: Rule

    def of_fault(self, struck: Sequence[Observation], start: int) -> list[bool]:
        """Whether the alarm stands on a run that is the twin up to `start`, and then `struck`."""
        rule = copy.deepcopy(self.at_fault) if start else self.entry.make()
        return [*self.stands[:start], *standing(rule, struck)]


def standing(rule: Rule, trace: Iterable[Observation]) -> list[bool]:
    """Whether the rule's alarm stands, step by step; the rule moves on."""
    return [rule.update(seen.step, seen) for seen in trace]


def watch(entry: RuleEntry, twin: Sequence[Observation], fault_step: int) -> Watching:
    """Runs a rule over a healthy twin."""
    rule = entry.make()
    stands = standing(rule, twin[:fault_step])
    at_fault = copy.deepcopy(rule)
    return Watching(entry, stands + standing(rule, twin[fault_step:]), at_fault)


def raised(stands: Sequence[bool], start: int = 0, end: int | None = None) -> list[int]:
    """Steps of [start, end) on which the alarm stands and did not on the step before."""
    end = len(stands) if end is None else min(end, len(stands))
    return [i for i in range(start, end) if stands[i] and not (i and stands[i - 1])]


def doubled_step(
    losses: Sequence[float], twins: Sequence[float], start: int, window: int = WINDOW
) -> int | None:
    """First step from the fault on whose loss is twice that of the healthy twin, or not finite.

    Twice both the twin's loss of that step and the mean of its last 20: a batch that is hard for
    both has doubled nothing.

    Args:
        losses: of the run with the fault, from its first step.
        twins: of its twin, over at least as many steps.
        start: step of the fault.
        window: steps looked at.
    """
    for step in range(start, min(start + window, len(losses))):
        before = twins[max(0, step - _SMOOTHED + 1) : step + 1]
        healthy = max(twins[step], sum(before) / len(before))
        if not math.isfinite(losses[step]) or losses[step] > 2 * healthy:
            return step
    return None


def health_of(watching: Watching, subject: Subject, variant: str, seed: int) -> Health:
    """What the rule did on the healthy run."""
    rule, stands = watching.entry.name, watching.stands
    alarms = len(raised(stands))
    return Health(rule, subject.name, variant, seed, len(stands), alarms, sum(stands))


def case_of(
    watching: Watching,
    scenario: Scenario,
    subject: Subject,
    seed: int,
    struck: Sequence[Observation],
    twin: Sequence[Observation],
    start: int,
) -> Case:
    """What the rule did on a run with a fault.

    Args:
        watching: the rule on the healthy twin.
        struck: the run from the fault on.
        twin: the healthy twin, from its first step.
        start: step of the fault.
    """
    entry, window = watching.entry, (start, start + WINDOW)
    twin_alarms = set(raised(watching.stands, *window))
    stands = watching.of_fault(struck, start)
    found = [i for i in raised(stands, *window) if i not in twin_alarms]
    alarm = found[0] if found else None
    culprits = scenario.culprits(subject)
    named = None
    if alarm is not None and entry.names is not None and culprits:
        named = entry.names(struck[alarm - start]) in culprits
    losses = [seen.loss for seen in (*twin[:start], *struck)]
    doubled = doubled_step(losses, [seen.loss for seen in twin], start)
    where = (entry.name, scenario.name, subject.name, seed, start)
    return Case(*where, alarm, doubled, named)


@dataclasses.dataclass(frozen=True)
class Score:
    """A rule over many cases. Shares are None where there is nothing to be a share of."""

    rule: str
    cases: int
    detected: int
    median_delay: float | None
    doubled: int
    """Cases in which the loss doubled."""
    before: int
    """Of those, how many had the alarm before it did."""
    median_lead: float | None
    """Over the cases in which it doubled and there was an alarm."""
    named: int
    """Cases in which the culprit was named rightly."""
    nameable: int
    """Cases in which there was a culprit to name, and an alarm of a rule that names."""
    healthy_steps: int
    false_alarms: int
    standing: int

    @property
    def per_10_000(self) -> float | None:
        """False alarms in 10 000 healthy steps."""
        return 1e4 * self.false_alarms / self.healthy_steps if self.healthy_steps else None

    @property
    def standing_share(self) -> float | None:
        """Share of the healthy steps on which the alarm stood."""
        return self.standing / self.healthy_steps if self.healthy_steps else None


def score(rule: str, cases: Iterable[Case], healths: Iterable[Health]) -> Score:
    """Sums up what a rule did; cases and runs of other rules are passed over."""
    mine = [case for case in cases if case.rule == rule]
    healthy = [health for health in healths if health.rule == rule]
    leads = [case.lead for case in mine if case.lead is not None]
    delays = [case.delay for case in mine if case.delay is not None]
    return Score(
        rule=rule,
        cases=len(mine),
        detected=len(delays),
        median_delay=statistics.median(delays) if delays else None,
        doubled=sum(case.doubled is not None for case in mine),
        before=sum(lead > 0 for lead in leads),
        median_lead=statistics.median(leads) if leads else None,
        named=sum(case.is_named is True for case in mine),
        nameable=sum(case.is_named is not None for case in mine),
        healthy_steps=sum(health.steps for health in healthy),
        false_alarms=sum(health.alarms for health in healthy),
        standing=sum(health.standing for health in healthy),
    )
