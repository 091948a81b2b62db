"""The monitor: where signals, guard and records meet a training loop."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import platform
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import PositiveInt

from foreshock.guard import (
    Aborted,
    Action,
    AnomalySeen,
    BatchSource,
    BufferedSource,
    Decision,
    Event,
    Guard,
    Inspector,
    LearningRateBackoff,
    ModelState,
    Offender,
    OptimizerState,
    Part,
    Policy,
    RandomState,
    Reason,
    Recovered,
    RolledBack,
    Signs,
    Snapshot,
    SnapshotDropped,
    SnapshotRing,
    Stateful,
    StatefulPart,
    StepGate,
    UpdateSkipped,
    make_source,
)
from foreshock.guard.inspection import Finding, Kind
from foreshock.ops import active_backends
from foreshock.records import TelemetryWriter, write_atomically, write_summary
from foreshock.records.strict_json import dump_json
from foreshock.settings import Settings

_log = logging.getLogger("foreshock")

_EVENT_NAMES: dict[type, str] = {
    UpdateSkipped: "update_skipped",
    AnomalySeen: "anomaly_seen",
    RolledBack: "rollback_success",
    Recovered: "recovered",
    SnapshotDropped: "snapshot_dropped",
    Aborted: "aborted",
}


class MonitorSettings(Settings):
    """Cadence of the monitor; what may be done about a bad step is `Guard`'s."""

    telemetry_interval: PositiveInt = 10
    """Steps between telemetry records; events are recorded as they happen."""


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


@dataclasses.dataclass
class _Step:
    """What is known of the step that is being run."""

    finding: Finding | None = None
    decision: Decision | None = None
    was_stepped: bool = False
    was_withheld: bool = False


