"""From what a step showed to what is done about it."""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from foreshock.guard.configuration import Guard
from foreshock.guard.events import Action, Reason


@dataclasses.dataclass(frozen=True)
class Signs:
    """What a step showed."""

    loss: float | None = None
    has_nonfinite_gradient: bool = False
    has_nonfinite_weights: bool = False
    is_unstable: bool = False
    """The spectra of the weights say so, and the monitor is told to act on it."""
    has_changed_state: bool = False
    """Parameters or optimizer state are no longer what the last update has made them."""
    spikes: tuple[Reason, ...] = ()
    """What stands out from the steps before, if that is to be acted on."""
    have_replicas_differed: bool = False
    """What several ranks hold copies of is not the same on all of them."""


@dataclasses.dataclass(frozen=True)
class Decision:
    """What to do, and why; no reasons: a clean step."""

    action: Action
    reasons: tuple[Reason, ...] = ()


class Policy:
    """Decides, and keeps count of what it has decided.

    Rollbacks are counted over steps as they are run, so that a run which is sent back over and over
    does not escape the count by never getting older; and those since the failing step was last
    passed are counted however long ago they were, so that no step is retried for ever.

    Args:
        guard: what may be done, and how often.
    """

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._run_steps = 0
        self._bad_updates = 0
        self._rollbacks: deque[int] = deque()
        self._rollbacks_unpassed = 0

    def decide(self, signs: Signs, can_roll_back: Callable[[], bool]) -> Decision:
        """What the configured mode does, or in observe mode would do, about a step.

        Args:
            signs: what the step showed.
            can_roll_back: whether there is a snapshot that may be restored; asked only if it
                matters.
        """
        self._run_steps += 1
        reasons = self._reasons(signs)
        if not reasons:
            return Decision(Action.CONTINUE)
        if self._bad_updates + 1 >= self._guard.max_consecutive_skips:
            reasons = (*reasons, Reason.CONSECUTIVE_SKIPS)
        if self._guard.mode == "skip":
            # There is nothing to return to, and nothing is retried for ever.
            hopeless = {Reason.CONSECUTIVE_SKIPS, Reason.SPECTRAL_INSTABILITY}
            is_hopeless = not hopeless.isdisjoint(reasons)
            return Decision(Action.ABORT if is_hopeless else Action.SKIP, reasons)
        if self._is_state_bad(reasons):
            return self._roll_back_or_abort(reasons, can_roll_back)
        return Decision(Action.SKIP, reasons)

    def note_update(self, is_bad: bool) -> None:
        """The optimizer was called in a step that was judged.

        Bad steps without an update, as within a gradient accumulation, are no skips.
        """
        self._bad_updates = self._bad_updates + 1 if is_bad else 0

    def note_recovery(self) -> None:
        """The step that had failed was passed."""
        self._rollbacks_unpassed = 0

    def state_dict(self) -> dict[str, Any]:
        """The counts; a rollback leaves them as they are, only another process takes them over."""
        return {
            "run_steps": self._run_steps,
            "bad_updates": self._bad_updates,
            "rollbacks": list(self._rollbacks),
            "rollbacks_unpassed": self._rollbacks_unpassed,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Counts on from there."""
        self._run_steps = state_dict["run_steps"]
        self._bad_updates = state_dict["bad_updates"]
        self._rollbacks = deque(state_dict["rollbacks"])
        self._rollbacks_unpassed = state_dict["rollbacks_unpassed"]

    def _reasons(self, signs: Signs) -> tuple[Reason, ...]:
        reasons = []
        if signs.has_nonfinite_weights:
            reasons.append(Reason.NONFINITE_WEIGHTS)
        if signs.has_changed_state:
            reasons.append(Reason.STATE_CHANGED)
        if signs.have_replicas_differed:
            reasons.append(Reason.REPLICAS_DIFFER)
        if signs.has_nonfinite_gradient:
            reasons.append(Reason.NONFINITE_GRADIENT)
        if signs.loss is not None and not math.isfinite(signs.loss):
            reasons.append(Reason.NONFINITE_LOSS)
        elif signs.loss is not None and signs.loss > self._guard.violation_threshold:
            reasons.append(Reason.LOSS_OVER_THRESHOLD)
        reasons.extend(signs.spikes)
        if signs.is_unstable:
            reasons.append(Reason.SPECTRAL_INSTABILITY)
        return tuple(reasons)

    @staticmethod
    def _is_state_bad(reasons: tuple[Reason, ...]) -> bool:
        bad = {
            Reason.NONFINITE_WEIGHTS,
            Reason.STATE_CHANGED,
            Reason.REPLICAS_DIFFER,
            Reason.LOSS_OVER_THRESHOLD,
            Reason.SPECTRAL_INSTABILITY,
            Reason.CONSECUTIVE_SKIPS,
        }
        return not bad.isdisjoint(reasons)

    def _roll_back_or_abort(
        self, reasons: tuple[Reason, ...], can_roll_back: Callable[[], bool]
    ) -> Decision:
        oldest = self._run_steps - self._guard.rollback_window
        while self._rollbacks and self._rollbacks[0] < oldest:
            self._rollbacks.popleft()
        if max(len(self._rollbacks), self._rollbacks_unpassed) >= self._guard.max_rollbacks:
            return Decision(Action.ABORT, (*reasons, Reason.TOO_MANY_ROLLBACKS))
        if not can_roll_back():
            return Decision(Action.ABORT, (*reasons, Reason.NO_SNAPSHOT))
        self._rollbacks.append(self._run_steps)
        self._rollbacks_unpassed += 1
        self._bad_updates = 0
        return Decision(Action.ROLL_BACK, reasons)
