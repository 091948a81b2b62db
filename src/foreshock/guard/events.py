"""What the guard decides (verbs), and what has happened (past tense)."""

from __future__ import annotations

import dataclasses
import enum
import math
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
    REPLICAS_DIFFER = "REPLICAS_DIFFER"
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
    """Of the tensor, or of the part of it that the rank holds."""
    ranks: tuple[int, ...] = ()
    """Where it was found: one, or several of which it cannot be told which is wrong; none where one
    process trains alone."""

    @property
    def rank(self) -> int | None:
        """Where it was found, if that is one rank."""
        return self.ranks[0] if len(self.ranks) == 1 else None

    def __str__(self) -> str:
        counts = [f"{n} {what}" for n, what in ((self.nan, "NaN"), (self.inf, "Inf")) if n]
        said = f"{' and '.join(counts)} of {self.numel} values" if counts else self._change()
        return f"{self.kind} {self.name}{self._where()}: {said}"

    def _where(self) -> str:
        if not self.ranks:
            return ""
        named = ", ".join(map(str, self.ranks))
        return f" on rank {named}" if len(self.ranks) == 1 else f" on ranks {named}"

    def _change(self) -> str:
        return "changed between two updates" if len(self.ranks) < 2 else "not the same"


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


@dataclasses.dataclass(frozen=True)
class GateAtRisk:
    """A rotation gate is less orthogonal than it may be, or off its schedule."""

    step: int
    gate: str
    what: Literal["orthogonality", "alpha"]
    value: float
    """|R^T R - I|_F of its worst block, or sigmoid(alpha)."""
    expected: float | None
    """Largest that may be, or what is planned; None: any number."""


@dataclasses.dataclass(frozen=True)
class StragglerSeen:
    """A rank takes longer for its own work than the others do, which wait for it."""

    step: int
    rank: int
    ratio: float
    """To the mean of the others."""


class Cause(enum.Enum):
    """What is known of a step that had failed, after it was to be run again."""

    TRANSIENT = "transient"
    """It did not fail again."""
    DETERMINISTIC = "deterministic"
    """It failed again."""
    NOT_REPLAYED = "not_replayed"
    """It was not run again."""


@dataclasses.dataclass(frozen=True)
class Symptoms:
    """What was wrong with a step, one of the times that it was run."""

    reasons: tuple[Reason, ...]
    offender: Offender | None
    loss: float | None


@dataclasses.dataclass(frozen=True)
class TensorSeen:
    """A tensor in numbers; min, max, mean and rms are of its finite values, None if it has none."""

    path: str
    """Where it stands: among inputs, outputs, parameters, or in the batch."""
    shape: tuple[int, ...]
    dtype: str
    nan: int
    inf: int
    min: float | None
    max: float | None
    mean: float | None
    rms: float | None

    @property
    def is_finite(self) -> bool:
        """Whether all of it is, or it may be a mask, of 0 and infinities."""
        is_mask = self.nan == 0 and self.min == self.max == 0
        return is_mask or self.nan + self.inf == 0


@dataclasses.dataclass(frozen=True)
class BatchSeen:
    """The batch of a step."""

    index: int
    """Counted from 0 over all epochs of the loop."""
    hash: str | None
    """Of its contents, as `hash_batch` gives it; None if there is nothing to hash."""
    tensors: tuple[TensorSeen, ...]
    """The first of them."""

    @property
    def has_nonfinite(self) -> bool:
        return not all(tensor.is_finite for tensor in self.tensors)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a step first went bad."""

    kind: Literal["before", "module", "loss", "gradient", "after", "not_located"]
    """before: parameter, buffer or gradient, when the step began. module: its output. loss: though
    every module was finite. gradient: though the loss was finite too. after: parameter or buffer,
    though the gradients were finite too."""
    name: str = ""
    """Of module, parameter or buffer; of the model as a whole it is empty."""
    type: str | None = None
    """Class of the module."""
    call: int | None = None
    """Which of its calls in this step it was, counted from 1."""
    had_finite_inputs: bool | None = None
    inputs: tuple[TensorSeen, ...] = ()
    outputs: tuple[TensorSeen, ...] = ()
    parameters: tuple[TensorSeen, ...] = ()
    """The module's own."""
    gradient: TensorSeen | None = None
    offender: Offender | None = None
    """What was found before or after."""
    why: str | None = None
    """It is not located."""


