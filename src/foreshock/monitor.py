"""The monitor: where signals, guard and records meet a training loop."""

from __future__ import annotations

import functools
import logging
import math
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from foreshock.activation_watch import ActivationWatch
from foreshock.followed import follow_noise, follow_spectra, follow_surprise
from foreshock.function_monitor import FunctionMonitor
from foreshock.gate_watch import GateWatch
from foreshock.gates import AlphaSchedule, GateMonitor, gates_of
from foreshock.guard import (
    RESERVED_NAMES,
    Aborted,
    BatchSource,
    Event,
    Guard,
    JointWatch,
    LaggingWatch,
    RolledBack,
    ScalerGate,
    Seen,
    Stateful,
    StepGate,
    Verdict,
    Watch,
    can_lag,
    find_ranks,
    make_source,
    named_parameters,
)
from foreshock.guard.clipping import NonfiniteNorm, as_max_norm
from foreshock.host_read import as_number
from foreshock.journal import Journal
from foreshock.logit_watch import AttentionWatch, LogitWatch
from foreshock.monitor_settings import MonitorSettings
from foreshock.ops import active_backends
from foreshock.run_metrics import RunMetrics, TrainingSettings
from foreshock.signals import SpectralWatch
from foreshock.spectral_risk import SpectralRisk
from foreshock.step_watch import StepWatch, shielded

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from foreshock.sinks import Sink
    from foreshock.surprise import SurpriseProbe

__all__ = ["Monitor", "MonitorSettings", "Verdict"]

_log = logging.getLogger("foreshock")

T = TypeVar("T")

