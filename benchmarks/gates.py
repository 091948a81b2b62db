"""What gates cost: a look at all of them, their rotations, and a look in every step of a training.

Thirty gates of width 3072, 11 520 blocks of 8 by 8, gate by gate and in one computation; and the
GPT of examples/rotation_gates.py, trained with a look in every step and without.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import rows
from benchmarks.interleave import Timing, time_in_turn
from foreshock import gates
from foreshock.drill.gpt import GPT, GPTConfig, next_token_loss
from foreshock.drill.text import TextBatches, Vocabulary, load_corpus
from foreshock.gate_watch import GateWatch
from foreshock.records import SeriesRecorder

GATES, WIDTH = 30, 3072
ROUNDS = 21
STEPS = 61
CASE = f"{GATES} gates of {WIDTH}"


def many_gates() -> list[gates.SO8RotationGate]:
    torch.manual_seed(0)
    made = [gates.SO8RotationGate(WIDTH, theta_std=0.1) for _ in range(GATES)]
    gates.share(made)
    return made


def look_gate_by_gate(made: list[gates.SO8RotationGate]) -> list[list[float]]:
    """As it is written where nobody counts: an exponential, and four numbers, of each gate."""
    found = []
    for gate in made:
        with torch.no_grad():
            rotation = gates.rotation_of(gate.theta).double()
            errors = torch.linalg.matrix_norm(rotation.mT @ rotation - torch.eye(8).double())
            dets = torch.linalg.det(rotation)
            det = dets[(dets - 1).abs().argmax()]
            mix = torch.sigmoid(gate.alpha.double())
        found.append([errors.max().item(), errors.mean().item(), det.item(), mix.item()])
    return found


def look_at_all(made: list[gates.SO8RotationGate]) -> list[list[float]]:
    return gates.measure(made).tolist()  # type: ignore[no-any-return]


def afresh(made: list[gates.SO8RotationGate]) -> list[list[float]]:
    made[0].shared.renew()
    return look_at_all(made)


def test_look(benchmark: Any) -> None:
    made = many_gates()
    expected, found = torch.tensor(look_gate_by_gate(made)), torch.tensor(look_at_all(made))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)
    variants: dict[str, Callable[[], object]] = {
        "foreshock, with the rotations of the forward": lambda: look_at_all(made),
        "foreshock, nothing computed yet": lambda: afresh(made),
        "gate by gate": lambda: look_gate_by_gate(made),
    }
    store(f"look at {CASE}", time_in_turn(benchmark, variants, ROUNDS))


def forward_and_backward(
    made: list[gates.SO8RotationGate], rotation: Callable[[gates.SO8RotationGate], Tensor]
) -> tuple[Tensor, ...]:
    total = torch.stack([rotation(gate).sum() for gate in made]).sum()
    return torch.autograd.grad(total, [gate.theta for gate in made])


def test_rotations(benchmark: Any) -> None:
    made = many_gates()

    def together() -> tuple[Tensor, ...]:
        made[0].shared.renew()
        return forward_and_backward(made, lambda gate: gate.rotation())

    def gate_by_gate() -> tuple[Tensor, ...]:
        return forward_and_backward(made, lambda gate: gates.rotation_of(gate.theta))

    torch.testing.assert_close(together(), gate_by_gate(), rtol=0, atol=1e-6)
    variants = {"foreshock, all at once": together, "gate by gate": gate_by_gate}
    store(f"rotations of {CASE} and their gradients", time_in_turn(benchmark, variants, 7))


class Training:
    """The example's, a step at a time; with a watch that looks in every step, or none."""

    def __init__(self, model: GPT, out_dir: Path | None) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, fused=True)
        self.schedule = gates.AlphaSchedule(model, 2 * STEPS // 3)
        self.batches = TextBatches(Vocabulary().encode(load_corpus()), 16, model.config.context)
        self.steps = 0
        self.series = None if out_dir is None else SeriesRecorder(out_dir)
        self.watch: GateWatch | None = None
        if self.series is not None:
            monitor = gates.GateMonitor(model, self.schedule)
            self.watch = GateWatch(monitor, 1, self.tell, self.series.record)

    def tell(self, risk: object) -> None:
        raise AssertionError(risk)

    def step(self) -> float:
        x, y = self.batches.batch_at(self.steps)
        self.optimizer.zero_grad()
        loss = next_token_loss(self.model(x), y)
        loss.backward()
        if self.watch is not None:
            self.watch.note_step(self.steps)
        self.optimizer.step()
        self.schedule.step()
        self.steps += 1
        return loss.item()


def test_a_look_in_every_step(benchmark: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPTConfig(num_blocks=6)
    model = GPT(config)
    gates.attach(model)
    alone, watched = Training(copy.deepcopy(model), None), Training(model, tmp_path)
    assert [alone.step() for _ in range(3)] == [watched.step() for _ in range(3)]
    variants = {"without looking": alone.step, "a look in every step": watched.step}
    timings = time_in_turn(benchmark, variants, STEPS)
    assert watched.series is not None
    assert watched.series.dropped_rows == 0
    base = timings["without looking"]
    found = {n: {**t.row(), "percent": 100 * (t.over(base) - 1)} for n, t in timings.items()}
    watched.series.close()
    rows.store("gates_in_training", "GPT of examples/rotation_gates.py", "cpu", found)


def store(case: str, timings: dict[str, Timing]) -> None:
    ours = next(timing for name, timing in timings.items() if name.startswith("foreshock"))
    found = {n: {**t.row(), "times_ours": t.over(ours)} for n, t in timings.items()}
    rows.store("gates", case, "cpu", found)
