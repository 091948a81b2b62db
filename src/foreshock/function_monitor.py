"""The monitor of a training whose state is not torch's: functions save it and put it back."""

from __future__ import annotations

import logging
import operator
import os
import platform
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from pydantic import NonNegativeInt, PositiveInt

from foreshock.guard import (
    Aborted,
    Action,
    AnomalySeen,
    Finding,
    FunctionState,
    Guard,
    Inspector,
    LearningRateBackoff,
    Offender,
    Part,
    Policy,
    RandomState,
    RateBehindFunctions,
    Reason,
    Recovered,
    RolledBack,
    Signs,
    Snapshot,
    SnapshotRing,
    SpikeDetector,
    StatefulPart,
    Verdict,
    tensors_of,
)
from foreshock.host_read import as_number
from foreshock.journal import Journal
from foreshock.ops import active_backends
from foreshock.settings import Settings

_log = logging.getLogger("foreshock")

T = TypeVar("T")


class FunctionMonitorSettings(Settings):
    """Cadence of the monitor; what may be done about a bad step is `Guard`'s."""

    accepted_beside: ClassVar[tuple[str, ...]] = (
        "save_fn", "load_fn", "get_lr", "set_lr", "out_dir", "guard"
    )  # fmt: skip

    first_step: NonNegativeInt = 0
    """Number of the step that comes first."""
    telemetry_interval: PositiveInt = 10
    """Steps between telemetry records; events are recorded as they happen."""


