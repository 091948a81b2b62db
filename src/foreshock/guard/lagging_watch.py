"""A watch whose host runs ahead: what a step has shown is read while the next one is run."""

from __future__ import annotations

import contextlib
import dataclasses
import math

import torch

from foreshock.guard.clipping import (
    EPSILON,
    first_dtype,
    is_fused,
    refuse_nonfinite,
    scale_gradients,
    scaled_in_step,
)
from foreshock.guard.configuration import Guard
from foreshock.guard.events import Action, AnomalySeen, Offender, Reason, UpdateSkipped, Verdict
from foreshock.guard.inspection import Finding, Inspection
from foreshock.guard.policy import Signs
from foreshock.guard.spikes import DeviceSpikes
from foreshock.guard.state import Stateful
from foreshock.guard.watch import Seen, Watch
from foreshock.host_read import Later, read


@dataclasses.dataclass
class _Report:
    """What is on its way to the host about a step."""

    step: int
    gradients: Inspection
    weights: Inspection | None = None
    loss: Later | None = None
    scores: Later | None = None
    has_changed_state: torch.Tensor | None = None
    """() bool, on the device."""
    changed_state: Later | None = None
    is_unstable: bool = False
    was_stepped: bool = False
    is_loss_gated: bool = False
    """The device knew loss and scores when it decided on the update."""

    def find_offender(self, in_weights: bool) -> Offender | None:
        inspection = self.weights if in_weights else self.gradients
        return None if inspection is None else inspection.find_offender()


