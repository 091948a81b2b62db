"""What was wrong with a step that made a rollback necessary, found when it is run again."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch

from foreshock.guard.events import (
    BatchSeen,
    Cause,
    Offender,
    Reason,
    RolledBack,
    StepExamined,
    Symptoms,
    Verdict,
)
from foreshock.guard.examination import Examination, batch_seen
from foreshock.guard.inspection import Inspector

_log = logging.getLogger("foreshock")


@dataclasses.dataclass(eq=False)
class _Case:
    step: int
    first: Symptoms
    to_step: int | None = None
    lr_factor: float | None = None
    examination: Examination | None = None
    batch: BatchSeen | None = None
    spikes: tuple[Reason, ...] = ()
    """That were only recorded."""
    has_begun: bool = False


class Autopsies:
    """The steps that have failed, from the rollback until the loop has come by them again.

    Such a step runs once more under hooks (`Examination`), from when its batch is handed out until
    it is judged. If it fails again it is `deterministic`, and where it first went bad is told; if
    it passes, `transient`. One that fails yet again is not examined yet again.

    A fault in here is logged, once, and goes no further.

    Args:
        model, parameters: under hooks in such a step.
        weights, gradients: inspect the state before it.
        record: told of each `StepExamined`.
    Cost:
        Nothing until a rollback. In the step, as `Examination`, and one read of batch and state.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        parameters: Mapping[str, torch.Tensor],
        weights: Inspector,
        gradients: Inspector,
        record: Callable[[StepExamined], None],
    ) -> None:
        self._model = model
        self._parameters = parameters
        self._weights = weights
        self._gradients = gradients
        self._record = record
        self._cases: dict[int, _Case] = {}
        self._settled: set[int] = set()
        """Steps that failed again, and have not been passed since."""
        self._on: _Case | None = None
        self._has_failed_inside = False

    # ---- around the step

    def note_rollback(self, event: RolledBack, loss: float | None, why_not: str | None) -> None:
        """A step has failed.

        Args:
            event: what was done about it.
            loss: of the step, if it had one.
            why_not: it will not be run again; None if it will.
        """
        if event.step in self._settled:
            return
        first = Symptoms(event.reasons, event.offender, loss)
        case = _Case(event.step, first, event.to_step, event.lr_factor)
        if why_not is None:
            self._cases[event.step] = case
        else:
            self._tell(case, Cause.NOT_REPLAYED, why=why_not)

    def begin(self, step: int, *, is_within_accumulation: bool = False) -> None:
        """A step of the loop begins; puts the hooks on if it is one that has failed.

        Args:
            step: which.
            is_within_accumulation: its gradients are added to those that are there.
        """
        self.end()
        case = self._cases.get(step)
        if case is not None:
            case.has_begun = True
            self._on = case
            self._safely(lambda: self._examine(case, is_within_accumulation))

    def _examine(self, case: _Case, is_within_accumulation: bool) -> None:
        before = _first_bad(self._weights)
        if before is None and is_within_accumulation:
            before = _first_bad(self._gradients)
        case.examination = Examination(self._model, self._parameters, before, self._note_fault)

    @property
    def is_on(self) -> bool:
        """Whether the step that is being run is examined."""
        return self._on is not None

    def note_batch(self, index: int, batch: Any) -> None:
        """The batch of that step, before anybody has touched it."""
        case = self._on
        if case is not None:
            self._safely(lambda: setattr(case, "batch", batch_seen(index, batch)))

    def end(self) -> None:
        """Takes the hooks off; what they have seen waits for the verdict on the step."""
        case, self._on = self._on, None
        if case is not None and case.examination is not None:
            case.examination.remove()

    # ---- the verdict on it

    def note_failure(self, verdict: Verdict, loss: float | None) -> None:
        """A step was found bad, the first time or again."""
        case = self._cases.get(verdict.step)
        if case is None or not case.has_begun:
            return
        self._settled.add(verdict.step)
        self._tell(case, Cause.DETERMINISTIC, Symptoms(verdict.reasons, verdict.offender, loss))

    def note_spikes(self, step: int, spikes: tuple[Reason, ...]) -> None:
        """A step has shown spikes that are only recorded."""
        case = self._cases.get(step)
        if case is not None:
            case.spikes = spikes

    def note_passed(self, step: int, loss: float | None) -> None:
        """A step was clean."""
        if self._settled:
            self._settled = {failed for failed in self._settled if failed > step}
        case = self._cases.get(step)
        if case is None or not case.has_begun:
            return
        # A loss that is under the threshold this time, and still stands out, has not passed.
        was_too_high = Reason.LOSS_OVER_THRESHOLD in case.first.reasons
        is_again = was_too_high and Reason.LOSS_SPIKE in case.spikes
        cause = Cause.DETERMINISTIC if is_again else Cause.TRANSIENT
        self._tell(case, cause, Symptoms(case.spikes, None, loss))

    def note_abort(self, verdict: Verdict, loss: float | None) -> None:
        """Training is told to stop: nothing will be run again."""
        self.give_up("training is told to stop")
        if verdict.step not in self._settled:
            first = Symptoms(verdict.reasons, verdict.offender, loss)
            self._tell(
                _Case(verdict.step, first), Cause.NOT_REPLAYED, why="training is told to stop"
            )

    def give_up(self, why: str, *, even_begun: bool = True) -> None:
        """The steps that wait will not be run again.

        Args:
            why: that is.
            even_begun: nor will there be a verdict on one that was.
        """
        self.end()
        for case in list(self._cases.values()):
            if not case.has_begun:
                self._tell(case, Cause.NOT_REPLAYED, why=why)
            elif even_begun:
                self._tell(case, Cause.NOT_REPLAYED, why="it was run again, but not judged")

    def _tell(
        self, case: _Case, cause: Cause, again: Symptoms | None = None, why: str | None = None
    ) -> None:
        if self._cases.get(case.step) is case:
            del self._cases[case.step]
        if self._on is case:
            self.end()
        place = None
        if cause is Cause.DETERMINISTIC and again is not None and case.examination is not None:
            place = case.examination.locate(again, case.batch)
        self._record(
            StepExamined(
                case.step,
                cause,
                case.first,
                again,
                place,
                case.batch,
                case.to_step,
                case.lr_factor,
                why,
            )
        )

    # ---- faults of our own

    def _safely(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception:
            self._note_fault()

    def _note_fault(self) -> None:
        if not self._has_failed_inside:
            _log.exception("an autopsy has failed; training goes on, and so does the guard")
        self._has_failed_inside = True


def _first_bad(inspector: Inspector) -> Offender | None:
    return inspector.find_offender() if inspector.inspect().has_nonfinite else None