class FunctionMonitor:
    """Watches a loop whose state only its own functions know, and with a guard keeps it alive.

    >>> monitor = fs.Monitor.from_functions(save, load, get_lr, set_lr, "runs/x", guard)
    >>> while monitor.next_step < 1000:
    ...     step = monitor.next_step
    ...     loss = train(batches[step])  # which updates the weights
    ...     if not monitor.step(step, loss, weights):
    ...         break
    >>> summary = monitor.finalize()

    `step` is called when a step is complete, its update made: what `save_fn` gives then is what the
    next step begins with. The update can no longer be withheld, but it can be rolled back: the
    state of an earlier step is given to `load_fn`, and `next_step` is that step.

    Args:
        save_fn: called without arguments, gives all that later steps depend on, in mappings, lists
            and tuples, nested. It may give the live arrays: arrays, tensors and bytes are copied
            here, anything else is deep-copied. The generators of Python, NumPy and torch that
            belong to no object are saved without it.
        load_fn: given such a state, its own to keep, puts it back in place.
        get_lr: gives the learning rate, a number.
        set_lr: sets it; called only after a rollback, until the rate has returned to what it was.
        out_dir: directory for the run's files; made if it is not there.
        guard: what may be done about a bad step, `observe` or `recover`; default `Guard()`, which
            only observes, and calls neither save_fn, load_fn nor set_lr.
        more: fields of `FunctionMonitorSettings`.
    Raises:
        TypeError, ValueError: naming the argument, what was given and what is accepted.
        OSError: out_dir cannot be written to.
    Cost:
        Per step one read of `model`. In `recover` mode every `snapshot_interval` steps, and when
        the monitor is made, what save_fn costs, and one read and one write of what it gives.
    """

    def __init__(
        self,
        save_fn: Callable[[], Any],
        load_fn: Callable[[Any], object],
        get_lr: Callable[[], Any],
        set_lr: Callable[[float], object],
        out_dir: str | os.PathLike[str],
        guard: Guard | None = None,
        **more: Any,
    ) -> None:
        functions = {"save_fn": save_fn, "load_fn": load_fn, "get_lr": get_lr, "set_lr": set_lr}
        for name, given in functions.items():
            if not callable(given):
                raise TypeError(f"{name} is a {type(given).__name__}; accepted: a function")
        self._settings = FunctionMonitorSettings(**more)
        self._guard = guard = _checked_guard(guard)
        self._policy = Policy(guard)
        self._spikes = SpikeDetector(guard)
        backoff = LearningRateBackoff(guard.lr_backoff, guard.lr_recovery_steps)
        self._rate = RateBehindFunctions(get_lr, set_lr, backoff)
        parts: dict[str, Part] = {
            "state": FunctionState(save_fn, load_fn),
            "random": RandomState(),
            "spikes": StatefulPart(self._spikes),
        }
        self._journal = Journal(out_dir, self._config())
        self._ring = SnapshotRing(parts, guard.depth, guard.clean_steps, self._journal.record)
        self._names: list[str] = []
        self._tensors: list[torch.Tensor | None] = []
        self._inspector: Inspector | None = None
        self._good: Snapshot | None = None
        self._failed_step: int | None = None
        self._last_loss: float | None = None
        self._stopped: Verdict | None = None
        self._summary: dict[str, Any] | None = None
        self._has_failed_inside = False
        self.next_step = self._settings.first_step
        """The step to be run next; after a rollback an earlier one again."""
        self._take_snapshot_if_due(is_start=True)

    def step(self, step: int, loss: torch.Tensor | float, model: object = None) -> Verdict:
        """Judges the step that has just been run, its update included.

        Args:
            step: its number, `next_step` or a later one: a loop that does not go back after a
                rollback goes on with the state that was restored.
            loss: its loss, a number or a tensor with one element.
            model: looked at for values that are not finite: arrays or tensors, in mappings, lists
                or tuples, or attributes of an object. NumPy's are read where they are.
        Returns:
            Verdict, false when training is to stop.
        Raises:
            TypeError, ValueError: naming the argument, what was given and what is accepted.
        """
        begun = self._journal.begin()
        try:
            number, value = self._checked_step(step), as_number(loss, "loss")
            tensors = {} if model is None else tensors_of(model)
            return self._safely(lambda: self._judge(number, value, tensors), Verdict(number))
        finally:
            self._journal.end(begun)

    @property
    def latest(self) -> dict[str, Any]:
        """The last telemetry record, as telemetry.jsonl has it; empty before the first."""
        return dict(self._journal.latest)

    def finalize(self) -> dict[str, Any]:
        """Stops watching, writes summary.json, and returns what it says. Again is harmless."""
        if self._summary is None:
            self._safely(self._ring.close, None)
            self._journal.close()
            self._summary = self._write_summary()
        return self._summary

    def __enter__(self) -> FunctionMonitor:
        return self

    def __exit__(self, *exception: object) -> None:
        self.finalize()

    # ---- the verdict

    def _checked_step(self, given: int) -> int:
        try:
            step = operator.index(given)
        except TypeError:
            raise TypeError(f"step is a {type(given).__name__}; accepted: a whole number") from None
        if step < self.next_step and self._stopped is None:
            raise ValueError(f"step is {step}; accepted: {self.next_step}, or a later one")
        return step

    def _judge(self, step: int, loss: float, tensors: dict[str, torch.Tensor]) -> Verdict:
        if self._stopped is not None:
            return self._stopped
        if self._summary is not None:
            return Verdict(step)
        self._journal.steps_run += 1
        self.next_step = step + 1
        is_normal = loss <= self._guard.violation_threshold
        must_look = not is_normal or step % self._guard.check_interval == 0
        finding = self._inspect(tensors) if tensors and must_look else Finding()
        spikes = self._spikes_to_be_acted_on(step, self._spikes.update(loss, 0.0))
        signs = Signs(loss, has_nonfinite_weights=finding.has_nonfinite, spikes=spikes)
        decision = self._policy.decide(signs, lambda: self._can_roll_back(step))
        must_stop = decision.action is Action.ABORT and self._guard.mode != "observe"
        offender = self._find_offender() if finding.has_nonfinite else None
        verdict = Verdict(step, decision.action, decision.reasons, offender, not must_stop)
        if step % self._settings.telemetry_interval == 0:
            self._record_telemetry(step, loss, finding)
        self._act(verdict, loss)
        return verdict

    def _inspect(self, tensors: dict[str, torch.Tensor]) -> Finding:
        self._tensors = [*tensors.values()]
        if self._inspector is None or self._names != [*tensors]:
            self._names = [*tensors]
            kinds = dict.fromkeys(self._names, "parameter")
            self._inspector = Inspector(kinds, lambda: self._tensors)  # type: ignore[arg-type]
        return self._inspector.inspect()

    def _find_offender(self) -> Offender | None:
        return None if self._inspector is None else self._inspector.find_offender()

    def _spikes_to_be_acted_on(self, step: int, spikes: tuple[Reason, ...]) -> tuple[Reason, ...]:
        if spikes and self._guard.spike_response == "log":
            self._journal.record(AnomalySeen(step, Action.SKIP, spikes, None))
            return ()
        return spikes

    def _can_roll_back(self, step: int) -> bool:
        if self._guard.mode == "observe":
            return True  # recover mode would have had a snapshot
        self._good = self._ring.newest_good(step - self._guard.min_depth)
        return self._good is not None

    # ---- what is done about it

    def _act(self, verdict: Verdict, loss: float) -> None:
        if verdict.action in (Action.CONTINUE, Action.SKIP):
            self._policy.note_update(is_bad=verdict.action is Action.SKIP)
            self._rate.note_update()
        seen = (verdict.reasons, verdict.offender)
        if verdict.action is Action.CONTINUE:
            self._note_clean_step(verdict.step, loss)
        elif verdict.action is Action.SKIP or self._guard.mode == "observe":
            self._journal.record(AnomalySeen(verdict.step, verdict.action, *seen))
        elif verdict.action is Action.ROLL_BACK:
            self._roll_back(verdict)
        else:
            self._stopped = verdict
            self._journal.record(Aborted(verdict.step, *seen))
            self._write_summary()

    def _note_clean_step(self, step: int, loss: float) -> None:
        self._last_loss = loss
        self._ring.note_clean_step(step)
        if self._failed_step is not None and step >= self._failed_step:
            self._journal.record(Recovered(self._failed_step))
            self._policy.note_recovery()
            self._failed_step = None
        self._take_snapshot_if_due()

    def _take_snapshot_if_due(self, *, is_start: bool = False) -> None:
        step = self.next_step
        if self._guard.mode != "recover":
            return
        is_due = is_start or step % self._guard.snapshot_interval == 0
        has_it = any(kept.step == step for kept in self._ring.entries)
        if is_due and not has_it and self._ring.has_room:
            with self._rate.at_rest():
                self._ring.take(step)

    def _roll_back(self, verdict: Verdict) -> None:
        assert self._good is not None  # the policy has asked
        snapshot, self._good = self._good, None
        self._ring.restore(snapshot)
        self.next_step = snapshot.step
        factor = self._rate.back_off()
        self._failed_step = max(verdict.step, self._failed_step or 0)
        seen = (verdict.reasons, verdict.offender)
        self._journal.record(RolledBack(verdict.step, snapshot.step, *seen, factor))

    # ---- records

    def _record_telemetry(self, step: int, loss: float, finding: Finding) -> None:
        self._journal.record_telemetry(
            step,
            train_loss=loss,
            learning_rate=self._rate.in_force,
            loss_z=self._spikes.loss_z,
            parameter_norm=finding.finite_norm if self._tensors else None,
        )

    def _write_summary(self) -> dict[str, Any]:
        return self._journal.write_summary(
            self.next_step, self._last_loss, self._guard.mode, spectral=None
        )

    def _config(self) -> dict[str, Any]:
        return {
            "guard": self._guard.model_dump(mode="json"),
            "monitor": self._settings.model_dump(mode="json"),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "backends": active_backends(),
        }

    def _safely(self, work: Callable[[], T], otherwise: T) -> T:
        """In observe mode, a fault of our own is logged once and does not reach the training."""
        try:
            return work()
        except Exception:
            if self._guard.mode != "observe":
                raise
            if not self._has_failed_inside:
                _log.exception("foreshock failed at step %d; training goes on", self.next_step)
            self._has_failed_inside = True
            return otherwise


def _checked_guard(given: Guard | None) -> Guard:
    """Refuses what only `Monitor` can do."""
    if given is not None and not isinstance(given, Guard):
        raise TypeError(f"guard is a {type(given).__name__}; accepted: a foreshock.Guard")
    guard = given or Guard()
    if guard.mode == "skip":
        raise ValueError(
            "mode is 'skip', but an update that functions have made cannot be withheld; accepted: "
            "'observe' and 'recover'"
        )
    for name, at_rest in (("persist_dir", None), ("verify_state", False), ("skip_batches", 0)):
        value = getattr(guard, name)
        if value != at_rest:
            raise ValueError(f"{name} is {value!r}; accepted with from_functions: {at_rest!r}")
    return guard
