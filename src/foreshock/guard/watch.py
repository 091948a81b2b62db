"""The course of a run, step by step: what is looked at, what is decided, what is done."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from foreshock.distributed_part import local_part
from foreshock.guard.autopsy import Autopsies
from foreshock.guard.clipping import (
    clip_factor,
    divisor_of,
    is_fused,
    norm_like_torchs,
    norm_of,
    refuse_nonfinite,
    scale_gradients,
    scaled_in_step,
)
from foreshock.guard.configuration import Guard
from foreshock.guard.events import (
    Aborted,
    Action,
    AnomalySeen,
    Event,
    Offender,
    Reason,
    Recovered,
    Resumed,
    RolledBack,
    StepExamined,
    UpdateSkipped,
    Verdict,
)
from foreshock.guard.history import History
from foreshock.guard.inspection import Finding, inspect_gradients, inspect_weights
from foreshock.guard.learning_rate import LearningRateBackoff
from foreshock.guard.policy import Policy, Signs
from foreshock.guard.snapshots import Snapshot
from foreshock.guard.spikes import SpikeDetector
from foreshock.guard.state import Stateful, named_parameters
from foreshock.guard.state_seal import StateSeal
from foreshock.host_read import read

_log = logging.getLogger("foreshock")


@dataclasses.dataclass
class _Step:
    """What is known of the step that is being run."""

    finding: Finding | None = None
    """Of its gradients, before they were clipped."""
    gradient_mark: object = None
    """What one gradient looked like then; another look means that there are new gradients."""
    verdict: Verdict | None = None
    has_scores: bool = False
    """Whether its loss has been held against those before."""
    has_changed_state: bool | None = None
    """Whether bits of the state have flipped since the last update; None: not looked at yet."""
    is_recorded: bool = False
    was_updated: bool = False
    was_withheld: bool = False
    was_left_out: bool = False
    """Whether a GradScaler has kept the optimizer from being called."""

    @property
    def was_stepped(self) -> bool:
        """Whether the optimizer was called."""
        return self.was_updated or self.was_withheld

    @property
    def is_over(self) -> bool:
        """Whether the place for its update has been passed."""
        return self.was_stepped or self.was_left_out


class Seen(NamedTuple):
    """The numbers of a step."""

    step: int
    loss: float
    finding: Finding
    """In its gradients, before they were clipped."""


class Watch:
    """Follows a run through its steps, withholds updates, and returns to good state.

    Within a loop over batches a step lasts from one batch to the next. Outside of one it is over
    when it has been judged and the optimizer has been called, in either order.

    Args:
        model, optimizer, state: what belongs to the state of the run.
        guard: what may be done.
        record: told of each event.
        only_trainable: whether parameters that require no gradient are neither scanned nor copied.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        state: Mapping[str, Stateful],
        guard: Guard,
        record: Callable[[Event], None],
        *,
        only_trainable: bool = False,
    ) -> None:
        parameters = named_parameters(model, optimizer)
        guarded = named_parameters(model, optimizer, only_trainable=only_trainable)
        self.parameters = list(parameters.values())
        self._optimizer = optimizer
        optimized = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self._not_optimized = [p for p in self.parameters if id(p) not in optimized]
        self._gradients = inspect_gradients(parameters)
        self._weights, self.buffers_left_alone = inspect_weights(model, guarded)
        self._scalers = [s for s in state.values() if isinstance(s, torch.amp.GradScaler)]
        self._guard = guard
        self._record = record
        self._policy = Policy(guard)
        self._seal = StateSeal(guarded, optimizer) if guard.verify_state else None
        self.learning_rate = LearningRateBackoff(guard.lr_backoff, guard.lr_recovery_steps)
        self._spikes = SpikeDetector(guard)
        state = {**state, "spikes": self._make_spikes()}
        run: dict[str, Stateful] = {
            "policy": self._policy,
            "learning_rate": self.learning_rate,
            "course": self,
        }
        self._only_trainable = only_trainable
        self.history = self._make_history(model, optimizer, state, run)
        inspectors = (self._weights, self._gradients)
        self.autopsies = Autopsies(model, parameters, *inspectors, self._record_examined)
        self.step = 0
        """The step that is being run; between steps, the one that comes next."""
        self.last_loss: float | None = None
        """Loss of the last clean step."""
        self.seen: Seen | None = None
        """What the last step that there is a verdict on has shown."""
        self.stopped: Verdict | None = None
        """The verdict that ended training."""
        self._current = _Step()
        self._are_spectra_lost = False
        self._clip_factor = 1.0
        self._clip_mark: tuple[int, int] | None = None
        self._is_updating = False
        self._is_within_accumulation = False
        self._has_been_stepped = False
        self._wants_snapshot = False
        self._failed_step: int | None = None
        self._good: Snapshot | None = None
        self._has_warned_of_closure = False

    def _record_examined(self, event: StepExamined) -> None:
        self._record(event)

    def _make_history(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        state: Mapping[str, Stateful],
        run: Mapping[str, Stateful],
    ) -> History:
        given = (model, optimizer, state, self._guard, self._record, run)
        return History(*given, only_trainable=self._only_trainable)

    def _make_spikes(self) -> Stateful:
        """What of the detector belongs to the state of the run."""
        return self._spikes

    @property
    def scores(self) -> dict[str, float | None]:
        """How far the numbers of the step that was seen last are from those before, by name."""
        return {"loss_z": self._spikes.loss_z, "grad_norm_z": self._spikes.grad_norm_z}

    # ---- another process

    def resume(self, where: Path) -> int | None:
        """Takes the run up where another process left it.

        Args:
            where: a snapshot's file, or a directory of them.
        Returns:
            The step to go on from; None if there is no snapshot.
        """
        found = self.history.find_saved(where)
        if found is None:
            return None
        path, snapshot = found
        self.history.resume(snapshot, path)
        self.step = snapshot.step
        self._record(Resumed(snapshot.step, str(path)))
        return snapshot.step

    def state_dict(self) -> dict[str, Any]:
        """Where the run is; only another process takes it over."""
        return {
            "last_loss": self.last_loss,
            "is_within_accumulation": self._is_within_accumulation,
            "has_been_stepped": self._has_been_stepped,
            "failed_step": self._failed_step,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on from there."""
        self.last_loss = state_dict["last_loss"]
        self._is_within_accumulation = state_dict["is_within_accumulation"]
        self._has_been_stepped = state_dict["has_been_stepped"]
        self._failed_step = state_dict["failed_step"]

    # ---- the bounds of a step

    def leave_loop(self) -> None:
        """Closes a step that was left in its middle, and the loop if there is one."""
        self.autopsies.end()
        if self._current.verdict is not None or self._current.was_stepped:
            self.finish_step()
        self._current = _Step()
        step = self.history.close()
        if step is not None:
            self.step = step
        self.autopsies.give_up("the loop was left before", even_begun=False)

    def start_step(self) -> None:
        """Between two steps of a loop: goes back if there was a rollback, takes snapshots."""
        step = self.history.rewind()
        if step is not None:
            self.step = step
        if self._seal is not None and (step is not None or not self._seal.is_set):
            self._seal.set()
        is_within = self._is_within_accumulation
        self.history.take_if_due(self.step, is_within_accumulation=is_within)
        self.autopsies.begin(self.step, is_within_accumulation=is_within)

    def finish_step(self) -> None:
        """Closes the books on the step."""
        self.autopsies.end()
        now = self._current
        if now.verdict is None and now.was_withheld:
            self._judge(None)  # nobody has asked why
        verdict = now.verdict
        if verdict is not None:
            self._record_skip()
            if now.was_stepped and verdict.action in (Action.CONTINUE, Action.SKIP):
                self._policy.note_update(is_bad=verdict.action is Action.SKIP)
            self._has_been_stepped |= now.was_stepped
            if verdict.action is Action.CONTINUE:
                self._note_clean_step(self.step, now.was_stepped)
        self._is_within_accumulation = not now.is_over
        self._current = _Step()
        self.step += 1
        if self.history.source is None:
            self.history.take_if_due(self.step)

    def _note_clean_step(self, step: int, was_stepped: bool) -> None:
        if was_stepped or not self._has_been_stepped:
            # A step within a gradient accumulation proves nothing of the optimizer's state.
            self.history.note_clean_step(step)
        self.history.is_requested |= self._wants_snapshot
        self._wants_snapshot = False
        self._note_passed(step)

    def _note_passed(self, step: int) -> None:
        self.autopsies.note_passed(step, self._loss_of(step))
        if self._failed_step is not None and step >= self._failed_step:
            self._record(Recovered(self._failed_step))
            self._policy.note_recovery()
            self._failed_step = None

    def _loss_of(self, step: int) -> float | None:
        return self.seen.loss if self.seen is not None and self.seen.step == step else None

    def request_snapshot(self) -> None:
        """Has a snapshot taken as soon as a step has been clean; in recover mode, that is."""
        self._wants_snapshot = True

    def lower_learning_rate(self) -> float:
        """Lowers it as after a rollback; the factor that is in force then."""
        return self.learning_rate.back_off()

    @property
    def are_spectra_lost(self) -> bool:
        """Whether the spectra are no longer to be looked at."""
        return self._are_spectra_lost

    def lose_spectra(self) -> None:
        """Following them has failed here."""
        self._are_spectra_lost = True

    def expect_loss(self, loss: Any) -> None:
        """The loss of the step, if it is known before the gradients are clipped."""

    def note_fetch(self, seconds: float) -> None:
        """What the loader took for the batch of the step that begins."""

    def leave(self) -> None:
        """The run has been given up: nobody else is waited for."""

    @property
    def was_stepped(self) -> bool:
        """Whether the optimizer was called in the step that is being run."""
        return self._current.was_stepped

    # ---- the verdict

    def judge(self, loss: float, *, is_unstable: bool = False) -> Verdict:
        """Says of the step that has been run whether it was a good one, and acts on it.

        Args:
            loss: of the step.
            is_unstable: the spectra of the weights ask for a rollback.
        Returns:
            The verdict; a second one on a step is never better than the first.
        """
        if self.stopped is not None:
            return self.stopped
        self.autopsies.end()
        is_outside = self.history.source is None
        before = self._current.verdict
        if before is not None and is_outside:
            self.finish_step()  # its update never came, as within a gradient accumulation
        elif before is not None and before.action is not Action.CONTINUE:
            return before
        if is_outside and not self.history.has_start:
            self.history.take_if_due(self.step)
        verdict = self._judge(loss, is_unstable)
        if is_outside and self._current.is_over:
            self.finish_step()
        return verdict

    def check_end(self) -> None:
        """After the last step: looks at what its update has made, and acts on it.

        A loop may have to go on after this; `History.is_returning` says so.
        """
        if self.stopped is not None:
            return
        self.autopsies.begin(self.step)
        if self._are_weights_bad_at_end():
            self._decide(Signs(has_nonfinite_weights=True))
            self._record_skip()
            self._current = _Step()
        else:
            self._note_passed(self.step)

    def _are_weights_bad_at_end(self) -> bool:
        return self._weights.inspect().has_nonfinite

    def _judge(self, loss: float | None, is_unstable: bool = False) -> Verdict:
        now = self._current
        signs, finding = self._look(loss, is_unstable)
        if signs.loss is not None:
            self.seen = Seen(self.step, signs.loss, finding)
            if not now.has_scores:
                now.has_scores = True
                spikes = self._spikes.update(signs.loss, finding.norm)
                spikes = self._to_be_acted_on(self.step, spikes)
                signs = dataclasses.replace(signs, spikes=spikes) if spikes else signs
        verdict = self._decide(signs)
        if verdict.action is Action.CONTINUE and signs.loss is not None:
            self.last_loss = signs.loss
        return verdict

    def _look(self, loss: float | None, is_unstable: bool) -> tuple[Signs, Finding]:
        """What the step shows, but for spikes, and what is in its gradients."""
        now = self._current
        is_of_this_update = now.was_stepped and now.verdict is None
        finding = self._known_finding(even_if_changed=is_of_this_update)
        is_normal = loss is not None and loss <= self._guard.violation_threshold
        has_bad_weights = self._are_weights_bad(finding.has_nonfinite or not is_normal)
        has_bad_gradient = self._is_gradient_bad(finding)
        has_changed = self._has_state_changed()
        return Signs(loss, has_bad_gradient, has_bad_weights, is_unstable, has_changed), finding

    def _has_state_changed(self) -> bool:
        """Between two updates nothing may change in parameters and optimizer state."""
        now, seal = self._current, self._seal
        may_look = seal is not None and seal.is_set and not now.was_updated
        if seal is not None and may_look and now.has_changed_state is None:
            now.has_changed_state = bool(read(seal.differs()))
        return bool(now.has_changed_state)

    def _is_gradient_bad(self, finding: Finding) -> bool:
        """Not while a registered GradScaler is looking for its scale: it withholds such updates
        itself, and halves the scale. A gradient that is bad at a scale of 1 is bad by itself."""
        if not finding.has_nonfinite:
            return False
        return not any(s.is_enabled() and s.get_scale() > 1 for s in self._scalers)

    def _to_be_acted_on(self, step: int, spikes: tuple[Reason, ...]) -> tuple[Reason, ...]:
        """Those that are; others are only recorded."""
        if spikes and self._guard.spike_response == "log":
            self._record(AnomalySeen(step, Action.SKIP, spikes, None))
            self.autopsies.note_spikes(step, spikes)
            return ()
        return spikes

    def _decide(self, signs: Signs) -> Verdict:
        verdict = self._verdict_on(self.step, signs, self._finder(signs))
        self._current.verdict = verdict
        self._current.is_recorded = False
        self._act(verdict)
        return verdict

    def _finder(self, signs: Signs) -> Callable[[], Offender | None]:
        if signs.has_nonfinite_weights:
            return self._weights.find_offender
        if signs.has_changed_state and self._seal is not None:
            return self._seal.find_changed
        return self._gradients.find_offender

    def _verdict_on(
        self, step: int, signs: Signs, find_offender: Callable[[], Offender | None]
    ) -> Verdict:
        decision = self._policy.decide(signs, lambda: self._can_roll_back(step))
        action = decision.action
        offender = None if action is Action.CONTINUE else find_offender()
        must_stop = action is Action.ABORT and self._guard.mode != "observe"
        return Verdict(step, action, decision.reasons, offender, not must_stop)

    def _can_roll_back(self, step: int) -> bool:
        if self._guard.mode == "observe":
            return True  # recover mode would have had a snapshot
        self._good = self.history.find_good(step)
        return self._good is not None

    def _are_weights_bad(self, must_look: bool) -> bool:
        if not must_look and self.step % self._guard.check_interval:
            return False
        return self._weights.inspect().has_nonfinite

    # ---- what is done about it

    def _act(self, verdict: Verdict) -> None:
        if verdict.action is Action.CONTINUE:
            return
        self.autopsies.note_failure(verdict, self._loss_of(verdict.step))
        if self._guard.mode == "observe":
            self._current.is_recorded = True
            seen = (verdict.reasons, verdict.offender)
            self._record(AnomalySeen(verdict.step, verdict.action, *seen))
        elif verdict.action is Action.ROLL_BACK:
            self._roll_back(verdict)
        elif verdict.action is Action.ABORT:
            self.stopped = verdict
            if self._guard.mode == "recover":
                self.autopsies.note_abort(verdict, self._loss_of(verdict.step))
            self._record(Aborted(verdict.step, verdict.reasons, verdict.offender))

    def _roll_back(self, verdict: Verdict) -> None:
        assert self._good is not None  # the policy has asked
        snapshot, self._good = self._good, None
        self.history.return_to(snapshot, fetched_since=self.step - verdict.step)
        if self._seal is not None:
            self._seal.set()
        factor = self.learning_rate.back_off()
        self._failed_step = max(verdict.step, self._failed_step or 0)
        seen = (verdict.reasons, verdict.offender)
        event = RolledBack(verdict.step, snapshot.step, *seen, factor)
        self._record(event)
        why_not = self._why_not_again(verdict.reasons)
        self.autopsies.note_rollback(event, self._loss_of(verdict.step), why_not)

    def _why_not_again(self, reasons: tuple[Reason, ...]) -> str | None:
        """Why the step that has failed will not be run again; None if it will."""
        if self.history.source is None:
            return "the batches do not come from monitor.loop"
        if not self.history.is_returning:
            return "the snapshot is older than the loop"
        if self._guard.skip_batches:
            return f"its batch is left out (skip_batches={self._guard.skip_batches})"
        if set(reasons) <= {Reason.SPECTRAL_INSTABILITY, Reason.CONSECUTIVE_SKIPS}:
            return "the spectra asked for the way back, not anything in the step"
        return None

    def _record_skip(self) -> None:
        """Told only when it is known whether an update was withheld."""
        now = self._current
        if now.verdict is None or now.verdict.action is not Action.SKIP or now.is_recorded:
            return
        now.is_recorded = True
        seen = (now.verdict.reasons, now.verdict.offender)
        if now.was_withheld:
            self._record(UpdateSkipped(now.verdict.step, *seen))
        else:
            self._record(AnomalySeen(now.verdict.step, Action.SKIP, *seen))

    # ---- the update

    def admits(self, has_closure: bool) -> bool:
        """Whether the update that is about to be made may reach the parameters.

        Args:
            has_closure: it computes its gradients only then, when it is too late to withhold it.
        """
        if has_closure:
            self._warn_of_closure()
            return True
        if self.stopped is not None:
            return False
        if self.history.source is None and self._current.was_stepped:
            self.finish_step()  # nobody has asked for a verdict on the last one
        now = self._current
        if now.verdict is not None and now.verdict.action is not Action.CONTINUE:
            return False
        is_finite = not self._known_finding().has_nonfinite
        if not is_finite and now.verdict is not None:
            self._judge(None)  # the gradients have changed since the verdict
        elif now.verdict is None and is_finite and self._has_state_changed():
            self._decide(Signs(has_changed_state=True))
            return False
        return is_finite

    def _warn_of_closure(self) -> None:
        if not self._has_warned_of_closure:
            _log.warning(
                "optimizer.step is called with a closure, which computes the gradients when it is "
                "too late to withhold the update; such steps are watched but not guarded"
            )
        self._has_warned_of_closure = True

    def note_call(self, was_admitted: bool) -> None:
        """The optimizer was called, and has run or not."""
        self._is_updating = False
        self._clip_factor = 1.0
        now = self._current
        if was_admitted:
            now.was_updated = True
            if self._seal is not None:
                self._seal.set()
        else:
            now.was_withheld = True
            self._record_skip()
        if self.history.source is None and now.verdict is not None:
            self.finish_step()

    def observe_update(self) -> None:
        """The optimizer is about to be called; the training loop may clear the gradients next."""
        if self._current.verdict is None:
            self._known_finding()
            self._has_state_changed()

    # ---- the gradients

    def clip(self, max_norm: float, norm_type: float, error_if_nonfinite: bool) -> torch.Tensor:
        """Clips the gradients as `clip_grad_norm_` does, or has the optimizer do so.

        A fused optimizer of torch multiplies them as it reads them in its step; until then they
        are as they were. Only if it has all that there is to be clipped.
        """
        norm = self._norm_to_clip(norm_type, error_if_nonfinite)
        if self._clip_mark != self._look_at_gradients():
            self._clip_factor = 1.0  # of gradients that no update has taken
        norm *= self._clip_factor
        refuse_nonfinite(norm, norm_type, error_if_nonfinite)
        factor = clip_factor(norm, max_norm)
        if self._can_ride():
            self._clip_factor *= factor
            self._clip_mark = self._look_at_gradients()
        else:
            scale_gradients(self.parameters, factor)
            self.note_clipped()
        return norm_like_torchs(self.parameters, norm)

    def _norm_to_clip(self, norm_type: float, is_to_be_finite: bool) -> float:
        return norm_of(self.scan_gradients(), norm_type)

    def _can_ride(self) -> bool:
        """Not for a closure: the step that it runs in has begun."""
        if self._is_updating or not is_fused(self._optimizer):
            return False
        return all(p.grad is None for p in self._not_optimized)

    def scaled(self) -> contextlib.AbstractContextManager[None]:
        """What is in force while the update that begins is made."""
        self._is_updating = True
        factor, self._clip_factor = self._clip_factor, 1.0
        if factor == 1.0 or not self._is_as_clipped():
            return contextlib.nullcontext()
        return scaled_in_step(self._optimizer, divisor_of(factor))

    @property
    def pending_divisor(self) -> torch.Tensor | None:
        """() float32: what the optimizer is still to divide the gradients by; None: nothing."""
        if self._clip_factor == 1.0 or not self._is_as_clipped():
            return None
        return divisor_of(self._clip_factor)

    def _is_as_clipped(self) -> bool:
        """Gradients that were added to since then are still the ones that were to be clipped."""
        mark, now = self._clip_mark, self._look_at_gradients()
        return mark is not None and now is not None and mark[0] == now[0] and mark[1] <= now[1]

    def largest_gradients(self, k: int) -> dict[str, float]:
        """The largest gradient norms, by parameter, of the step that was seen last."""
        return self._gradients.largest_norms(k)

    def scan_gradients(self) -> Finding:
        """Scans the gradients as they are now."""
        self._current.finding = finding = self._gradients.inspect()
        self.note_clipped()
        return finding

    def note_clip_begins(self) -> None:
        """Somebody else is about to scale the gradients: what is in them before that counts."""
        self._known_finding()

    def note_clipped(self) -> None:
        """The gradients were scaled by us: they are still the ones that were scanned."""
        self._current.gradient_mark = self._look_at_gradients()

    def _known_finding(self, *, even_if_changed: bool = False) -> Finding:
        """What is in the gradients; scanned anew unless they are those that were scanned last."""
        now = self._current
        is_known = even_if_changed or now.gradient_mark == self._look_at_gradients()
        if now.finding is not None and is_known:
            return now.finding
        return self.scan_gradients()

    def _look_at_gradients(self) -> tuple[int, int] | None:
        """A mark by which new gradients are told from those that were there. One will do."""
        for p in self.parameters:
            gradient = p.grad
            if gradient is not None:
                return id(gradient), local_part(gradient)._version
        return None
