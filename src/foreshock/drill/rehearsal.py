"""A training that is looked at in every step, and into which faults can be put.

Shapes: B rows of a batch, T tokens of a row, C channels, H attention heads, M matrices.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from foreshock.drill.observation import Observation
from foreshock.drill.scenarios import Scenario, Variant
from foreshock.drill.subjects import MAX_NORM, Subject, Training
from foreshock.drill.trainee import Trainee
from foreshock.guard import Guard, StepGate, Watch
from foreshock.guard.snapshots import checksum
from foreshock.ops import PowerIterator, health_scan
from foreshock.signals import SpectralTracker, second_moment_rms, weight_decays

_RESTARTED_PASSES = 10
_KAPPA, _RANK = 2, 3  # columns of SpectralStats.packed


class Rehearsal:
    """A trainee, the guard in observe mode, and everything that a rule may want to know.

    What is observed is the first rank's, but for the comparison of the ranks.

    Args:
        subject: what is trained.
        seed: of the training.
        variant: see `Variant`.
    """

    def __init__(self, subject: Subject, seed: int, variant: Variant = "plain") -> None:
        self.trainee = Trainee(subject, seed, variant)
        self.model, self.optimizer = self.trainee.model, self.trainee.optimizer
        self.step = 0
        self._guards = self._guard_all()
        self._modules = _ModuleOutputs(self.model)
        self._attention = _AttentionLogits(self.model, subject.attention_modules)
        self._spectra = _Spectra(self.model, self.optimizer, seed)

    def _guard_all(self) -> list[tuple[Watch, StepGate]]:
        """A guard for each rank."""
        return [self._guard(training) for training in self.trainee.replicas]

    def _guard(self, training: Training) -> tuple[Watch, StepGate]:
        scaler = self.trainee.scaler
        state: dict[str, Any] = {} if scaler is None else {"scaler": scaler}
        observing = Guard(mode="observe")
        watch = Watch(training.model, training.optimizer, state, observing, lambda event: None)

        def admits(has_closure: bool) -> bool:
            watch.observe_update()
            return True

        gate = StepGate(
            training.optimizer, watch.learning_rate, watch.scaled, admits, watch.note_call
        )
        return watch, gate

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

    def _run_step(self, scenario: Scenario | None, age: int) -> Observation:
        batch = self.trainee.batch_at(self.step)
        loss = float(self.trainee.take_gradients(batch, scenario, age))
        seen = self._observe(loss)
        others = zip(self.trainee.replicas[1:], self._guards[1:], strict=True)
        for replica, (watch, _) in others:
            watch.clip(MAX_NORM, 2.0, False)  # to the last bit as on the first rank
            watch.judge(loss)
            replica.optimizer.step()
            replica.scheduler.step()
        self.trainee.update()
        self.step += 1
        return seen

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
        clipped = second_moment_rms(
            self.optimizer, parameters, is_stepped=False, grad_scale=divisor
        )
        if not clipped.index:
            return {}
        return {"rms": float(clipped.total), "rms_worst": float(clipped.rms.max())}

    def _do_ranks_agree(self) -> bool:
        if len(self.trainee.replicas) == 1:
            return True
        sums = {checksum(dict(r.model.named_parameters())) for r in self.trainee.replicas}
        return len(sums) == 1

    # ---- there and back

    def state(self) -> dict[str, Any]:
        """A copy of everything that later steps and observations depend on."""
        spectra = copy.deepcopy(self._spectra.state_dict())
        return {"step": self.step, "trainee": self.trainee.state(), "spectra": spectra}

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on from there, bit for bit, with guards that have seen nothing yet."""
        for _, gate in self._guards:
            gate.remove()
        self._guards = self._guard_all()
        self.step = state["step"]
        self.trainee.load_state(state["trainee"])
        self._spectra.load_state_dict(copy.deepcopy(state["spectra"]))


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
