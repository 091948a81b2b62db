"""Withholds bad updates, keeps copies of good state, and decides when to return to one."""

from foreshock.guard.configuration import Guard
from foreshock.guard.events import (
    Aborted,
    Action,
    AnomalySeen,
    Event,
    Offender,
    Reason,
    Recovered,
    RolledBack,
    SnapshotDropped,
    UpdateSkipped,
)
from foreshock.guard.inspection import Inspector
from foreshock.guard.learning_rate import LearningRateBackoff
from foreshock.guard.policy import Decision, Policy, Signs
from foreshock.guard.replay import BatchSource, BufferedSource, make_source
from foreshock.guard.snapshots import Snapshot, SnapshotRing
from foreshock.guard.state import (
    ModelState,
    OptimizerState,
    Part,
    RandomState,
    Stateful,
    StatefulPart,
)
from foreshock.guard.step_gate import StepGate

__all__ = [
    "Aborted",
    "Action",
    "AnomalySeen",
    "BatchSource",
    "BufferedSource",
    "Decision",
    "Event",
    "Guard",
    "Inspector",
    "LearningRateBackoff",
    "ModelState",
    "Offender",
    "OptimizerState",
    "Part",
    "Policy",
    "RandomState",
    "Reason",
    "Recovered",
    "RolledBack",
    "Signs",
    "Snapshot",
    "SnapshotDropped",
    "SnapshotRing",
    "Stateful",
    "StatefulPart",
    "StepGate",
    "UpdateSkipped",
    "make_source",
]
