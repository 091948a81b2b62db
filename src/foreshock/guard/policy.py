"""From what a step showed to what is done about it."""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Callable

from foreshock.guard.configuration import Guard
from foreshock.guard.events import Action, Reason


@dataclasses.dataclass(frozen=True)
class Signs:
    """What a step showed."""

    loss: float | None = None
    has_nonfinite_gradient: bool = False
    has_nonfinite_weights: bool = False


@dataclasses.dataclass(frozen=True)
class Decision:
    """What to do, and why; no reasons: a clean step."""

    action: Action
    reasons: tuple[Reason, ...] = ()


class Policy:
    """Decides, and keeps count of what it has decided.

    Time is counted in steps as they are run, so that a run which is rolled back over and over does
    not escape the count by never getting older.
    """

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._run_steps = 0
        self._consecutive_skips = 0
        self._rollbacks: deque[int] = deque()

    def decide(self, signs: Signs, can_roll_back: Callable[[], bool]) -> Decision:
        """What the configured mode does about a step that showed these signs.

        Args:
            signs: what was seen.
            can_roll_back: whether there is a snapshot that may be restored; asked only if it matters.
        """
        self._run_steps += 1
        reasons = self._reasons(signs)
        if not reasons:
            self._consecutive_skips = 0
            return Decision(Action.CONTINUE)
        self._consecutive_skips += 1
        if self._consecutive_skips >= self._guard.max_consecutive_skips:
            reasons = (*reasons, Reason.CONSECUTIVE_SKIPS)
        if self._guard.mode == "skip" or not self._is_state_bad(reasons):
            return Decision(Action.SKIP, reasons)
        return self._roll_back_or_abort(reasons, can_roll_back)

    def _reasons(self, signs: Signs) -> tuple[Reason, ...]:
        reasons = []
        if signs.has_nonfinite_weights:
            reasons.append(Reason.NONFINITE_WEIGHTS)
        if signs.has_nonfinite_gradient:
            reasons.append(Reason.NONFINITE_GRADIENT)
        if signs.loss is not None and not math.isfinite(signs.loss):
            reasons.append(Reason.NONFINITE_LOSS)
        elif signs.loss is not None and signs.loss > self._guard.violation_threshold:
            reasons.append(Reason.LOSS_OVER_THRESHOLD)
        return tuple(reasons)

    @staticmethod
    def _is_state_bad(reasons: tuple[Reason, ...]) -> bool:
        bad = {Reason.NONFINITE_WEIGHTS, Reason.LOSS_OVER_THRESHOLD, Reason.CONSECUTIVE_SKIPS}
        return not bad.isdisjoint(reasons)

    def _roll_back_or_abort(
        self, reasons: tuple[Reason, ...], can_roll_back: Callable[[], bool]
    ) -> Decision:
        oldest = self._run_steps - self._guard.rollback_window
        while self._rollbacks and self._rollbacks[0] < oldest:
            self._rollbacks.popleft()
        if len(self._rollbacks) >= self._guard.max_rollbacks:
            return Decision(Action.ABORT, (*reasons, Reason.TOO_MANY_ROLLBACKS))
        if not can_roll_back():
            return Decision(Action.ABORT, (*reasons, Reason.NO_SNAPSHOT))
        self._rollbacks.append(self._run_steps)
        self._consecutive_skips = 0
        return Decision(Action.ROLL_BACK, reasons)
