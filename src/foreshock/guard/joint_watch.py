"""A watch of many ranks: each looks at what it holds, and all decide as one."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from foreshock.distributed_part import is_split
from foreshock.guard.clipping import norm_of
from foreshock.guard.configuration import Guard
from foreshock.guard.consensus import Consensus, RankFailed, Share
from foreshock.guard.copies import Copies
from foreshock.guard.events import (
    Action,
    Event,
    Offender,
    Place,
    StepExamined,
    StragglerSeen,
)
from foreshock.guard.history import History
from foreshock.guard.inspection import Finding
from foreshock.guard.joint_history import JointHistory
from foreshock.guard.neighbor import Neighbor
from foreshock.guard.pace import Pace
from foreshock.guard.policy import Signs
from foreshock.guard.split_gradients import add_up_partial, shares_of
from foreshock.guard.state import Stateful, named_parameters
from foreshock.guard.watch import Watch
from foreshock.host_read import read

_log = logging.getLogger("foreshock")

_BY_EXCLUSION = ("loss", "gradient", "after", "not_located")
"""Places that are named when everything before them was finite, here."""


class JointWatch(Watch):
    """A `Watch` on every rank, with one verdict.

    What the ranks have found is added up in one all_reduce of 144 bytes: with the norm of gradients
    that are split over ranks, if the loss is known by then, else when the step is judged. All that
    depends on what only one rank sees waits for it. Only a step that has gone wrong takes more
    words: whose tensor it was, and which snapshot all ranks can return to.

    Whether the ranks speak to each other never depends on what one of them has seen.

    Args:
        model, optimizer, state, guard, record: as for `Watch`, the same on all ranks.
        ranks: of which this is one.
        only_trainable: as for `Watch`.
    Raises:
        ValueError: model or guard are not the same on all ranks.
    """

    history: JointHistory

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        state: Mapping[str, Stateful],
        guard: Guard,
        record: Callable[[Event], None],
        ranks: Consensus,
        *,
        only_trainable: bool = False,
    ) -> None:
        self._ranks = ranks
        self._heard: tuple[object, Share] | None = None
        """What all ranks together have found, and the step that it was in."""
        self._is_heard_anew = False
        """Whether that was after the step's verdict."""
        self._accumulates = False
        """Whether a step outside of any loop has ended without an update."""
        self._expected_loss: float | None = None
        self._is_loss_bad = False
        self._is_unstable_here = self._asks_for_snapshot = self._asks_for_lower_rate = False
        self._in_scaler: object = None
        """The step in which a GradScaler was called last."""
        # No snapshot is trusted that another rank may have lost.
        guard = guard.model_copy(update={"clean_steps": max(1, guard.clean_steps)})
        super().__init__(model, optimizer, state, guard, record, only_trainable=only_trainable)
        named = named_parameters(model, optimizer)
        ranks.require_same("model", [(name, tuple(p.shape)) for name, p in named.items()])
        ranks.require_same("guard", guard.model_dump(mode="json", exclude={"persist_dir"}))
        if guard.neighbor_copies:
            self.history.keep_copies(Neighbor(ranks))
        self._shares = shares_of(self.parameters, ranks.size)
        self._is_split = any(map(is_split, self.parameters))
        self._copies = Copies(named, optimizer, ranks)
        self._pace = Pace(model, guard.straggler_ratio)
        self._seconds = 0.0
        self._is_slow = False

    def _make_history(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        state: Mapping[str, Stateful],
        run: Mapping[str, Stateful],
    ) -> History:
        given = (model, optimizer, state, self._guard, self._record, run)
        return JointHistory(*given, self._ranks, only_trainable=self._only_trainable)

    def _record_examined(self, event: StepExamined) -> None:
        """Says no more than this rank can know of what was found on another."""
        offender = None if event.again is None else event.again.offender
        where = offender.ranks if offender is not None else ()
        is_here = self._ranks.rank in where if where else self._is_loss_bad
        if event.place is not None and event.place.kind in _BY_EXCLUSION and not is_here:
            named = f"rank {where[0]}" if len(where) == 1 else "another rank"
            event = dataclasses.replace(event, place=Place("not_located", why=f"{named} has it"))
        self._record(event)

    def start_step(self) -> None:
        super().start_step()
        self._pace.begin(self.step)

    def note_fetch(self, seconds: float) -> None:
        self._pace.note_fetch(seconds)

    def leave_loop(self) -> None:
        self._pace.end()
        super().leave_loop()

    def leave(self) -> None:
        self._ranks.leave()

    @property
    def are_spectra_lost(self) -> bool:
        # A look is a word of its own, for which nobody is waited for who may have gone.
        return self._are_spectra_lost or self._ranks.has_left

    # ---- what is asked of all ranks at the next word

    def request_snapshot(self) -> None:
        self._asks_for_snapshot = True

    def lower_learning_rate(self) -> float:
        self._asks_for_lower_rate = True
        return self.learning_rate.factor * self._guard.lr_backoff

    def expect_loss(self, loss: Any) -> None:
        self._expected_loss = loss

    # ---- the word of this rank, and that of all

    def _exchange(self, loss: float | None, *, is_new: bool = False) -> Share:
        """Adds up what the ranks have found in the step; all of them call it at the same place."""
        fault: Exception | None = None
        try:
            found = self._found_here(loss, is_new)
        except Exception as error:  # told of below, when the others have heard that it happened
            fault, found = error, Share(failed=1.0)
        heard = self._ranks.share(found)
        if fault is not None:
            raise fault
        if heard.failed:
            raise RankFailed(f"step {self.step}: another rank has failed, and says why")
        self._is_unstable_here = self._asks_for_snapshot = self._asks_for_lower_rate = False
        self._heard = self._current, heard
        self._is_heard_anew = self._current.verdict is not None
        self._do_what_was_asked(heard)
        return heard

    def _found_here(self, loss: float | None, is_new: bool) -> Share:
        now = self._current
        is_of_this_update = now.was_stepped and now.verdict is None
        finding = (
            self.scan_gradients()
            if is_new
            else self._known_finding(even_if_changed=is_of_this_update)
        )
        self._is_loss_bad = loss is not None and not math.isfinite(loss)
        low_words = high_words = 0.0
        if loss is not None and self._compares:
            low_words, high_words = self._copies.weighted_sums()
        return Share(
            gradient_nan=finding.nan,
            gradient_inf=finding.inf,
            gradient_sumsq=finding.sumsq,
            bad_weights=self._bad_weights() if self._looks_at_weights else 0,
            loss=loss or 0.0,
            losses=loss is not None,
            changed_state=self._has_state_changed(),
            unstable=self._is_unstable_here,
            lost_spectra=self._are_spectra_lost,
            wants_snapshot=self._asks_for_snapshot,
            wants_lower_rate=self._asks_for_lower_rate,
            lost_snapshots=self.history.has_lost(),
            unsaved=self.history.unsaved,
            seconds=self._own_seconds(loss),
            slow=self._is_slow,
            low_words=low_words,
            high_words=high_words,
        )

    @property
    def _looks_at_weights(self) -> bool:
        return self.step % self._guard.check_interval == 0

    @property
    def _compares(self) -> bool:
        """Whether copies are compared in this step; a snapshot of ones that differ is no good."""
        interval = self._guard.replica_interval
        is_taken = self.history.last_tried == self.step
        return interval > 0 and (is_taken or self.step % interval == 0)

    def _bad_weights(self) -> int:
        found = self._weights.inspect()
        return found.nan + found.inf

    def _do_what_was_asked(self, heard: Share) -> None:
        if heard.lost_spectra and not self._are_spectra_lost:
            _log.warning("another rank can no longer follow the spectra of the weights: none does")
            self._are_spectra_lost = True
        if heard.lost_snapshots:
            self.history.drop_what_a_rank_lost()
        if heard.wants_lower_rate:
            self.learning_rate.back_off()
        if heard.slow:
            self._tell_of_slow_ranks()
        if heard.seconds:
            mine = self._seconds
            self._is_slow = self._pace.is_news(mine, heard.seconds, self._ranks.size)
        if not heard.unsaved:
            self.history.note_all_saved()
        if not heard.is_one_at_work:
            self.history.note_all_ready(are_copied=not heard.has_one_stopped)
        self._wants_snapshot |= heard.wants_snapshot > 0

    def _own_seconds(self, loss: float | None) -> float:
        is_due = loss is not None and self._pace.is_measured
        self._seconds = self._pace.end() if is_due else 0.0
        return self._seconds

    def _tell_of_slow_ranks(self) -> None:
        mine = torch.zeros(self._ranks.size, dtype=torch.float64)
        mine[self._ranks.rank] = self._pace.ratio_now if self._is_slow else 0.0
        self._is_slow = False
        for rank, ratio in enumerate(read(self._ranks.sums(mine)).tolist()):
            if ratio:
                self._record(StragglerSeen(self.step, rank, ratio))

    def _heard_in_this_step(self) -> Share | None:
        step, heard = self._heard or (None, None)
        return heard if step is self._current else None

    # ---- the verdict

    def _look(self, loss: float | None, is_unstable: bool) -> tuple[Signs, Finding]:
        self._is_unstable_here |= is_unstable
        heard = self._heard_in_this_step()
        if heard is None or (loss is not None and not heard.losses):
            heard = self._exchange(loss)
        finding = _finding_of(heard)
        mean = heard.loss / heard.losses if heard.losses else None
        is_normal = mean is not None and mean <= self._guard.violation_threshold
        bad_weights = heard.bad_weights
        if not self._looks_at_weights and (finding.has_nonfinite or not is_normal):
            bad_weights = self._ranks.share(Share(bad_weights=self._bad_weights())).bad_weights
        is_state_bad = bad_weights > 0 or heard.changed_state > 0  # whatever else has differed
        have_differed = heard.have_copies_differed and (
            is_state_bad or self._copies.are_different()
        )
        signs = Signs(
            mean,
            self._is_gradient_bad(finding),
            bad_weights > 0,
            heard.unstable > 0,
            heard.changed_state > 0,
            have_replicas_differed=have_differed,
        )
        return signs, finding

    def _is_gradient_bad(self, finding: Finding) -> bool:
        is_bad = super()._is_gradient_bad(finding)
        if not self._scalers or not finding.has_nonfinite:
            return is_bad
        # Where nothing is touched, the ranks' scales may have come to differ.
        return self._ranks.largest([is_bad])[0] > 0

    def _are_weights_bad_at_end(self) -> bool:
        return self._ranks.share(Share(bad_weights=self._bad_weights())).bad_weights > 0

    def _finder(self, signs: Signs) -> Callable[[], Offender | None]:
        is_of_copies = signs.have_replicas_differed and not signs.has_changed_state
        if is_of_copies and not signs.has_nonfinite_weights:
            return self._copies.find_different
        find_here = super()._finder(signs)
        return lambda: self._ranks.first_offender(
            self._with_place(find_here()), is_loss_bad=self._is_loss_bad
        )

    def _with_place(self, offender: Offender | None) -> tuple[int, Offender] | None:
        if offender is None:
            return None
        for looked in (self._weights, self._gradients, self._seal):
            place = None if looked is None else looked.place_of(offender)
            if place is not None:
                return place, offender
        return 0, offender

    # ---- the update

    def admits(self, has_closure: bool) -> bool:
        if has_closure:
            return super().admits(has_closure)
        if self.stopped is not None:
            return False
        heard = self._heard_before_update()
        verdict = self._current.verdict
        if verdict is None and heard.changed_state:
            self._decide(Signs(has_changed_state=True))
            return False
        if verdict is not None and verdict.action is not Action.CONTINUE:
            return False
        is_finite = not _finding_of(heard).has_nonfinite
        if not is_finite and verdict is not None:
            self._judge(None)  # the gradients have changed since the verdict
        return is_finite

    def _heard_before_update(self) -> Share:
        if self.history.source is None and self._current.is_over:
            self.finish_step()  # nobody has asked for a verdict on the last one
        if self._may_have_changed:
            return self._exchange(None, is_new=True)
        return self._heard_in_this_step() or self._exchange(None)

    @property
    def _may_have_changed(self) -> bool:
        """Whether there may have been a backward since the verdict.

        Outside of a loop, where gradients are accumulated and verdicts asked for after the update,
        the last one is on an earlier part of the accumulation. What only this rank could see of
        that may not decide whether the ranks speak.
        """
        now = self._current
        is_outside = self.history.source is None
        is_of_before = now.verdict is not None and not self._is_heard_anew
        return is_outside and is_of_before and (self._accumulates or not self._has_been_stepped)

    def finish_step(self) -> None:
        self._accumulates |= self.history.source is None and not self._current.is_over
        super().finish_step()

    @property
    def scalers(self) -> list[torch.amp.GradScaler]:
        """Those that are registered."""
        return self._scalers

    def has_overflowed(self) -> bool:
        """Whether a gradient of any rank is not finite; asked before a GradScaler decides.

        Cost: nothing where the ranks have spoken in the step, else their one word of it.
        """
        is_left_alone = self.stopped is not None or self._guard.mode == "observe"
        has_found = not is_left_alone and _finding_of(self._heard_before_update()).has_nonfinite
        self._in_scaler = self._current
        return has_found

    def note_scaler_stepped(self) -> None:
        """A GradScaler has called the optimizer, or has let the update go."""
        now = self._current
        if now is not self._in_scaler or now.was_stepped:
            return
        now.was_left_out = True
        if self.history.source is None and now.verdict is not None:
            self.finish_step()

    # ---- the gradients

    def scan_gradients(self) -> Finding:
        add_up_partial(self.parameters)
        self._current.finding = finding = self._gradients.inspect(self._shares)
        self.note_clipped()
        return finding

    def _norm_to_clip(self, norm_type: float, is_to_be_finite: bool) -> float:
        loss, self._expected_loss = self._expected_loss, None
        if loss is None and not self._is_split and not is_to_be_finite:
            return super()._norm_to_clip(norm_type, is_to_be_finite)  # the same on all ranks
        if norm_type == math.inf:
            found = self.scan_gradients()
            nan, inf, absmax = self._ranks.largest([found.nan, found.inf, found.absmax])
            if loss is not None:
                self._exchange(loss)
            return norm_of(Finding(int(nan), int(inf), absmax=absmax), norm_type)
        return _finding_of(self._exchange(loss, is_new=True)).norm


def _finding_of(heard: Share) -> Finding:
    return Finding(int(heard.gradient_nan), int(heard.gradient_inf), heard.gradient_sumsq)
