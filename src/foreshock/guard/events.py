"""What the guard decides (verbs), and what has happened (past tense)."""

from __future__ import annotations

import dataclasses
import enum
from typing import Literal

from foreshock.signals import RiskLevel


class Action(enum.Enum):
    """What is to be done about a step."""

    CONTINUE = "continue"
    SKIP = "skip"
    ROLL_BACK = "roll_back"
    ABORT = "abort"


class Reason(enum.Enum):
    """What is wrong with a step."""

    NONFINITE_WEIGHTS = "NONFINITE_WEIGHTS"
    NONFINITE_GRADIENT = "NONFINITE_GRADIENT"
    NONFINITE_LOSS = "NONFINITE_LOSS"
    LOSS_OVER_THRESHOLD = "LOSS_OVER_THRESHOLD"
    LOSS_SPIKE = "LOSS_SPIKE"
    GRADIENT_SPIKE = "GRADIENT_SPIKE"
    SPECTRAL_INSTABILITY = "SPECTRAL_INSTABILITY"
    STATE_CHANGED = "STATE_CHANGED"
    CONSECUTIVE_SKIPS = "CONSECUTIVE_SKIPS"
    TOO_MANY_ROLLBACKS = "TOO_MANY_ROLLBACKS"
    NO_SNAPSHOT = "NO_SNAPSHOT"


class Response(enum.Enum):
    """What is done about a risk, before anything has gone wrong."""

    TAKE_SNAPSHOT = "take_snapshot"
    LOWER_LEARNING_RATE = "lower_learning_rate"
    ROLL_BACK = "roll_back"


@dataclasses.dataclass(frozen=True)
class Offender:
    """The first tensor found with a value that is not finite, or changed when nothing may."""

    kind: Literal["parameter", "buffer", "gradient", "optimizer state"]
    name: str
    nan: int
    inf: int
    numel: int

    def __str__(self) -> str:
        counts = [f"{n} {what}" for n, what in ((self.nan, "NaN"), (self.inf, "Inf")) if n]
        if not counts:
            return f"{self.kind} {self.name}: changed between two updates"
        return f"{self.kind} {self.name}: {' and '.join(counts)} of {self.numel} values"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the monitor says of a step; true while training should go on."""

    step: int
    """The step that this is about."""
    action: Action = Action.CONTINUE
    """What was done about it; in observe mode, what would have been done."""
    reasons: tuple[Reason, ...] = ()
    offender: Offender | None = None
    """The first tensor found with a value that is not finite."""
    should_go_on: bool = True

    def __bool__(self) -> bool:
        return self.should_go_on


@dataclasses.dataclass(frozen=True)
class UpdateSkipped:
    """An update was withheld: parameters, moments and step counts are what they were."""

    step: int
    reasons: tuple[Reason, ...]
    offender: Offender | None


@dataclasses.dataclass(frozen=True)
class AnomalySeen:
    """A bad step on which nothing was done, since the mode or the moment did not allow it."""

    step: int
    would: Action
    reasons: tuple[Reason, ...]
    offender: Offender | None


@dataclasses.dataclass(frozen=True)
class RolledBack:
    """The state of an earlier step was restored."""

    step: int
    to_step: int
    reasons: tuple[Reason, ...]
    offender: Offender | None
    lr_factor: float


@dataclasses.dataclass(frozen=True)
class Recovered:
    """The step that had failed was passed."""

    step: int


@dataclasses.dataclass(frozen=True)
class SnapshotDropped:
    """A snapshot turned out not to be fit for use."""

    step: int
    why: str


@dataclasses.dataclass(frozen=True)
class SnapshotSaved:
    """A snapshot is on disk."""

    step: int
    path: str
    size_bytes: int


@dataclasses.dataclass(frozen=True)
class SnapshotNotSaved:
    """A snapshot did not get to the disk; in memory it is as good as before."""

    step: int
    why: str


@dataclasses.dataclass(frozen=True)
class Resumed:
    """The run goes on from a snapshot of an earlier process."""

    step: int
    path: str


@dataclasses.dataclass(frozen=True)
class Aborted:
    """Training was told to stop."""

    step: int
    reasons: tuple[Reason, ...]
    offender: Offender | None


@dataclasses.dataclass(frozen=True)
class RiskLevelChanged:
    """The spectra of the weights became more restless, or calmer."""

    step: int
    level: RiskLevel
    before: RiskLevel
    kappa: float
    slope: float | None
    volatility: float | None
    worst_layer: str | None


@dataclasses.dataclass(frozen=True)
class RiskAnswered:
    """What the level that has risen calls for; a rollback that is done is a `RolledBack`."""

    step: int
    level: RiskLevel
    response: Response
    is_done: bool
    """Or would be done, were the mode and the settings others."""
    lr_factor: float | None = None


Event = (
    UpdateSkipped
    | AnomalySeen
    | RolledBack
    | Recovered
    | SnapshotDropped
    | SnapshotSaved
    | SnapshotNotSaved
    | Resumed
    | Aborted
    | RiskLevelChanged
    | RiskAnswered
)