@dataclasses.dataclass(frozen=True)
class StepExamined:
    """A step that had failed was run again under hooks, or could not be."""

    step: int
    cause: Cause
    first: Symptoms
    """When it failed."""
    again: Symptoms | None = None
    """When it was run again."""
    place: Place | None = None
    """Where it went bad then; None if nothing was other than finite."""
    batch: BatchSeen | None = None
    to_step: int | None = None
    """Where the steps that were run again began."""
    lr_factor: float | None = None
    """On the learning rate in these steps; but for 1 they are not the same steps again."""
    why: str | None = None
    """It was not run again."""

    def __str__(self) -> str:
        if self.cause is Cause.NOT_REPLAYED:
            return f"not examined: {self.why}"
        if self.cause is Cause.DETERMINISTIC:
            return f"{self._what_is_wrong()} (deterministic)"
        if self.lr_factor == 1 or self.to_step == self.step:
            return "nothing is wrong when it is run again (transient: suspect the hardware)"
        rate = f"with the learning rate times {self.lr_factor:g}"
        return f"nothing is wrong when it is run again, {rate} (transient)"

    def _what_is_wrong(self) -> str:
        place = self.place
        batch = "it" if self.batch is None else f"batch {self.batch.index}"
        if place is None:
            reasons = () if self.again is None else self.again.reasons
            named = [reason.value for reason in reasons if reason not in _OF_POLICY]
            return f"{batch} fails again: {', '.join(named)}"
        if place.kind == "module":
            return self._what_is_wrong_in(place, batch)
        if place.kind == "loss":
            value = _what(math.isnan(self.again.loss or 0) if self.again else False)
            return f"{batch} makes the loss {value}, though every module's output is finite"
        if place.kind == "gradient" and place.gradient is not None:
            value = _what(place.gradient.nan)
            return (
                f"{batch} makes {value} in the gradient of {place.name}, though the loss is finite"
            )
        if place.offender is not None:
            value, name = _what(place.offender.nan), place.name
            name = f"the gradient of {name}" if place.offender.kind == "gradient" else name
            is_before = place.kind == "before"
            return (
                f"{name} holds {value} before it begins"
                if is_before
                else (f"{batch} leaves {value} in {name}")
            )
        return f"{batch} fails again, not located: {place.why}"

    def _what_is_wrong_in(self, place: Place, batch: str) -> str:
        name = place.name or "the model"
        if name.rpartition(".")[2].isdigit():
            name = f"{name} ({place.type})"
        value = _what(any(t.nan for t in place.outputs))
        own = [t for t in place.parameters if not t.is_finite]
        if own:
            return f"{own[0].path} of {name} holds {_what(own[0].nan)} when {batch} reaches it"
        if place.had_finite_inputs:
            return f"{batch} makes {value} in {name}"
        held = [] if self.batch is None else [t for t in self.batch.tensors if not t.is_finite]
        if held:
            return f"{batch} holds {_what(held[0].nan)}, and {name} is the first to be given it"
        return f"{batch} gives {name} what is not finite"


_OF_POLICY = (Reason.CONSECUTIVE_SKIPS, Reason.TOO_MANY_ROLLBACKS, Reason.NO_SNAPSHOT)
"""Reasons that are not found in a step but in those before."""


def _what(is_nan: object) -> str:
    return "NaN" if is_nan else "Inf"


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
    | GateAtRisk
    | StepExamined
    | StragglerSeen
)