class LaggingWatch(Watch):
    """A `Watch` that never waits for the device in a clean step.

    The device decides itself: on gradients, loss and parameters that are not finite, a loss over
    the threshold, and spikes if they are to be acted on. The optimizer then leaves everything as it
    is: the verdict is in its `found_inf`, the clip in its `grad_scale`. The host reads the numbers
    of a step in the next one, and then counts, records and rolls back as `Watch` does.

    Only where `can_lag` says so.
    """

    _report: _Report | None = None
    _unread: _Report | None = None
    _settled: _Report | None = None
    _divisor: torch.Tensor | None = None
    _loss: torch.Tensor | None = None
    _scores: torch.Tensor | None = None

    def _make_spikes(self) -> Stateful:
        self._spikes_there = DeviceSpikes(self._guard, self.parameters[0].device)
        return self._spikes_there

    @property
    def scores(self) -> dict[str, float | None]:
        there = self._spikes_there
        return {"loss_z": there.loss_z, "grad_norm_z": there.grad_norm_z}

    # ---- the bounds of a step

    def leave_loop(self) -> None:
        if self._report is not None or self._current.was_stepped:
            self.finish_step()
        super().leave_loop()

    def start_step(self) -> None:
        if self.history.is_returning:
            self._forget()
        super().start_step()

    def finish_step(self) -> None:
        """Closes the books on the step, but for what has not been read of it yet."""
        self.autopsies.end()
        now, report = self._current, self._report
        if report is not None and not self.history.is_returning:
            self._settle()
            report.was_stepped = now.was_stepped
            self._unread = report
        self._report = self._loss = self._scores = None
        self._is_within_accumulation = not now.was_stepped
        self._current = type(now)()
        self.step += 1
        if self.history.source is None:
            self.history.take_if_due(self.step)

    def check_end(self) -> None:
        if self.stopped is None:
            self._settle()
        if not self.history.is_returning:
            super().check_end()

    def _forget(self) -> None:
        """What was found in steps that will be run again."""
        self._report = self._unread = self._loss = self._scores = self._divisor = None

    # ---- the verdict

    def judge(self, loss: torch.Tensor | float, *, is_unstable: bool = False) -> Verdict:
        """Takes in the step that has been run, and says of the one before whether it was good.

        Args:
            loss: of the present step, on any device.
            is_unstable: the spectra of the weights ask for a rollback.
        Returns:
            The verdict on the step before; before the first one, on no step (-1).
        """
        if self.stopped is not None:
            return self.stopped
        self.autopsies.end()
        is_outside = self.history.source is None
        if self._current.verdict is not None and is_outside:
            self.finish_step()  # its update never came, as within a gradient accumulation
        elif self._current.verdict is not None and not self._current.verdict.should_go_on:
            return self._current.verdict
        if is_outside and not self.history.has_start:
            self.history.take_if_due(self.step)
        settled = self._settle()
        earlier = Verdict(self.step - 1) if settled is None else settled
        now = self._current
        if self.stopped is not None or self._has_gone_back(earlier):
            now.verdict = earlier
            if is_outside:
                self._forget()
            return earlier
        now.verdict = Verdict(self.step)
        report = self._report_on_gradients(even_if_changed=now.was_stepped)
        self._loss = torch.as_tensor(loss).detach()
        report.loss, report.is_unstable = Later(self._loss), is_unstable
        if report.scores is None:
            self._scores = self._spikes_there.update(self._loss, report.gradients.norm(2.0))
            report.scores = Later(self._scores)
        if self.step % self._guard.check_interval == 0:
            report.weights = self._weights.inspect_later()
        if is_outside and now.was_stepped:
            self.finish_step()
        return earlier

    def _has_gone_back(self, verdict: Verdict) -> bool:
        return verdict.action is Action.ROLL_BACK and self._guard.mode != "observe"

    def _settle(self) -> Verdict | None:
        """Reads what was found in the step before, and acts on it."""
        report, self._unread = self._unread, None
        if report is None:
            return None
        self._settled = report
        finding = report.gradients.read()
        loss = None if report.loss is None else float(report.loss.get().item())
        spikes: tuple[Reason, ...] = ()
        if loss is not None:
            self.seen = Seen(report.step, loss, finding)
        if report.scores is not None:
            spikes = self._to_be_acted_on(report.step, self._spikes_there.note(report.scores.get()))
        has_bad_weights = report.weights is not None and report.weights.read().has_nonfinite
        has_bad_gradient = self._is_gradient_bad(finding)
        changed = report.changed_state
        has_changed = changed is not None and bool(changed.get())
        flags = (has_bad_gradient, has_bad_weights, report.is_unstable, has_changed)
        signs = Signs(loss, *flags, spikes)
        verdict = self._verdict_on(
            report.step, signs, lambda: report.find_offender(has_bad_weights)
        )
        self._act(verdict)
        self._close_books(report, verdict, finding, loss)
        return verdict

    def _close_books(
        self, report: _Report, verdict: Verdict, finding: Finding, loss: float | None
    ) -> None:
        if verdict.action is Action.SKIP and self._guard.mode != "observe":
            was_withheld = finding.has_nonfinite or report.is_loss_gated
            seen = (verdict.reasons, verdict.offender)
            if was_withheld and report.was_stepped:
                self._record(UpdateSkipped(verdict.step, *seen))
            else:
                self._record(AnomalySeen(verdict.step, Action.SKIP, *seen))
        if verdict.action in (Action.CONTINUE, Action.SKIP) and report.was_stepped:
            self._policy.note_update(is_bad=verdict.action is Action.SKIP)
            self._has_been_stepped = True
        if verdict.action is Action.CONTINUE:
            self.last_loss = self.last_loss if loss is None else loss
            self._note_clean_step(report.step, report.was_stepped)

    # ---- the update

    def admits(self, has_closure: bool) -> bool:
        """Whether the host lets the update through; the device may still withhold it."""
        if has_closure:
            return super().admits(has_closure)
        if self.stopped is not None:
            return False
        if self.history.source is None and self._current.was_stepped:
            self.finish_step()  # nobody has asked for a verdict on the last one
        verdict = self._current.verdict
        if verdict is not None and self._has_gone_back(verdict):
            return False
        self._report_on_gradients()
        return True

    def observe_update(self) -> None:
        if self._current.verdict is None:
            self._report_on_gradients()

    def scaled(self) -> contextlib.AbstractContextManager[None]:
        self._is_updating = True
        if self._report is not None:
            self._look_at_state(self._report)
        divisor, self._divisor = self._divisor, None
        if not self._is_as_clipped():
            divisor = None
        withheld = None if self._guard.mode == "observe" else self._is_withheld()
        if divisor is None and withheld is None:
            return contextlib.nullcontext()
        return scaled_in_step(self._optimizer, divisor, withheld)

    @property
    def pending_divisor(self) -> torch.Tensor | None:
        return self._divisor if self._is_as_clipped() else None

    def _is_withheld(self) -> torch.Tensor | None:
        """() float32 on the device: 1 if the update is not to reach the parameters."""
        report = self._report
        if report is None:
            return None  # a closure
        is_bad = report.gradients.is_bad
        if report.weights is not None:
            is_bad = is_bad | report.weights.is_bad
        if report.has_changed_state is not None:
            is_bad = is_bad | report.has_changed_state.to(is_bad.device, non_blocking=True)
        if self._loss is not None:
            report.is_loss_gated = True
            is_good = self._loss <= self._guard.violation_threshold  # no NaN is
            is_good &= self._loss > -math.inf
            is_bad = is_bad | ~is_good.all().to(is_bad.device, non_blocking=True)
        if self._scores is not None and self._guard.spike_response == "skip":
            is_bad = is_bad | (self._scores[1] > 0).any().to(is_bad.device, non_blocking=True)
        return is_bad.float()

    def _look_at_state(self, report: _Report) -> None:
        if self._seal is not None and self._seal.is_set:
            report.has_changed_state = self._seal.differs()
            report.changed_state = Later(report.has_changed_state)

    # ---- the gradients

    def clip(self, max_norm: float, norm_type: float, error_if_nonfinite: bool) -> torch.Tensor:
        report = self._report_on_gradients(even_if_unchanged=True)
        if self._clip_mark != self._look_at_gradients():
            self._divisor = None  # of gradients that no update has taken
        norm = report.gradients.norm(norm_type)
        if self._divisor is not None:
            norm = norm / self._divisor
        if error_if_nonfinite:
            refuse_nonfinite(float(read(norm)), norm_type, error_if_nonfinite)
        factor = (max_norm / (norm + EPSILON)).clamp(max=1.0)
        if self._can_ride():
            divisor = (1.0 / factor).float()
            self._divisor = divisor if self._divisor is None else self._divisor * divisor
            self._clip_mark = self._look_at_gradients()
        else:
            scale_gradients(self.parameters, factor)
            self.note_clipped()
        return norm if first_dtype(self.parameters) is torch.float64 else norm.float()

    def note_clip_begins(self) -> None:
        self._report_on_gradients()

    def largest_gradients(self, k: int) -> dict[str, float]:
        return {} if self._settled is None else self._settled.gradients.largest_norms(k)

    def _report_on_gradients(
        self, *, even_if_changed: bool = False, even_if_unchanged: bool = False
    ) -> _Report:
        """The step's report, with the gradients as they are now in it."""
        report, mark = self._report, self._look_at_gradients()
        is_known = even_if_changed or (self._current.gradient_mark == mark)
        if report is None:
            report = self._report = _Report(self.step, self._gradients.inspect_later())
        elif not is_known or even_if_unchanged:
            report.gradients = self._gradients.inspect_later()
        self._current.gradient_mark = mark
        return report


def can_lag(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, guard: Guard, device_type: str
) -> bool:
    """Whether a `LaggingWatch` can do here what a `Watch` does.

    All that is watched is dense and on one device of this type; and unless the guard only observes
    the optimizer is a fused one, which withholds updates itself.
    """
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [p for group in optimizer.param_groups for p in group["params"]]
    places = {t.device for t in tensors}
    is_plain = all(not t.is_complex() and t.layout is torch.strided for t in tensors)
    if len(places) != 1 or next(iter(places)).type != device_type or not is_plain:
        return False
    return guard.mode == "observe" or is_fused(optimizer)