class Monitor:
    """Watches a training loop, and with a guard keeps it alive.

    >>> monitor = fs.Monitor(model, optimizer, out_dir="runs/first", guard=fs.Guard(mode="recover"))
    >>> for step, (x, y) in monitor.loop(loader):
    ...     optimizer.zero_grad()
    ...     loss = criterion(model(x), y)
    ...     loss.backward()
    ...     monitor.clip_grad_norm_(1.0)
    ...     if not monitor.step(loss):
    ...         break
    ...     optimizer.step()
    >>> summary = monitor.finalize()

    Each step the gradients are scanned before the update, and the parameters every
    `guard.check_interval` steps. `optimizer.step` is wrapped: a bad update does not reach the
    parameters. `step` is best called before `optimizer.step()`, so that the loss too has a say in
    the update; called after it, it still sees the parameters that the update made.

    Args:
        model: its parameters, gradients and floating-point buffers are scanned.
        optimizer: whose updates are guarded.
        out_dir: directory for the run's files; made if it is not there.
        guard: what may be done about a bad step; default `Guard()`, which only observes.
        state: more that belongs to the state of the run, by name: learning-rate scheduler, averaged
            weights, anything with `state_dict` and `load_state_dict`.
        telemetry_interval: steps between telemetry records.
    Raises:
        TypeError, ValueError: naming the argument, what was given and what is accepted.
        OSError: out_dir cannot be written to.
    Cost:
        Per step one read of the gradients and one of the parameters and, on an accelerator, one
        synchronisation. Snapshots (in `recover` mode) copy model and optimizer into host memory.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        out_dir: str | os.PathLike[str],
        guard: Guard | None = None,
        *,
        state: Mapping[str, Stateful] | None = None,
        **settings: Any,
    ) -> None:
        _require(isinstance(model, torch.nn.Module), "model", model, "a torch.nn.Module")
        is_optimizer = isinstance(optimizer, torch.optim.Optimizer)
        _require(is_optimizer, "optimizer", optimizer, "a torch.optim.Optimizer")
        _require(guard is None or isinstance(guard, Guard), "guard", guard, "a foreshock.Guard")
        self._settings = MonitorSettings(**settings)
        self._guard = guard or Guard()
        self._optimizer = optimizer
        self._model = model
        self._parts = _parts(model, optimizer, state or {})
        self._out_dir = Path(out_dir)
        self._out_dir.mkdir(parents=True, exist_ok=True)
        self._records = TelemetryWriter(self._out_dir / "telemetry.jsonl")
        write_atomically(self._out_dir / "config.json", dump_json(self._config()))

        trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._trainable = list(trainable.values())
        self._gradients = Inspector({name: "gradient" for name in trainable})
        self._weights = Inspector(dict(_weight_kinds(model)))
        self._policy = Policy(self._guard)
        self._learning_rate = LearningRateBackoff(
            self._guard.lr_backoff, self._guard.lr_recovery_steps
        )
        self._ring = SnapshotRing(
            self._parts, self._guard.depth, self._guard.clean_steps, self._record
        )
        self._gate = StepGate(
            optimizer, self._admit, lambda: self._learning_rate.applied_to(optimizer), self._passed
        )
        self._source: BatchSource | None = None
        self._rewind_to: Snapshot | None = None
        self._failed_step: int | None = None
        self._current = _Step()
        self._step = 0
        self._counts: Counter[type] = Counter()
        self._last_loss: float | None = None
        self._has_failed_inside = False
        self._is_stopped = False
        self._summary: dict[str, Any] | None = None
        self._started: float | None = None
        self._own_seconds = 0.0
        self._steps_run = 0

    # ---- what a training loop calls

    def loop(self, loader: Iterable[Any], epochs: int = 1) -> Iterator[tuple[int, Any]]:
        """Yields (step, batch) over the epochs; after a rollback, the steps since again.

        A loader with `state_dict` and `load_state_dict` is sent back itself. Of any other one, in
        `recover` mode, the batches since the oldest snapshot are kept in memory.

        Args:
            loader: iterated over once per epoch.
            epochs: number of passes; steps are counted over all of them.
        """
        if not isinstance(epochs, int) or epochs < 1:
            raise ValueError(f"epochs is {epochs!r}; accepted: a positive integer")
        may_rewind = self._guard.mode == "recover"
        self._source = make_source(loader, epochs, keeps_batches=may_rewind)
        self._parts["data"] = self._source
        self._ring.clear()
        try:
            while not self._is_stopped:
                with self._own_time():
                    self._begin_step()
                try:
                    batch = self._source.fetch()
                except StopIteration:
                    return
                yield self._step, batch
                with self._own_time():
                    self._end_step()
        finally:
            del self._parts["data"]
            self._ring.clear()
            self._source = None

    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """Clips the gradients of all trainable parameters together, as
        `torch.nn.utils.clip_grad_norm_` does; the health scan is the norm pass.

        g <- g * min(1, max_norm / (|g| + 1e-6)).

        Args:
            max_norm: largest L2 norm of all gradients together.
        Returns:
            The norm before clipping, float32 (); NaN if a gradient is not finite.
        """
        if not max_norm > 0:
            raise ValueError(f"max_norm is {max_norm!r}; accepted: a positive number")
        with self._own_time(), torch.no_grad():
            finding = self._inspect_gradients()
            nan = finding.total_norm.new_full((), float("nan"))
            norm = torch.where(finding.has_nonfinite, nan, finding.total_norm).float()
            factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
            gradients = [p.grad for p in self._trainable if p.grad is not None]
            for device in {g.device for g in gradients}:
                here = [g for g in gradients if g.device == device]
                torch._foreach_mul_(here, factor.to(device))
            return norm

    def step(self, loss: torch.Tensor | float) -> Verdict:
        """Judges the step that has just been run.

        Args:
            loss: its loss, a number or a tensor with one element.
        Returns:
            Verdict, false when training is to stop.
        """
        with self._own_time():
            try:
                return self._judge(loss)
            except Exception:
                if self._guard.mode != "observe":
                    raise
                if not self._has_failed_inside:
                    _log.exception("foreshock failed at step %d; training goes on", self._step)
                self._has_failed_inside = True
                return Verdict(self._step)

    def finalize(self) -> dict[str, Any]:
        """Stops watching, writes summary.json, and returns what it says."""
        if self._summary is None:
            self._gate.remove()
            self._records.close()
            self._summary = self._write_summary()
        return self._summary

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *exception: object) -> None:
        self.finalize()

    # ---- the step

    def _begin_step(self) -> None:
        """Between two steps of `loop`: the place to return to, and to which one returns."""
        if self._rewind_to is not None:
            self._ring.restore(self._rewind_to)
            self._step = self._rewind_to.step
            self._rewind_to = None
        self._take_snapshot_if_due()

    def _end_step(self) -> None:
        if self._rewind_to is None:
            self._step += 1
        self._current = _Step()

    def _take_snapshot_if_due(self) -> None:
        if self._guard.mode != "recover":
            return
        entries = self._ring.entries
        is_due = self._step % self._guard.snapshot_interval == 0
        if entries and (not is_due or entries[-1].step == self._step):
            return
        self._ring.take(self._step)
        if isinstance(self._source, BufferedSource) and self._ring.entries:
            self._source.forget_before(self._ring.entries[0].saved["data"]["index"])

    def _inspect_gradients(self) -> Finding:
        if self._current.finding is None:
            gradients = [
                p.grad._values() if p.grad is not None and p.grad.is_sparse else p.grad
                for p in self._trainable
            ]
            self._current.finding = self._gradients.inspect(gradients)
        return self._current.finding

    def _inspect_weights(self, has_nonfinite_gradient: bool) -> bool:
        if not has_nonfinite_gradient and self._step % self._guard.check_interval:
            return False
        tensors = [*self._model.parameters(), *_floating_buffers(self._model).values()]
        return bool(self._weights.inspect(tensors).has_nonfinite)

    def _judge(self, loss: torch.Tensor | float) -> Verdict:
        if self._source is None and not self._ring.entries:
            self._take_snapshot_if_due()
        self._steps_run += 1
        value = float(loss.detach()) if isinstance(loss, torch.Tensor) else float(loss)
        finding = self._inspect_gradients()
        is_bad = bool(finding.has_nonfinite)
        signs = Signs(value, is_bad, self._inspect_weights(is_bad))
        decision = self._policy.decide(signs, lambda: self._snapshot() is not None)
        offender = None
        if decision.action is Action.CONTINUE:
            self._last_loss = value
            self._note_clean_step()
        else:
            inspector = self._weights if signs.has_nonfinite_weights else self._gradients
            offender = inspector.find_offender()
            self._act(decision, offender)
        self._current.decision = decision
        if self._step % self._settings.telemetry_interval == 0:
            self._record_telemetry(value, finding)
        should_go_on = not self._is_stopped
        verdict = Verdict(self._step, decision.action, decision.reasons, offender, should_go_on)
        if self._current.was_stepped and self._source is None:
            self._close_step()
        return verdict

    def _note_clean_step(self) -> None:
        self._ring.note_clean_step()
        if self._failed_step is not None and self._step >= self._failed_step:
            self._record(Recovered(self._failed_step))
            self._failed_step = None

    def _snapshot(self) -> Snapshot | None:
        """The one that a rollback would return to."""
        return self._ring.newest_good(self._step - self._guard.min_depth)

    def _act(self, decision: Decision, offender: Offender | None) -> None:
        step, reasons = self._step, decision.reasons
        is_too_late = self._current.was_stepped and not self._current.was_withheld
        if self._guard.mode == "observe" or (decision.action is Action.SKIP and is_too_late):
            self._record(AnomalySeen(step, decision.action, reasons, offender))
        elif decision.action is Action.SKIP:
            self._record(UpdateSkipped(step, reasons, offender))
        elif decision.action is Action.ROLL_BACK:
            self._roll_back(reasons, offender)
        elif decision.action is Action.ABORT:
            self._is_stopped = True
            self._record(Aborted(step, reasons, offender))
            self._write_summary()

    def _roll_back(self, reasons: tuple[Reason, ...], offender: Offender | None) -> None:
        snapshot = self._snapshot()
        assert snapshot is not None  # the policy has asked
        if self._source is not None:
            # The index of the failing batch is one behind; to be left out from now on.
            self._source.leave_out(self._source.index - 1, self._guard.skip_batches)
            self._rewind_to = snapshot
        self._ring.restore(snapshot)
        factor = self._learning_rate.back_off()
        self._failed_step = max(self._step, self._failed_step or 0)
        self._record(RolledBack(self._step, snapshot.step, reasons, offender, factor))

    def _admit(self, has_closure: bool) -> bool:
        """Whether the update of this step may reach the parameters."""
        if self._guard.mode == "observe" or has_closure:
            return True
        with self._own_time():
            if self._current.decision is not None:
                return self._current.decision.action is Action.CONTINUE
            return not bool(self._inspect_gradients().has_nonfinite)

    def _passed(self, was_admitted: bool) -> None:
        self._current.was_stepped = True
        self._current.was_withheld = not was_admitted
        if self._current.decision is not None and self._source is None:
            with self._own_time():
                self._close_step()

    def _close_step(self) -> None:
        """Outside `loop`, a step ends when it has been judged and the optimizer has been called."""
        self._step += 1
        self._current = _Step()
        self._take_snapshot_if_due()

    # ---- records

    def _record(self, event: Event) -> None:
        self._counts[type(event)] += 1
        said = {k: v for k, v in vars(event).items() if k not in ("step", "reasons", "offender")}
        if isinstance(event, AnomalySeen):
            said["would"] = event.would.value
        if isinstance(event, UpdateSkipped | AnomalySeen | RolledBack | Aborted):
            said["reason"] = event.reasons[0].value
            said["reasons"] = [reason.value for reason in event.reasons]
            said["offender"] = None if event.offender is None else vars(event.offender)
        name = _EVENT_NAMES[type(event)]
        self._records.write(name, event.step, **said)
        if not isinstance(event, Recovered):
            _log.warning("step %d: %s %s", event.step, name, said)

    def _record_telemetry(self, loss: float, finding: Finding) -> None:
        factor = self._learning_rate.factor
        self._records.write(
            "telemetry",
            self._step,
            train_loss=loss,
            grad_norm=float(finding.total_norm),
            learning_rate=float(self._optimizer.param_groups[0]["lr"]) * factor,
            overhead_ms=self._mean_overhead_ms(),
        )

    def _mean_overhead_ms(self) -> float:
        return 1e3 * self._own_seconds / max(1, self._steps_run)

    @contextlib.contextmanager
    def _own_time(self) -> Iterator[None]:
        """Counts the time spent in here as the monitor's own."""
        begun = time.perf_counter()
        if self._started is None:
            self._started = begun
        try:
            yield
        finally:
            self._own_seconds += time.perf_counter() - begun

    def _integrity(self) -> str:
        if self._counts[Aborted]:
            return "ABORTED"
        return "RECOVERED" if self._counts[RolledBack] or self._counts[UpdateSkipped] else "OK"

    def _write_summary(self) -> dict[str, Any]:
        total = time.perf_counter() - (self._started or time.perf_counter())
        theirs = total - self._own_seconds
        summary = {
            "total_steps": self._step,
            "final_loss": self._last_loss,
            "guard": {
                "mode": self._guard.mode,
                "total_rollbacks": self._counts[RolledBack],
                "total_recoveries": self._counts[Recovered],
                "skipped_steps": self._counts[UpdateSkipped],
                "anomalies_seen": self._counts[AnomalySeen],
                "dropped_snapshots": self._counts[SnapshotDropped],
                "integrity_status": self._integrity(),
            },
            "overhead": {
                "mean_ms": self._mean_overhead_ms(),
                "percent": 100 * self._own_seconds / theirs if theirs > 0 else 0.0,
            },
            "dropped_records": self._records.dropped_records,
        }
        try:
            write_summary(self._out_dir / "summary.json", summary)
        except OSError as error:
            _log.warning("summary.json could not be written: %s", error)
        return summary

    def _config(self) -> dict[str, Any]:
        return {
            "guard": self._guard.model_dump(),
            "monitor": self._settings.model_dump(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "backends": active_backends(),
        }


def _require(is_right: bool, name: str, given: object, accepted: str) -> None:
    if not is_right:
        raise TypeError(f"{name} is a {type(given).__name__}; accepted: {accepted}")


def _parts(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Stateful]
) -> dict[str, Part]:
    parts: dict[str, Part] = {
        "model": ModelState(model),
        "optimizer": OptimizerState(optimizer),
        "random": RandomState(),
    }
    for name, owner in state.items():
        has_both = isinstance(owner, Stateful)
        _require(has_both, f"state[{name!r}]", owner, "state_dict and load_state_dict")
        if name in (*parts, "data"):
            raise ValueError(f"state has the key {name!r}, which is taken; accepted: another name")
        parts[name] = StatefulPart(owner)
    return parts


def _floating_buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: b for name, b in model.named_buffers() if b.is_floating_point()}


def _weight_kinds(model: torch.nn.Module) -> Iterator[tuple[str, Kind]]:
    for name, _ in model.named_parameters():
        yield name, "parameter"
    for name in _floating_buffers(model):
        yield name, "buffer"
