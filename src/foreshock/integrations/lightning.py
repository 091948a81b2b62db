"""foreshock in the Trainer of Lightning."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from foreshock.guard import Stateful, Verdict
from foreshock.integrations.callback import WatchingCallback
from foreshock.integrations.wrapped_calls import WrappedCalls
from foreshock.monitor import Monitor

try:
    from lightning.pytorch import Callback
except ModuleNotFoundError:  # the same Trainer under its older name
    from pytorch_lightning import Callback

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

_log = logging.getLogger("foreshock")


class MonitorCallback(WatchingCallback["_Attached"], Callback):  # type: ignore[misc]
    """Watches, and if it is told to guards, the training of a Lightning `Trainer`.

    >>> trainer = Trainer(callbacks=[MonitorCallback(out_dir="runs/x")], ...)
    >>> trainer.fit(module, loader)

    A step of the monitor is one update of the Trainer, with the number that `trainer.global_step`
    has when it begins. Its loss is that of the training step, averaged over the batches whose
    gradients are accumulated. Gradients are looked at before they are clipped; Lightning clips them
    itself. An update that is not to be made never reaches the optimizer, and counts as a step. A
    rollback restores model, optimizer, schedulers, GradScaler, averaged weights and random numbers;
    the Trainer goes on with its next batch. It is told to stop when the guard gives up.

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
            training begins, of a module that is optimized manually.
        OSError: out_dir cannot be written to; when training begins.
    Cost:
        That of `foreshock.Monitor`.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts watching; a checkpoint has been loaded by now."""
        self._detach()
        if not pl_module.automatic_optimization:
            raise ValueError(
                "automatic_optimization is False; accepted: True. A training_step that optimizes "
                "by itself, with one optimizer or several, uses foreshock.Monitor instead"
            )
        optimizer = trainer.optimizers[0]  # the only one, where optimization is automatic
        if not optimizer.param_groups:
            _log.warning("configure_optimizers has returned None: there is nothing to watch")
            return
        ungated = optimizer.step
        monitor = Monitor(
            pl_module,
            optimizer,
            self._out_dir,
            self._guard,
            state={**_state_of(trainer), **self._state},
            first_step=trainer.global_step,
            **self._settings,
        )
        only_observes = self._guard.mode == "observe"
        self._attached = _Attached(trainer, monitor, ungated, only_observes=only_observes)

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor
    ) -> None:
        """Takes the loss of the training step."""
        if self._attached is not None:
            self._attached.add_loss(loss)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Judges the step; the clip and the update come next."""
        if self._attached is not None:
            self._attached.judge()

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Tells the loggers what is new, and the Trainer to stop when the guard has given up."""
        if self._attached is not None:
            self._attached.tell()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops watching, and writes the summary."""
        self._detach()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Stops watching, and writes the summary."""
        self._detach()


class _Attached:
    """A monitor on a Trainer, until `close`.

    Two calls go through here: the optimizer's step, which Lightning hands the forward and backward
    pass as a closure, and the precision plugin's clip.

    Args:
        trainer: that trains.
        monitor: of its module and optimizer.
        ungated: the optimizer's step, as it was before the monitor came.
        only_observes: whether no update is ever withheld.
    """

    def __init__(
        self,
        trainer: Trainer,
        monitor: Monitor,
        ungated: Callable[..., Any],
        *,
        only_observes: bool,
    ) -> None:
        self.monitor = monitor
        self._trainer = trainer
        self._ungated = ungated
        self._verdict: Verdict | bool = True
        self._loss = torch.zeros(())
        self._update: int | None = None
        """Number of the update that the loss belongs to."""
        self._is_judged = False
        self._told_step: object = None
        self._calls = WrappedCalls()
        self._calls.wrap(trainer.precision_plugin, "clip_gradients", self._clip)
        optimizer = trainer.optimizers[0]
        if _may_run_closure_ahead(optimizer, only_observes):
            self._calls.wrap(optimizer, "step", self._step)

    def close(self) -> dict[str, Any]:
        """Puts back what was wrapped."""
        self._calls.undo()
        return self.monitor.finalize()

    def _clip(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.monitor.clipped_by(lambda: inner(*args, **kwargs))

    def _step(
        self,
        gated: Callable[..., Any],
        closure: Callable[[], Any] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """The closure first, since what it computes decides on the step."""
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        (gated if self._has_loss else self._ungated)(*args, **kwargs)
        return result

    def add_loss(self, loss: torch.Tensor) -> None:
        """Of one of the batches whose gradients make an update, divided by their number."""
        scaler = _scaler_of(self._trainer)
        loss = loss.detach()
        if scaler is not None and scaler.is_enabled():
            scale: Any = scaler._scale  # get_scale() would wait for the device
            loss = loss / scale
        if self._has_loss:
            self._loss = self._loss + loss
        else:
            self._update, self._loss, self._is_judged = self._trainer.global_step, loss, False

    @property
    def _has_loss(self) -> bool:
        """Not if training_step has returned None: there are no gradients then, and no update."""
        step: int = self._trainer.global_step
        return self._update == step

    def judge(self) -> None:
        """Of the update that is about to be made; once, however often its closure is called."""
        if self._has_loss and not self._is_judged:
            self._is_judged = True
            self._verdict = self.monitor.step(self._loss)

    def tell(self) -> None:
        """To the loggers, which take numbers, and to the Trainer."""
        if not self._verdict:
            self._trainer.should_stop = True
        latest = self.monitor.latest
        if not latest or latest["step"] == self._told_step:
            return
        step = self._told_step = latest.pop("step")
        told = {**latest, **self.monitor.counts}
        numbers = {f"foreshock/{k}": float(v) for k, v in told.items() if _is_number(v)}
        for logger in self._trainer.loggers:
            logger.log_metrics(numbers, step=step)


def _may_run_closure_ahead(optimizer: torch.optim.Optimizer, only_observes: bool) -> bool:
    """Whether `loss = closure(); step()` does what `step(closure)` does.

    Not where the closure is called more than once, as by LBFGS. An optimizer that is not torch's
    may hide that it does so: it is left alone as long as nothing would be withheld.
    """
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    is_required = closure is not None and closure.default is closure.empty
    is_torchs = type(optimizer).__module__.startswith("torch.optim")
    return not is_required and (is_torchs or not only_observes)


class _Schedulers:
    """The schedulers of a Trainer, whose callbacks may replace them while it trains."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def _present(self) -> list[Any]:
        return [config.scheduler for config in self._trainer.lr_scheduler_configs]

    def state_dict(self) -> list[Any]:
        return [[type(s).__name__, s.state_dict()] for s in self._present()]

    def load_state_dict(self, state_dict: list[Any]) -> None:
        """One that has come in the place of another since then is left as it is."""
        for scheduler, (kind, saved) in zip(self._present(), state_dict, strict=False):
            if type(scheduler).__name__ == kind:
                scheduler.load_state_dict(saved)


def _state_of(trainer: Trainer) -> dict[str, Stateful]:
    """What belongs to the state of the run beside model and optimizer."""
    state: dict[str, Stateful] = {"schedulers": _Schedulers(trainer)}
    scaler = _scaler_of(trainer)
    if scaler is not None:
        state["scaler"] = scaler
    averages = [getattr(callback, "_average_model", None) for callback in trainer.callbacks]
    averaged = [average for average in averages if isinstance(average, torch.nn.Module)]
    return state | {f"averaged_{i}": average for i, average in enumerate(averaged)}


def _scaler_of(trainer: Trainer) -> torch.amp.GradScaler | None:
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler if isinstance(scaler, torch.amp.GradScaler) else None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)
