"""A training that is looked at in every step, and into which faults can be put.

Shapes: B rows of a batch, T tokens of a row, C channels, H attention heads, M matrices.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from foreshock.drill.observation import Observation
from foreshock.drill.scenarios import Scenario, Variant
from foreshock.drill.subjects import MAX_NORM, Batch, Subject, Training
from foreshock.drill.text import random_word
from foreshock.guard import Guard, StepGate, Watch
from foreshock.guard.snapshots import checksum
from foreshock.ops import PowerIterator, health_scan
from foreshock.signals import SpectralTracker, second_moment_rms, weight_decays

_FIRST_SCALE = 2.0**10
_RESTARTED_PASSES = 10
_MONITOR_INTERVAL = 50
_KAPPA, _RANK = 2, 3  # columns of SpectralStats.packed


class Rehearsal:
    """A training, the guard in observe mode, and everything that a rule may want to know.

    Two ranks are simulated in one process: two replicas, each with half of the batch, whose
    gradients are averaged. What is observed is the first one's, but for the comparison.

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
        self.model, self.optimizer = first.model, first.optimizer
        self.scaler = _scaler() if variant == "scaled" else None
        self.step = 0
        self.random = torch.Generator().manual_seed(seed)
        self.batch: Batch = first.batch_at(0)
        self._guards = [self._guard(training) for training in self.replicas]
        self._modules = _ModuleOutputs(self.model)
        self._attention = _AttentionLogits(self.model, subject.attention_modules)
        self._spectra = _Spectra(self.model, self.optimizer, seed)
        self._altering: list[torch.utils.hooks.RemovableHandle] = []

    def _guard(self, training: Training) -> tuple[Watch, StepGate]:
        state: dict[str, Any] = {} if self.scaler is None else {"scaler": self.scaler}
        observing = Guard(mode="observe")
        watch = Watch(training.model, training.optimizer, state, observing, lambda event: None)

        def admits(has_closure: bool) -> bool:
            watch.observe_update()
            return True

        gate = StepGate(
            training.optimizer, watch.learning_rate, watch.scaled, admits, watch.note_call
        )
        return watch, gate

    # ---- what faults take hold of

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

    def run(
        self, num_steps: int, scenario: Scenario | None = None, start: int = 0
    ) -> Iterator[Observation]:
        """Trains, and yields what is seen of each step; with a scenario, its fault is put in.

        Args:
            num_steps: to be run.
            scenario: None for a healthy run.
            start: step of the fault.
        """
        for _ in range(num_steps):
            age = self.step - start
            is_struck = scenario is not None and 0 <= age < scenario.duration
            yield self._run_step(scenario if is_struck else None, age)

    def reseed(self, scenario: str, seed: int) -> None:
        """What a fault draws from now on depends on these two alone."""
        self.random.manual_seed(random_word(seed, zlib.crc32(scenario.encode())) % 2**63)

    def _run_step(self, scenario: Scenario | None, age: int) -> Observation:
        self.batch = self.replicas[0].batch_at(self.step)
        self._inject("before_forward", scenario, age)
        loss = self._train_step(scenario, age)
        seen = self._observe(loss)
        self._update(loss)
        for handle in self._altering:
            handle.remove()
        self._altering.clear()
        self.step += 1
        return seen

    def _inject(self, when: str, scenario: Scenario | None, age: int) -> None:
        if scenario is not None and scenario.when == when:
            scenario.inject(self, age)

    def _train_step(self, scenario: Scenario | None, age: int) -> float:
        """Forward and backward on every rank; the gradients are those that the optimizer gets."""
        x, y = self.batch
        share = len(x) // len(self.replicas)
        losses = []
        for rank, replica in enumerate(self.replicas):
            rows = slice(rank * share, (rank + 1) * share)
            replica.optimizer.zero_grad()
            loss = replica.loss_of(replica.model(x[rows]), y[rows])
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
            losses.append(loss.detach())
        if len(self.replicas) > 1:
            _average_gradients([r.model for r in self.replicas])
        self._inject("after_backward", scenario, age)
        if self.scaler is not None:
            _round_gradients_to_half(self.model)
            self.scaler.unscale_(self.optimizer)
        return float(torch.stack(losses).mean())

    def _update(self, loss: float) -> None:
        for replica, (watch, _) in zip(self.replicas[1:], self._guards[1:], strict=True):
            watch.clip(MAX_NORM, 2.0, False)  # to the last bit as on the first rank
            watch.judge(loss)
            replica.optimizer.step()
            replica.scheduler.step()
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.replicas[0].scheduler.step()

    # ---- what is seen

    def _observe(self, loss: float) -> Observation:
        module = self._modules.first_nonfinite()
        watch, _ = self._guards[0]
        norm = float(watch.clip(MAX_NORM, 2.0, False))
        verdict = watch.judge(loss)
        return Observation(
            step=self.step,
            loss=loss,
            grad_norm=norm,
            reasons=verdict.reasons,
            offender=None if verdict.offender is None else verdict.offender.name,
            module=module,
            max_attention_logit=self._attention.largest(),
            do_ranks_agree=self._do_ranks_agree(),
            **self._spectra.observe(self.step),
            **self._second_moments(norm),
        )

    def _second_moments(self, norm: float) -> dict[str, Any]:
        parameters = list(self.model.parameters())
        divisor = torch.tensor(max(norm / MAX_NORM, 1.0))
        of = (self.optimizer, parameters)
        clipped = second_moment_rms(*of, is_stepped=False, grad_scale=divisor)
        if not clipped.index:
            return {}
        found = {"rms": float(clipped.total), "rms_worst": float(clipped.rms.max())}
        if self.step % _MONITOR_INTERVAL == 0:
            raw = second_moment_rms(*of, is_stepped=False)
            found["rms_monitored"] = float(raw.total)
        return found

    def _do_ranks_agree(self) -> bool:
        if len(self.replicas) == 1:
            return True
        sums = {checksum(dict(r.model.named_parameters())) for r in self.replicas}
        return len(sums) == 1

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
        return copy.deepcopy(
            {
                "step": self.step,
                "replicas": owners,
                "scaler": None if self.scaler is None else self.scaler.state_dict(),
                "spectra": self._spectra.state_dict(),
            }
        )

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on from there, bit for bit, with a guard that has seen nothing yet."""
        state = copy.deepcopy(state)
        for _, gate in self._guards:
            gate.remove()
        self._guards = [self._guard(training) for training in self.replicas]
        self.step = state["step"]
        for replica, saved in zip(self.replicas, state["replicas"], strict=True):
            replica.model.load_state_dict(saved["model"])
            replica.optimizer.load_state_dict(saved["optimizer"])
            replica.scheduler.load_state_dict(saved["scheduler"])
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        self._spectra.load_state_dict(state["spectra"])


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


class _ModuleOutputs:
    """Scans the input and the outputs of the modules that have no modules in them."""

    def __init__(self, model: nn.Module) -> None:
        self._seen: list[tuple[str, Tensor]] = []
        model.register_forward_pre_hook(self._note_input)
        for name, module in model.named_modules():
            if name and not any(module.children()):
                module.register_forward_hook(self._noting(name))

    def _note_input(self, module: nn.Module, given: tuple[Tensor, ...]) -> None:
        self._seen.clear()
        self._note("input", given[0])

    def _noting(self, name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda module, given, output: self._note(name, output)

    def _note(self, name: str, tensor: Tensor) -> None:
        if tensor.is_floating_point():
            self._seen.append((name, tensor.detach()))

    def first_nonfinite(self) -> str | None:
        """Its name, in the order of the forward pass."""
        first = int(health_scan([tensor for _, tensor in self._seen]).first_nonfinite)
        return None if first < 0 else self._seen[first][0]


class _AttentionLogits:
    """The largest q k / sqrt(D) of any head and any token with one not after it."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        self._found: list[float] = []
        self._names = names
        for name in names:
            model.get_submodule(name).register_forward_pre_hook(self._look)

    @torch.no_grad()
    def _look(self, attention: Any, given: tuple[Tensor, ...]) -> None:
        qkv_BT3HD = attention.qkv(given[0]).unflatten(-1, (3, attention.num_heads, -1))
        q_BHTD, k_BHTD, _ = (part.transpose(1, 2) for part in qkv_BT3HD.unbind(2))
        logits_BHTT = (q_BHTD @ k_BHTD.mT) / math.sqrt(q_BHTD.shape[-1])
        self._found.append(float(logits_BHTT.tril().max()))

    def largest(self) -> float | None:
        """Since it was asked for last; NaN if one is."""
        found, self._found = self._found, []
        if not self._names:
            return None
        return math.nan if any(map(math.isnan, found)) else max(found)


