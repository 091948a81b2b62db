"""foreshock in the Trainer of Hugging Face transformers."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from foreshock.guard import Verdict
from foreshock.integrations.accelerate import let_scaler_step_through_the_gate, watch
from foreshock.integrations.callback import WatchingCallback
from foreshock.integrations.wrapped_calls import WrappedCalls
from foreshock.monitor import Monitor

_log = logging.getLogger("foreshock")


class MonitorCallback(WatchingCallback["_Attached"], TrainerCallback):  # type: ignore[misc]
    """Watches, and if it is told to guards, the training of a `transformers.Trainer`.

    >>> trainer = Trainer(model, args, callbacks=[MonitorCallback(out_dir="runs/x")], ...)
    >>> trainer.train()

    A step of the monitor is one update of the Trainer, with the number that `state.global_step` has
    when it begins: from 0, or from that of the checkpoint that is resumed from. The loss is that of
    its training step, summed over the gradients that are accumulated. Gradients are looked at
    before they are clipped: by the Trainer where the guard only observes, which changes no bit of
    what is learned; else by the monitor, whose norm is that of the same pass. An update that is not
    to be made never reaches the optimizer, and counts as a step. A rollback restores model,
    optimizer, scheduler, GradScaler and random numbers; the Trainer goes on with its next batch and
    counts on, and so does the monitor. The Trainer is told to stop when the guard gives up. Many
    ranks decide together.

    `logging_nan_inf_filter`, which hides a loss that is NaN behind the mean of those before and
    waits for the device in every step, is switched off.

    Args:
        out_dir: directory of the run's records.
        guard_enabled: whether bad updates are withheld and bad states rolled back (`recover`);
            otherwise they are only told of (`observe`).
        guard_snapshot_interval: steps between snapshots, as in `foreshock.Guard`.
        guard_violation_threshold: a loss over this is a violation; likewise.
        guard_max_rollbacks: before the run is given up; likewise.
        guard_lr_backoff: factor on the learning rate after a rollback; likewise.
        spectral_enabled: whether the spectra of the weights are followed.
        spectral_interval: steps between looks at them.
        telemetry_interval: steps between telemetry records.
        parameters: trainable: only parameters that require a gradient are scanned and copied, which
            of a model with adapters are few. all: frozen ones too.
        guard: the other fields of `foreshock.Guard`, by name.
        more: the other settings of `foreshock.Monitor`.
    Raises:
        TypeError, ValueError: naming the argument, what was given and what is accepted; when
            training begins also a guard that is enabled under an engine that shards (but FSDP2).
        OSError: out_dir cannot be written to; when training begins.
    Cost:
        That of `foreshock.Monitor`.
    """

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Starts watching."""
        self._detach()
        if args.logging_nan_inf_filter:
            _log.warning(
                "logging_nan_inf_filter is switched off: it hides a loss that is NaN, and waits "
                "for the device in every step"
            )
            args.logging_nan_inf_filter = False
        trainer = _trainer_of_this_call()
        is_observer = self._guard.mode == "observe"
        self._attached = _Attached(trainer, self._make_monitor(trainer), is_observer=is_observer)

    def _make_monitor(self, trainer: Trainer) -> Monitor:
        return watch(
            trainer.accelerator,
            trainer.model,
            trainer.optimizer,
            self._out_dir,
            self._guard,
            state={"scheduler": trainer.lr_scheduler, **self._state},
            first_step=trainer.state.global_step,
            **self._settings,
        )

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Judges the step; the update comes next, and is withheld if it is a bad one."""
        if self._attached is not None:
            self._attached.judge()

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Tells the Trainer to stop when the guard has given up."""
        if self._attached is not None and not self._attached.verdict:
            control.should_training_stop = True

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Stops watching, and writes the summary."""
        self._detach()


class _Attached:
    """A monitor on a Trainer, until `close`.

    Callbacks come after the Trainer has clipped and are told of no loss, so some of the Trainer's
    own calls go through here: a training step, the accelerator's clip and what it does of a
    GradScaler's factor, and what is logged.
    """

    def __init__(self, trainer: Trainer, monitor: Monitor, *, is_observer: bool) -> None:
        self.monitor = monitor
        self._is_observer = is_observer
        self.verdict: Verdict | bool = True
        self._trainer = trainer
        self._loss: torch.Tensor | None = None
        self._is_unscaled = False
        self._calls = WrappedCalls()
        self._calls.wrap(trainer, "training_step", self._training_step)
        self._calls.wrap(trainer, "log", self._log)
        self._calls.wrap(trainer.accelerator, "clip_grad_norm_", self._clip_grad_norm_)
        self._calls.wrap(trainer.accelerator, "unscale_gradients", self._unscale_gradients)

    def close(self) -> dict[str, Any]:
        """Puts back what was wrapped."""
        self._calls.undo()
        summary = self.monitor.finalize()
        let_scaler_step_through_the_gate(self._trainer.optimizer)
        return summary

    def judge(self) -> None:
        """Of the update that is about to be made."""
        loss, self._loss = self._loss, None
        if loss is not None:
            self._trainer.accelerator.unscale_gradients()  # where nothing is clipped
            self.verdict = self.monitor.step(loss)
        self._is_unscaled = False

    def _training_step(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        loss = inner(*args, **kwargs)
        self._loss = loss if self._loss is None else self._loss + loss
        return loss

    def _clip_grad_norm_(
        self, inner: Callable[..., Any], parameters: Any, max_norm: float, norm_type: float = 2
    ) -> Any:
        self._trainer.accelerator.unscale_gradients()
        if self._is_observer:
            return self.monitor.clipped_by(lambda: inner(parameters, max_norm, norm_type))
        return self.monitor.clip_grad_norm_(max_norm, float(norm_type), loss=self._loss)

    def _unscale_gradients(self, inner: Callable[..., Any], *args: Any) -> None:
        """Once an update: a GradScaler refuses a second time."""
        if not self._is_unscaled:
            inner(*args)
        self._is_unscaled = True

    def _log(
        self, inner: Callable[..., Any], logs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        return inner({**logs, **self._told()}, *args, **kwargs)

    def _told(self) -> dict[str, float]:
        """For the Trainer's trackers, which take numbers."""
        told = {**self.monitor.latest, **self.monitor.counts}
        numbers = {k: v for k, v in told.items() if isinstance(v, int | float)}
        return {f"foreshock/{name}": float(value) for name, value in numbers.items()}


def _trainer_of_this_call() -> Trainer:
    """The Trainer that calls the callback, which it hides from callbacks."""
    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, Trainer):
            return owner
        frame = frame.f_back  # type: ignore[assignment]
    raise RuntimeError("MonitorCallback was called by no Trainer; accepted: Trainer(callbacks=[…])")
