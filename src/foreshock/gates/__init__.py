"""Rotations behind the layers of a model, and whether they stay what they are meant to be."""

from foreshock.gates.attachment import attach, detach, gates_of, renew
from foreshock.gates.configuration import GateSettings
from foreshock.gates.folding import Folded, fold
from foreshock.gates.gate import ConstantGate, SO8RotationGate
from foreshock.gates.gate_monitor import (
    AlphaLeftSchedule,
    GateEvent,
    GateMonitor,
    GateReading,
    GateState,
    OrthogonalityRose,
)
from foreshock.gates.orthogonality import measure, orthogonality_loss, share
from foreshock.gates.rotation import rotation_of
from foreshock.gates.schedule import AlphaSchedule

__all__ = [
    "AlphaLeftSchedule",
    "AlphaSchedule",
    "ConstantGate",
    "Folded",
    "GateEvent",
    "GateMonitor",
    "GateReading",
    "GateSettings",
    "GateState",
    "OrthogonalityRose",
    "SO8RotationGate",
    "attach",
    "detach",
    "fold",
    "gates_of",
    "measure",
    "orthogonality_loss",
    "renew",
    "rotation_of",
    "share",
]
