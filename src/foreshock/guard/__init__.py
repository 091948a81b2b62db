"""Withholds bad updates, keeps copies of good state, and decides when to return to one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from foreshock.guard.autopsy import Autopsies
from foreshock.guard.clipping import clip_grad_norm_
from foreshock.guard.configuration import Guard
from foreshock.guard.consensus import Consensus, RankFailed, RanksLost, find_ranks
from foreshock.guard.events import (
    Aborted,
    Action,
    AnomalySeen,
    BatchSeen,
    Cause,
    Event,
    GateAtRisk,
    Offender,
    Place,
    Reason,
    Recovered,
    Response,
    Resumed,
    RiskAnswered,
    RiskLevelChanged,
    RolledBack,
    SnapshotDropped,
    SnapshotNotSaved,
    SnapshotSaved,
    StepExamined,
    StragglerSeen,
    Symptoms,
    TensorSeen,
    UpdateSkipped,
    Verdict,
)
from foreshock.guard.examination import Examination, batch_seen, hash_batch
from foreshock.guard.function_state import FunctionState, tensors_of
from foreshock.guard.history import RESERVED_NAMES, History
from foreshock.guard.inspection import Finding, Inspector, inspect_gradients, inspect_weights
from foreshock.guard.joint_watch import JointWatch
from foreshock.guard.lagging_watch import LaggingWatch, can_lag
from foreshock.guard.learning_rate import LearningRateBackoff, RateBehindFunctions
from foreshock.guard.policy import Decision, Policy, Signs
from foreshock.guard.replay import BatchSource, BufferedSource, make_source
from foreshock.guard.scaler_gate import ScalerGate
from foreshock.guard.snapshots import Snapshot, SnapshotRing
from foreshock.guard.spikes import SpikeDetector
from foreshock.guard.state import (
    GradientState,
    NamedTensors,
    OptimizerState,
    Part,
    RandomState,
    Stateful,
    StatefulPart,
    named_parameters,
)
from foreshock.guard.step_gate import StepGate
from foreshock.guard.watch import Seen, Watch

if TYPE_CHECKING:
    from foreshock.guard.snapshot_reader import SnapshotReader

__all__ = [
    "RESERVED_NAMES",
    "Aborted",
    "Action",
    "AnomalySeen",
    "Autopsies",
    "BatchSeen",
    "BatchSource",
    "BufferedSource",
    "Cause",
    "Consensus",
    "Decision",
    "Event",
    "Examination",
    "Finding",
    "FunctionState",
    "GateAtRisk",
    "GradientState",
    "Guard",
    "History",
    "Inspector",
    "JointWatch",
    "LaggingWatch",
    "LearningRateBackoff",
    "NamedTensors",
    "Offender",
    "OptimizerState",
    "Part",
    "Place",
    "Policy",
    "RandomState",
    "RankFailed",
    "RanksLost",
    "RateBehindFunctions",
    "Reason",
    "Recovered",
    "Response",
    "Resumed",
    "RiskAnswered",
    "RiskLevelChanged",
    "RolledBack",
    "ScalerGate",
    "Seen",
    "Signs",
    "Snapshot",
    "SnapshotDropped",
    "SnapshotNotSaved",
    "SnapshotReader",
    "SnapshotRing",
    "SnapshotSaved",
    "SpikeDetector",
    "Stateful",
    "StatefulPart",
    "StepExamined",
    "StepGate",
    "StragglerSeen",
    "Symptoms",
    "TensorSeen",
    "UpdateSkipped",
    "Verdict",
    "Watch",
    "batch_seen",
    "can_lag",
    "clip_grad_norm_",
    "find_ranks",
    "hash_batch",
    "inspect_gradients",
    "inspect_weights",
    "make_source",
    "named_parameters",
    "tensors_of",
]


def __getattr__(name: str) -> Any:
    # Loaded when first used: torch.distributed.checkpoint takes time to import.
    if name == "SnapshotReader":
        from foreshock.guard.snapshot_reader import SnapshotReader

        return SnapshotReader
    raise AttributeError(f"module 'foreshock.guard' has no attribute {name!r}")