_FLUSH_TIMEOUT_S = 2.0
_LAGGING_DEVICE = "cuda"
"""On which the host does not wait for what a step has shown; on the CPU there is nothing to wait
for."""


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
        optimizer: whose updates are guarded. Updates that compute their gradients in a closure
            (LBFGS) cannot be withheld; the state that they leave is watched all the same.
        out_dir: directory for the run's files; made if it is not there.
        guard: what may be done about a bad step; default `Guard()`, which only observes.
        state: more that belongs to the state of the run, by name: learning-rate scheduler, averaged
            weights, anything with `state_dict` and `load_state_dict`.
        telemetry_interval: steps between telemetry records.
        spectral_enabled: whether the spectra of the weight matrices are followed.
        spectral_interval: steps between looks at them.
        surprise: a probe of this model, fitted to what it knew before; now and then it listens to a
            step, and telemetry says how unlike that the batch was.
        gate_schedule: that rotation gates of the model are to keep to; it is rolled back with the
            run. Gates are found, and followed, by themselves.
        save_metrics: whether loss, learning rate and gradient norm of every step are recorded, in
            `metrics`, and drawn in the end, in `plots`.
        save_metrics_steps: steps between writing them.
        sinks: further places for what telemetry.jsonl is given, such as `fs.sinks.TensorBoard`;
            they are closed when the run ends.
        sync: whether the verdict is always that of the present step. On a CUDA device it is that of
            the step before where the optimizer is fused, or the guard only observes.
        process_group: the ranks that train this model together, each with a monitor of its own;
            all reach the same verdict, and only the first writes records. None: those of the
            default group, if the model is wrapped in DistributedDataParallel or its parameters are
            DTensors.
        more: the other fields of `MonitorSettings`; one that is unknown is answered with the
            nearest that there is.
    Raises:
        TypeError, ValueError: naming the argument, what was given and what is accepted.
        OSError: out_dir cannot be written to.
        RanksLost: in a later call: another rank has ended, or hangs.
    Cost:
        Per step one read of the gradients and one of the parameters, and of many ranks one
        all_reduce of 144 bytes (docs/ranks.md). On an accelerator each is waited for, unless the
        verdict is that of the step before (see `sync`). Snapshots (in `recover` mode) copy model
        and optimizer into host memory. Every `spectral_interval` steps up to 14 reads of the weight
        matrices.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        out_dir: str | os.PathLike[str],
        guard: Guard | None = None,
        *,
        state: Mapping[str, Stateful] | None = None,
        telemetry_interval: int = 10,
        spectral_enabled: bool = True,
        spectral_interval: int = 50,
        surprise: SurpriseProbe | None = None,
        gate_schedule: AlphaSchedule | None = None,
        save_metrics: bool = False,
        save_metrics_steps: int = 10,
        sinks: Sequence[Sink] = (),
        sync: bool = False,
        process_group: ProcessGroup | None = None,
        **more: Any,
    ) -> None:
        _require(isinstance(model, torch.nn.Module), "model", model, "a torch.nn.Module")
        is_optimizer = isinstance(optimizer, torch.optim.Optimizer)
        _require(is_optimizer, "optimizer", optimizer, "a torch.optim.Optimizer")
        _require(guard is None or isinstance(guard, Guard), "guard", guard, "a foreshock.Guard")
        self._settings = MonitorSettings(
            telemetry_interval=telemetry_interval,
            spectral_enabled=spectral_enabled,
            spectral_interval=spectral_interval,
            **more,
        )
        self._training = TrainingSettings(
            save_metrics=save_metrics, save_metrics_steps=save_metrics_steps
        )
        self._guard = guard or Guard()
        self._optimizer = optimizer
        is_schedule = gate_schedule is None or isinstance(gate_schedule, AlphaSchedule)
        _require(is_schedule, "gate_schedule", gate_schedule, "an AlphaSchedule or None")
        state = dict(_checked_state(state or {}))
        if gate_schedule is not None:
            state["gate_schedule"] = gate_schedule
        parameters = list(named_parameters(model, optimizer).values())
        self._ranks = find_ranks(model, parameters, process_group)
        spectra = follow_spectra(model, optimizer, self._settings, self._ranks)
        if spectra is not None:
            state["spectral"] = spectra
        self._noise = follow_noise(optimizer, self._settings)
        if self._noise is not None:
            state["noise"] = self._noise
        self._logits = LogitWatch(self._settings.logit_interval, self._record_series)
        self._attention = AttentionWatch(self._settings.logit_interval, self._record_series)
        watches = self._make_watches(model, surprise, gate_schedule)
        self._watches = {name: shielded(name, watch) for name, watch in watches.items()}
        state.update({n: w for n, w in self._watches.items() if isinstance(w, Stateful)})
        self._watch = self._make_watch(model, state, sync)
        self._watch.step = self._settings.first_step
        self._risk = None if spectra is None else self._make_risk(spectra)
        self._journal = self._open_journal(out_dir, self._config(spectra), sinks)
        self._metrics = self._make_metrics(model) if self._is_first else None
        self._summary: dict[str, Any] | None = None
        self._has_failed_inside = False
        self._gate = StepGate(
            optimizer,
            self._watch.learning_rate,
            self._watch.scaled,
            self._admit,
            self._note_call,
        )
        self._scaler_gates = self._make_scaler_gates()

    def _make_scaler_gates(self) -> list[ScalerGate]:
        watch = self._watch
        if not isinstance(watch, JointWatch):
            return []
        has_overflowed = functools.partial(self._timed, watch.has_overflowed)
        stepped = functools.partial(self._own, watch.note_scaler_stepped)
        return [ScalerGate(s, self._optimizer, has_overflowed, stepped) for s in watch.scalers]

    def _make_watch(
        self, model: torch.nn.Module, state: Mapping[str, Stateful], sync: bool
    ) -> Watch:
        given = (model, self._optimizer, state, self._guard, self._record)
        only_trainable = self._settings.parameters == "trainable"
        if self._ranks is not None:
            return JointWatch(*given, self._ranks, only_trainable=only_trainable)
        lags = not sync and can_lag(model, self._optimizer, self._guard, _LAGGING_DEVICE)
        return (LaggingWatch if lags else Watch)(*given, only_trainable=only_trainable)

    def _open_journal(
        self, out_dir: str | os.PathLike[str], config: Mapping[str, Any], sinks: Sequence[Sink]
    ) -> Journal:
        rank = 0 if self._ranks is None else self._ranks.rank
        if rank == 0:
            return Journal(out_dir, config, sinks)
        is_written = self._settings.rank_records
        own = Path(out_dir) / f"rank_{rank:05d}"
        return Journal(own, config, is_written=is_written, rank=rank)

    def _make_watches(
        self,
        model: torch.nn.Module,
        surprise: SurpriseProbe | None,
        gate_schedule: AlphaSchedule | None,
    ) -> dict[str, StepWatch]:
        """Those that are asked for, by the name under which their state is kept."""
        watches: dict[str, StepWatch] = {"logits": self._logits, "attention": self._attention}
        if surprise is not None:
            watches["surprise"] = follow_surprise(model, surprise, self._settings.surprise_interval)
        given = self._settings
        if given.activation_modules:
            watches["activations"] = ActivationWatch(
                model, given.activation_modules, given.activation_interval, self._record_series
            )
        if gates_of(model):
            gates = GateMonitor(model, gate_schedule, given.gates)
            watches["gates"] = GateWatch(
                gates, given.gate_interval, self._record, self._record_series
            )
        return watches

    def _make_metrics(self, model: torch.nn.Module) -> RunMetrics | None:
        given = self._training
        if not given.save_metrics:
            return None
        group = self._optimizer.param_groups[0]
        name = type(model).__name__
        return RunMetrics(self._journal.out_dir, name, given.save_metrics_steps, group)

    def _make_risk(self, spectra: SpectralWatch) -> SpectralRisk:
        given = self._settings
        return SpectralRisk(
            spectra,
            self._watch,
            self._guard,
            warmup=given.spectral_warmup,
            settling=(given.spectral.span or given.spectral.window) + given.spectral.patience,
            lags=isinstance(self._watch, LaggingWatch),
            may_act=given.spectral_response == "act",
            record=self._record,
        )

    @staticmethod
    def from_functions(
        save_fn: Callable[[], Any],
        load_fn: Callable[[Any], object],
        get_lr: Callable[[], Any],
        set_lr: Callable[[float], object],
        out_dir: str | os.PathLike[str],
        guard: Guard | None = None,
        **more: Any,
    ) -> FunctionMonitor:
        """A monitor of state that is not torch's, which functions save and put back.

        See `foreshock.function_monitor.FunctionMonitor`, whose arguments these are.
        """
        return FunctionMonitor(save_fn, load_fn, get_lr, set_lr, out_dir, guard, **more)

    # ---- what a training loop calls

    def resume(self, path: str | os.PathLike[str] | None = None) -> int | None:
        """Takes up a run that another process has left, from its newest snapshot on disk.

        Call it before the first step, and then run the same loops again: those that were over are
        passed by, and the one that was open goes on where the snapshot was taken. Parameters,
        buffers, optimizer, registered state, random generators and the monitor's own counts are
        put back in place. Nothing that is read is ever run.

        On many ranks all call it, and agree on the snapshot. It may be of another number of ranks,
        or split in another way; all must see the whole directory then.

        Args:
            path: a directory of snapshots, or one process's file; default `guard.persist_dir`.
        Returns:
            The step to go on from; None if there is no snapshot yet, as in the first process of a
            run. One that is damaged is refused and recorded, and the next older one used.
        Raises:
            ValueError: there is no path; the snapshot is of another model, optimizer or state, or
                has something that cannot be split as it is here; none of those in the directory can
                be used.
            RuntimeError: steps have been run already.
        """
        where = self._guard.persist_dir if path is None else Path(path)
        if where is None:
            raise ValueError("path is None and guard.persist_dir too; accepted: one of them")
        has_begun = self._watch.step != self._settings.first_step
        if has_begun or self._watch.history.has_start or self._watch.history.source:
            raise RuntimeError("resume is called after the first step; accepted: before it")
        return self._watch.resume(where)

    def loop(self, loader: Iterable[Any], epochs: int = 1) -> Iterator[tuple[int, Any]]:
        """Yields (step, batch) over the epochs; after a rollback, the steps since again.

        A loader with `state_dict` and `load_state_dict` is sent back itself. Of any other one, in
        `recover` mode, the batches since the oldest snapshot are kept in memory.

        Args:
            loader: iterated over once per epoch.
            epochs: number of passes; steps are counted over all of them, and over all loops.
        Raises:
            TypeError, ValueError: naming the argument, what was given and what is accepted.
        """
        is_iterable = hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")
        _require(is_iterable, "loader", loader, "an iterable of batches")
        if not isinstance(epochs, int) or isinstance(epochs, bool) or epochs < 1:
            raise ValueError(f"epochs is {epochs!r}; accepted: a positive integer")
        keeps_batches = self._guard.mode == "recover"
        return self._iterate(make_source(loader, epochs, keeps_batches=keeps_batches))

    def clip_grad_norm_(
        self,
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
        foreach: bool | None = None,
        *,
        loss: torch.Tensor | float | None = None,
    ) -> torch.Tensor:
        """Clips the gradients of all parameters together, as `foreshock.clip_grad_norm_` does.

        With a fused optimizer of torch the factor rides in its step, which costs no pass of its
        own: until then `.grad` holds what was there before.

        Args:
            max_norm: largest norm of all gradients together.
            norm_type: 2 or inf.
            error_if_nonfinite: whether a norm that is NaN or infinite is an error.
            foreach: accepted as torch does; there is one way only.
            loss: of the step, as it will be given to `step`. Of many ranks: what they have to tell
                each other for the verdict then travels with the norm, and `step` sends nothing.
        Returns:
            The norm before clipping, (), float64 if a gradient is, else float32; NaN or infinite if
            a gradient is.
        Raises:
            TypeError, ValueError: max_norm is no number, or below 0; norm_type is another one.
            RuntimeError: the norm is not finite, and error_if_nonfinite.
        Cost:
            One read of the gradients; if they are too large, and the optimizer is not fused, one
            scaling pass.
        """
        limit = as_max_norm(max_norm)
        if norm_type not in (2.0, math.inf):
            raise ValueError(f"norm_type is {norm_type!r}; accepted: 2 and inf")
        begun = self._journal.begin()
        try:
            if self._ranks is not None and loss is not None:
                self._watch.expect_loss(as_number(loss, "loss"))
            clip = functools.partial(self._watch.clip, limit, norm_type, error_if_nonfinite)
            norm = self._safely(clip, None)
            if norm is not None:
                return norm
            return torch.nn.utils.clip_grad_norm_(
                self._watch.parameters, limit, norm_type, error_if_nonfinite, foreach
            )
        finally:
            self._journal.end(begun)

    def clipped_by(self, clip: Callable[[], T]) -> T:
        """Looks at the gradients, and has somebody else clip them in their own way.

        The step is judged by what was seen before: after it, one NaN is in every gradient.

        Args:
            clip: called once; what it raises goes on to the caller.
        Returns:
            What clip has returned.
        Cost:
            One read of the gradients beside what clip costs.
        """
        self._own(self._watch.note_clip_begins)
        result = clip()
        self._own(self._watch.note_clipped)
        return result

    def step(
        self,
        loss: torch.Tensor | float,
        logits: torch.Tensor | None = None,
        *,
        attention_logits: torch.Tensor | Mapping[str, torch.Tensor] | None = None,
    ) -> Verdict:
        """Judges the step that has just been run.

        Args:
            loss: its loss, a number or a tensor with one element.
            logits: what its model has put out, to be looked at every `logit_interval` steps.
            attention_logits: what its attention has, before the softmax, or the largest of them; by
                layer, where there are several. Looked at as often.
        Returns:
            Verdict, false when training is to stop; `Verdict.step` says on which step (see `sync`).
        Raises:
            TypeError: an argument is something else.
        """
        begun = self._journal.begin()
        try:
            value = loss if self._lags(loss) else as_number(loss, "loss")
            self._logits.offer(logits)
            self._attention.offer(attention_logits)
            return self._safely(lambda: self._judge(value), Verdict(self._watch.step))
        finally:
            self._logits.offer(None)  # not to keep them alive
            self._attention.offer(None)
            self._journal.end(begun)

    def _lags(self, loss: torch.Tensor | float) -> bool:
        is_tensor = isinstance(loss, torch.Tensor) and loss.numel() == 1 and not loss.is_complex()
        return is_tensor and isinstance(self._watch, LaggingWatch)

    def _judge(self, loss: Any) -> Verdict:
        if self._watch.stopped is not None:
            return self._watch.stopped
        if self._summary is not None:
            return Verdict(self._watch.step)
        self._journal.steps_run += 1
        is_unstable = self._risk is not None and self._risk.look()
        before, step = self._watch.seen, self._watch.step
        if self._metrics is not None:
            source, factor = self._watch.history.source, self._watch.learning_rate.factor
            self._metrics.note_step(step, None if source is None else source.epoch, factor)
        verdict = self._watch.judge(loss, is_unstable=is_unstable)
        for watch in self._watches.values():
            watch.note_step(step)
        seen = self._watch.seen
        if seen is None or seen is before:
            return verdict
        if self._noise is not None:
            self._noise.note_step(seen.loss, seen.finding.norm)
        if self._metrics is not None:
            self._metrics.note_seen(seen)
        is_burst = self._risk is not None and self._risk.calls_for_telemetry
        if is_burst or seen.step % self._settings.telemetry_interval == 0:
            self._record_telemetry(seen)
        return verdict

    @property
    def counts(self) -> dict[str, int]:
        """What has happened so far: total_rollbacks and the like, as summary.json names them."""
        return self._journal.counts

    @property
    def _is_first(self) -> bool:
        return self._ranks is None or self._ranks.rank == 0

    @property
    def latest(self) -> dict[str, Any]:
        """The last telemetry record, as telemetry.jsonl has it; empty before the first."""
        return dict(self._journal.latest)

    def finalize(self) -> dict[str, Any]:
        """Stops watching, writes summary.json, and returns what it says. Again is harmless.

        The parameters are looked at once more: what the last update made, no later step has seen.
        """
        if self._summary is None:
            self._safely(self._watch.leave_loop, None)
            self._safely(self._watch.check_end, None)
            self._watch.autopsies.give_up("the run has ended")
            if self._risk is not None:
                self._own(self._risk.look_once_more)
            self._gate.remove()
            for gate in self._scaler_gates:
                gate.remove()
            for watch in self._watches.values():
                self._safely(watch.close, None)
            self._safely(self._watch.history.finish, None)
            if self._noise is not None and self._is_first:
                save = functools.partial(self._noise.save, self._journal.out_dir)
                self._safely(save, None)
            if self._metrics is not None:
                self._metrics.note_seen(self._watch.seen)  # a verdict may come a step late
                self._safely(self._metrics.close, None)
            self._journal.close()
            self._summary = self._write_summary()
        return self._summary

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *exception: object) -> None:
        if exception and exception[0] is not None:
            self._watch.leave()  # the other ranks may be elsewhere
        self.finalize()

    # ---- time and faults of our own

    def _own(self, work: Callable[[], object]) -> None:
        """Does something of our own, and counts the time."""
        self._timed(lambda: self._safely(work, None))

    def _timed(self, work: Callable[[], T]) -> T:
        begun = self._journal.begin()
        try:
            return work()
        finally:
            self._journal.end(begun)

    def _safely(self, work: Callable[[], T], otherwise: T) -> T:
        """In observe mode, a fault of our own is logged once and does not reach the training."""
        try:
            return work()
        except NonfiniteNorm:
            raise
        except Exception:
            if self._guard.mode != "observe":
                raise
            if not self._has_failed_inside:
                _log.exception("foreshock failed at step %d; training goes on", self._watch.step)
            self._has_failed_inside = True
            return otherwise

    # ---- the loop and the update

    def _iterate(self, source: BatchSource) -> Iterator[tuple[int, Any]]:
        self._own(self._watch.leave_loop)
        if not self._watch.history.open(source):
            return  # an earlier process has run it to its end
        try:
            while self._goes_on(source):
                begun = time.perf_counter()
                try:
                    batch = source.fetch()
                except StopIteration:
                    self._own(self._watch.check_end)
                    if self._watch.history.is_returning:
                        continue
                    return
                if self._watch.autopsies.is_on:
                    self._watch.autopsies.note_batch(source.index - 1, batch)
                self._watch.note_fetch(time.perf_counter() - begun)
                yield self._watch.step, batch
                if self._watch.history.source is not source:
                    return  # the run was finalized, or a later loop has taken over
                self._own(self._watch.finish_step)
        finally:
            if self._watch.history.source is source:
                self._own(self._watch.leave_loop)

    def _goes_on(self, source: BatchSource) -> bool:
        if self._watch.stopped is None:
            self._own(self._watch.start_step)
        return self._watch.stopped is None

    def _admit(self, has_closure: bool) -> bool:
        """Whether the update that is about to be made may reach the parameters."""
        is_admitted = self._decide_on_update(has_closure)
        if is_admitted and not has_closure and self._noise is not None:
            noise, step = self._noise, self._watch.step
            self._own(lambda: noise.note_update_begins(step))
        return is_admitted

    def _decide_on_update(self, has_closure: bool) -> bool:
        self._watch.history.hold_back_update()
        if self._guard.mode == "observe":
            if not has_closure:
                self._own(self._watch.observe_update)
            return True
        return self._timed(lambda: self._watch.admits(has_closure))

    def _note_call(self, was_admitted: bool) -> None:
        if self._noise is not None:
            noise = self._noise
            self._own(lambda: noise.note_update_ends(was_admitted))
        self._own(lambda: self._watch.note_call(was_admitted))

    # ---- records

    def _record(self, event: Event) -> None:
        self._journal.record(event)
        if isinstance(event, RolledBack) and self._risk is not None:
            self._risk.note_rollback(event.step)
        if isinstance(event, Aborted):
            self._journal.flush(_FLUSH_TIMEOUT_S)
            self._write_summary()

    def _record_telemetry(self, seen: Seen) -> None:
        rate = self._optimizer.param_groups[0].get("lr")
        factor = self._watch.learning_rate.factor
        self._journal.record_telemetry(
            seen.step,
            train_loss=seen.loss,
            grad_norm=seen.finding.finite_norm,
            learning_rate=None if rate is None else float(rate) * factor,
            largest_gradients=self._watch.largest_gradients(self._settings.telemetry_top_k),
            **self._watch.scores,
            **({} if self._risk is None else self._risk.telemetry()),
            **({} if self._noise is None else self._noise.telemetry()),
            **{k: v for watch in self._watches.values() for k, v in watch.telemetry().items()},
        )

    def _record_series(self, series: str, step: int, /, **values: object) -> None:
        self._journal.record_series(series, step, **values)

    def _write_summary(self) -> dict[str, Any]:
        return self._journal.write_summary(
            self._watch.step,
            self._watch.last_loss,
            self._guard.mode,
            None if self._risk is None else self._risk.summary(),
        )

    def _config(self, spectra: SpectralWatch | None) -> dict[str, Any]:
        return {
            "guard": self._guard.model_dump(mode="json"),
            "monitor": self._settings.model_dump(mode="json"),
            "training": self._training.model_dump(mode="json"),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "backends": active_backends(),
            "buffers_not_finite_from_the_start": self._watch.buffers_left_alone,
            "spectral_passed_over": None if spectra is None else spectra.passed_over,
        }


def _require(is_right: bool, name: str, given: object, accepted: str) -> None:
    if not is_right:
        raise TypeError(f"{name} is a {type(given).__name__}; accepted: {accepted}")


def _checked_state(state: Mapping[str, Stateful]) -> Mapping[str, Stateful]:
    _require(isinstance(state, Mapping), "state", state, "a mapping from names")
    for name, owner in state.items():
        has_both = isinstance(owner, Stateful)
        _require(has_both, f"state[{name!r}]", owner, "state_dict and load_state_dict")
        if name in RESERVED_NAMES:
            raise ValueError(f"state has the key {name!r}, which is taken; accepted: another name")
    return state