@dataclasses.dataclass
class _Restarts:
    """kappa-tilde by power iteration from a new random vector each time."""

    weight: Tensor
    random: torch.Generator

    @torch.no_grad()
    def kappa(self) -> float:
        matrix = self.weight.detach()
        v = torch.randn(matrix.shape[1], generator=self.random)
        v /= v.norm()
        for _ in range(_RESTARTED_PASSES):
            u = matrix @ v
            u /= u.norm() + 1e-8
            v = matrix.T @ u
            v /= v.norm() + 1e-8
        smallest = matrix.norm() / (10 * math.sqrt(min(matrix.shape)))
        return float((matrix @ v).norm() / (smallest + 1e-8))


class _Spectra:
    """The spectra of all matrices at every step, and what the tracker makes of them."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        matrices = {name: p for name, p in model.named_parameters() if p.dim() == 2}
        self._iterator = PowerIterator(list(matrices.values()))
        self._tracker = SpectralTracker(list(matrices))
        self._decays = np.array(weight_decays(optimizer, matrices.values()))
        first = next(iter(matrices.values()))
        self._restarts = _Restarts(first, torch.Generator().manual_seed(seed))

    def observe(self, step: int) -> dict[str, Any]:
        packed = self._iterator().packed.numpy()
        sigma, kappa, rank = packed[:, 0], packed[:, _KAPPA], packed[:, _RANK]
        reading = self._tracker.update(step, kappa, sigma, rank)
        return {
            "kappa": tuple(kappa.tolist()),
            "sigma_max": tuple(sigma.tolist()),
            "stable_rank": tuple(rank.tolist()),
            "level": reading.level,
            "sigma_growth": reading.sigma_growth,
            "stable_rank_fall": reading.stable_rank_fall,
            "muon_ratio": float((sigma * self._decays).max()),
            "restarted_kappa": self._restarts.kappa(),
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "iterator": self._iterator.state.state_dict(),
            "tracker": self._tracker.state_dict(),
            "restarts": self._restarts.random.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._iterator.state.load_state_dict(state["iterator"])
        self._tracker.load_state_dict(state["tracker"])
        self._restarts.random.set_state(state["restarts"])
