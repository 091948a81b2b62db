"""A training that faults can be put into: one rank or two, with or without a loss scale."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from foreshock.drill.scenarios import Scenario, Variant
from foreshock.drill.subjects import Batch, Subject, Training
from foreshock.drill.text import random_word

_FIRST_SCALE = 2.0**10


class Trainee:
    """The parts of a training, and the half of a step that comes before its update.

    Two ranks are simulated in one process: two replicas, each with half of the batch, whose
    gradients are averaged.

    Args:
        subject: what is trained.
        seed: of the training.
        variant: see `Variant`.
    """

    def __init__(self, subject: Subject, seed: int, variant: Variant = "plain") -> None:
        self.subject = subject
        self.replicas: list[Training] = [
            subject.build(seed) for _ in range(2 if variant == "replicated" else 1)
        ]
        first = self.replicas[0]
        self.model, self.optimizer, self.scheduler = first.model, first.optimizer, first.scheduler
        self.scaler = _scaler() if variant == "scaled" else None
        self.random = torch.Generator().manual_seed(seed)
        """What faults draw from."""
        self.batch: Batch = first.batch_at(0)
        self._altering: list[torch.utils.hooks.RemovableHandle] = []

    # ---- what faults take hold of

    def reseed(self, scenario: str, seed: int) -> None:
        """What a fault draws from now on depends on these two alone."""
        self.random.manual_seed(random_word(seed, zlib.crc32(scenario.encode())) % 2**63)

    def parameter(self, name: str) -> nn.Parameter:
        """Of the first rank."""
        return self.model.get_parameter(name)

    def moment(self, parameter: str, name: str) -> Tensor:
        """An entry of the optimizer's state on the first rank."""
        moment: Tensor = self.optimizer.state[self.parameter(parameter)][name]
        return moment

    def alter_output(self, module: str, alter: Callable[[Tensor], Tensor]) -> None:
        """In this step, `module` returns alter(output) instead."""
        owner = self.model.get_submodule(module)
        handle = owner.register_forward_hook(lambda _, __, output: alter(output), prepend=True)
        self._altering.append(handle)

    def alter_input(self, alter: Callable[[Tensor], Tensor]) -> None:
        """In this step, the model is given alter(input) instead."""
        if self.subject.input_module is not None:
            self.alter_output(self.subject.input_module, alter)
        else:
            x, y = self.batch
            self.batch = alter(x), y

    # ---- the step

    def batch_at(self, step: int) -> Batch:
        """A pure function of the seed and the step."""
        return self.replicas[0].batch_at(step)

    def take_gradients(self, batch: Batch, scenario: Scenario | None, age: int) -> Tensor:
        """Forward and backward on every rank; the gradients are those that the optimizer gets.

        Args:
            batch: of this step.
            scenario: whose fault is put in; None: no fault.
            age: steps since the fault began.
        Returns:
            () the loss, the mean of all ranks'.
        """
        self.batch = batch
        self._inject("before_forward", scenario, age)
        x, y = self.batch
        share = len(x) // len(self.replicas)
        losses = []
        for rank, replica in enumerate(self.replicas):
            rows = slice(rank * share, (rank + 1) * share)
            replica.optimizer.zero_grad()
            loss = replica.loss_of(replica.model(x[rows]), y[rows])
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
            losses.append(loss.detach())
        for handle in self._altering:
            handle.remove()
        self._altering.clear()
        if len(self.replicas) > 1:
            _average_gradients([r.model for r in self.replicas])
        self._inject("after_backward", scenario, age)
        if self.scaler is not None:
            _round_gradients_to_half(self.model)
            self.scaler.unscale_(self.optimizer)
        return torch.stack(losses).mean()

    def _inject(self, when: str, scenario: Scenario | None, age: int) -> None:
        if scenario is not None and scenario.when == when:
            scenario.inject(self, age)

    def update(self) -> None:
        """The update on the first rank; those of others are the caller's."""
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.scheduler.step()

    # ---- there and back

    def state(self) -> dict[str, Any]:
        """A copy of everything that later steps depend on."""
        owners = [
            {
                "model": r.model.state_dict(),
                "optimizer": r.optimizer.state_dict(),
                "scheduler": r.scheduler.state_dict(),
            }
            for r in self.replicas
        ]
        scaler = None if self.scaler is None else self.scaler.state_dict()
        return copy.deepcopy({"replicas": owners, "scaler": scaler})

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on from there, bit for bit."""
        state = copy.deepcopy(state)
        for replica, saved in zip(self.replicas, state["replicas"], strict=True):
            replica.model.load_state_dict(saved["model"])
            replica.optimizer.load_state_dict(saved["optimizer"])
            replica.scheduler.load_state_dict(saved["scheduler"])
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])


def _scaler() -> torch.amp.GradScaler:
    scaler = torch.amp.GradScaler("cpu", init_scale=_FIRST_SCALE, growth_interval=10**9)
    scaler.scale(torch.zeros(()))  # the scale comes into being with the first use
    return scaler


@torch.no_grad()
def _average_gradients(models: list[nn.Module]) -> None:
    for owners in zip(*(model.parameters() for model in models), strict=True):
        gradients = [p.grad for p in owners if p.grad is not None]
        mean = torch.stack(gradients).mean(0)
        for gradient in gradients:
            gradient.copy_(mean)


@torch.no_grad()
def _round_gradients_to_half(model: nn.Module) -> None:
    for p in model.parameters():
        if p.grad is not None:
            p.grad.copy_(p.grad.half())
