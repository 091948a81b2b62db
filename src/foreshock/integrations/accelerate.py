"""foreshock in a training loop of one's own that uses Hugging Face accelerate."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer, patch_optimizer_step

from foreshock.distributed_part import is_distributed
from foreshock.guard import Guard, Stateful
from foreshock.monitor import Monitor

_log = logging.getLogger("foreshock")

_UNGUARDED = {
    "FSDP": "a process sees but its own part of parameters and gradients, and its norm",
    "MEGATRON_LM": "a process sees but its own part of parameters and gradients, and its norm",
    "DEEPSPEED": "gradients are kept by the engine (p.grad is None), and none are seen",
    "XLA": "gradients are not added up over the processes until the engine clips them",
}
"""What keeps a guard from acting under an engine of accelerate, and is true of telemetry too."""


def watch(
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    out_dir: str | os.PathLike[str],
    guard: Guard | None = None,
    *,
    state: Mapping[str, Stateful] | None = None,
    **settings: Any,
) -> Monitor:
    """A monitor on what an `Accelerator` has prepared.

    It is put where accelerate's own wrappers cannot hide from it what happens: on the model and the
    optimizer within, whose step is not called in the middle of an accumulation. To the state of the
    run it adds the `GradScaler`, if there is one, and accelerate's count of batches, without which
    accumulations would be out of step after a rollback.

    >>> model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    >>> monitor = watch(accelerator, model, optimizer, "runs/x", fs.Guard(mode="recover"))
    >>> for step, batch in monitor.loop(loader):
    ...     with accelerator.accumulate(model):
    ...         loss = model(**batch).loss
    ...         accelerator.backward(loss)
    ...         if accelerator.sync_gradients:
    ...             accelerator.unscale_gradients()
    ...             monitor.clip_grad_norm_(1.0)
    ...         verdict = monitor.step(loss)
    ...         optimizer.step()
    ...         optimizer.zero_grad()
    ...     if not verdict:
    ...         break

    Args:
        accelerator: that has prepared them.
        model: as `accelerator.prepare` has returned it.
        optimizer: likewise.
        out_dir: directory of the run's records.
        guard: what may be done about a bad step; default `Guard()`, which only observes.
        state: more that belongs to the state of the run, such as the scheduler.
        settings: the other settings of `foreshock.Monitor`.
    Returns:
        The monitor.
    Raises:
        TypeError, ValueError: naming the argument, what was given and what is accepted; also a
            guard that is to act under an engine that shards (but FSDP2), or to roll back where
            accelerate ends accumulations with the loader.
        OSError: out_dir cannot be written to.
    Cost:
        That of `foreshock.Monitor`.
    """
    guard = guard or Guard()
    why = why_unguarded(accelerator.distributed_type.value, model)
    if why is not None and guard.mode != "observe":
        raise ValueError(f"guard has mode={guard.mode!r}, but {why}; accepted: mode='observe'")
    if why is not None:
        _log.warning("%s; telemetry has no more than that", why)
    _check_accumulation(accelerator, guard)
    # Of what the ranks do not hold alike they cannot speak to each other.
    is_alone = why is not None and not _is_distributed(model)
    if is_alone and accelerator.process_index:
        out_dir = Path(out_dir) / f"rank_{accelerator.process_index:05d}"
    known: dict[str, Stateful] = {"accumulation": AccumulationCount(accelerator)}
    if isinstance(accelerator.scaler, torch.amp.GradScaler):
        known["scaler"] = accelerator.scaler
    monitor = Monitor(
        accelerator.unwrap_model(model, keep_torch_compile=False),
        _innermost(optimizer),
        out_dir,
        guard,
        state={**known, **(state or {})},
        **{"process_group": None if is_alone else _ranks_of(accelerator), **settings},
    )
    let_scaler_step_through_the_gate(optimizer)
    return monitor


def _ranks_of(accelerator: Accelerator) -> Any:
    """Those that train the model together; None if this process does so alone."""
    is_of_many = accelerator.num_processes > 1 and torch.distributed.is_initialized()
    return torch.distributed.group.WORLD if is_of_many else None


def why_unguarded(engine: str, model: torch.nn.Module) -> str | None:
    """In plain words, why bad updates can neither be withheld nor undone here; None if they can.

    Args:
        engine: value of an `accelerate.DistributedType`.
        model: whose parameters may be distributed by somebody else.
    """
    if _is_distributed(model):
        if engine == "FSDP":
            return None  # its second version, whose ranks decide together
        return f"parameters are distributed ({engine}), and not by accelerate's FSDP"
    return f"under {engine} {_UNGUARDED[engine]}" if engine in _UNGUARDED else None


def _is_distributed(model: torch.nn.Module) -> bool:
    return any(map(is_distributed, model.parameters()))


def _check_accumulation(accelerator: Accelerator, guard: Guard) -> None:
    """Batches that are handed out again do not say whether they were the last of an epoch."""
    steps = accelerator.gradient_accumulation_steps
    if guard.mode == "recover" and steps > 1 and accelerator.gradient_state.sync_with_dataloader:
        raise ValueError(
            f"accelerator has gradient_accumulation_steps={steps} and ends an accumulation with "
            "the loader, which steps that are run again cannot; accepted with mode='recover': "
            f"GradientAccumulationPlugin(num_steps={steps}, sync_with_dataloader=False)"
        )


class AccumulationCount:
    """The batches that `Accelerator.accumulate` has counted, as part of the state of a run.

    Args:
        accelerator: whose count.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator

    def state_dict(self) -> dict[str, int]:
        """The count."""
        return {"step": self._accelerator.step}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Counts on from there."""
        self._accelerator.step = state_dict["step"]


def _innermost(optimizer: Any) -> torch.optim.Optimizer:
    """What accelerate has wrapped."""
    while not isinstance(optimizer, torch.optim.Optimizer) or hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def let_scaler_step_through_the_gate(optimizer: Any) -> None:
    """With a GradScaler, accelerate calls the step that the optimizer had when it was prepared.

    Args:
        optimizer: as prepared.
    """
    if not isinstance(optimizer, AcceleratedOptimizer) or optimizer.scaler is None:
        return
    step = _innermost(optimizer).step
    optimizer._optimizer_original_step_method = step
    optimizer._optimizer_patched_step_method = patch_optimizer_step(optimizer, step)
