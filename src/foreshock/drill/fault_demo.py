"""One fault of the drill, put into a training that is watched by a monitor, and its story."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from foreshock.drill.demo import FILES
from foreshock.drill.scenarios import SCENARIOS, Scenario
from foreshock.drill.subjects import MAX_NORM, SUBJECTS, Batch
from foreshock.drill.trainee import Trainee
from foreshock.guard import Action, Guard
from foreshock.guard.snapshots import checksum
from foreshock.monitor import Monitor, Verdict
from foreshock.records import read_telemetry

_LAST = 20
_TOLD = (
    "anomaly_seen",
    "update_skipped",
    "rollback_success",
    "recovered",
    "aborted",
    "risk_level_changed",
)


@dataclasses.dataclass(frozen=True)
class FaultDemoOptions:
    """Which fault is to be shown, and when it strikes.

    Raises:
        ValueError: naming the field, what was given and what is accepted.
    """

    fault: str
    steps: int = 200
    fault_step: int = 50
    out_dir: Path = Path("runs/fault")
    is_guarded: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.fault not in SCENARIOS:
            raise ValueError(f"fault is {self.fault!r}; accepted: {', '.join(SCENARIOS)}")
        if not 0 < self.fault_step < self.steps:
            raise ValueError(
                f"fault_step is {self.fault_step}; accepted: from 1 to steps - 1, which is "
                f"{self.steps - 1}"
            )

    @property
    def scenario(self) -> Scenario:
        return SCENARIOS[self.fault]

    @property
    def start(self) -> int:
        """Step of the fault: that given, unless it is one of the start."""
        return 0 if self.scenario.is_from_start else self.fault_step


@dataclasses.dataclass(frozen=True)
class FaultDemoResult:
    """What happened."""

    losses: dict[int, float]
    """Loss of each step, as it was when the step was last run."""
    twin_losses: list[float]
    """Those of the healthy twin."""
    anomalies: list[Verdict]
    """Verdicts on the steps that were not clean."""
    events: list[dict[str, Any]]
    """What the monitor has recorded of them."""
    summary: dict[str, Any]
    ranks_disagree_from: int | None
    """First step after which the simulated ranks' weights differ."""
    broken_promises: list[str] = dataclasses.field(default_factory=list)
    """What should have happened and did not."""

    @property
    def final_loss(self) -> float:
        """Mean of the last 20."""
        return _mean_of_last([self.losses[step] for step in sorted(self.losses)])

    @property
    def final_twin_loss(self) -> float:
        """The same of the healthy twin."""
        return _mean_of_last(self.twin_losses)


class _Batches:
    """The trainee's batches, as a loader that can be sent back."""

    def __init__(self, trainee: Trainee) -> None:
        self._trainee = trainee
        self._position = 0

    def __iter__(self) -> Iterator[Batch]:
        while True:
            batch = self._trainee.batch_at(self._position)
            self._position += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"position": self._position}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        self._position = state_dict["position"]


def run_fault_demo(
    options: FaultDemoOptions, show: Callable[[int, float, Verdict], None]
) -> FaultDemoResult:
    """Trains with the fault and without it, calling `show(step, loss, verdict)` after every step.

    The fault is transient: what is run again after a rollback is run without it.
    """
    scenario = options.scenario
    trainee = Trainee(SUBJECTS["gpt"], options.seed, scenario.variant)
    trainee.reseed(scenario.name, options.seed)
    monitors = _monitors(trainee, options)
    losses: dict[int, float] = {}
    anomalies: list[Verdict] = []
    disagree_from: int | None = None
    injected = 0
    for step, batch in monitors[0].loop(_Batches(trainee)):
        if step == options.steps:
            break
        is_struck = step >= options.start and injected < scenario.duration
        loss = trainee.take_gradients(batch, scenario if is_struck else None, injected)
        injected += is_struck
        verdict = _judge_and_update(trainee, monitors, loss)
        losses[step] = float(loss)
        if disagree_from is None and not _do_ranks_agree(trainee):
            disagree_from = step
        if verdict.action is not Action.CONTINUE:
            anomalies.append(verdict)
        show(step, losses[step], verdict)
        if not verdict:
            break
    summary, *_ = [monitor.finalize() for monitor in monitors]
    telemetry = read_telemetry(options.out_dir / "telemetry.jsonl")
    events = [r for r in telemetry.records if str(r["event"]).removeprefix("would_") in _TOLD]
    result = FaultDemoResult(
        losses, _healthy_losses(options), anomalies, events, summary, disagree_from
    )
    return dataclasses.replace(result, broken_promises=_broken_promises(options, result))


def _monitors(trainee: Trainee, options: FaultDemoOptions) -> list[Monitor]:
    """One for each rank."""
    mode: Any = "recover" if options.is_guarded else "observe"
    monitors = []
    for rank, replica in enumerate(trainee.replicas):
        state: dict[str, Any] = {"scheduler": replica.scheduler}
        if trainee.scaler is not None:
            state["scaler"] = trainee.scaler
        monitors.append(
            Monitor(
                replica.model,
                replica.optimizer,
                options.out_dir / f"rank-{rank}" if rank else options.out_dir,
                Guard(mode=mode, snapshot_interval=10),
                state=state,
                spectral_interval=10,
            )
        )
    return monitors


def _judge_and_update(trainee: Trainee, monitors: list[Monitor], loss: torch.Tensor) -> Verdict:
    verdicts = []
    for monitor in monitors:
        monitor.clip_grad_norm_(MAX_NORM)
        verdicts.append(monitor.step(loss))
    for replica in trainee.replicas[1:]:
        replica.optimizer.step()
        replica.scheduler.step()
    trainee.update()
    return verdicts[0]


def _do_ranks_agree(trainee: Trainee) -> bool:
    models = [r.model for r in trainee.replicas]
    return len({checksum(dict(m.named_parameters())) for m in models}) == 1


def _healthy_losses(options: FaultDemoOptions) -> list[float]:
    twin = Trainee(SUBJECTS["gpt"], options.seed)
    losses = []
    for step in range(options.steps):
        losses.append(float(twin.take_gradients(twin.batch_at(step), None, 0)))
        torch.nn.utils.clip_grad_norm_(twin.model.parameters(), MAX_NORM)
        twin.update()
    return losses


def _mean_of_last(losses: list[float]) -> float:
    last = losses[-_LAST:]
    return sum(last) / len(last)


def _broken_promises(options: FaultDemoOptions, result: FaultDemoResult) -> list[str]:
    scenario, subject = options.scenario, SUBJECTS["gpt"]
    first = result.anomalies[0] if result.anomalies else None
    checks = {
        "every step was run": len(result.losses) == options.steps,
        "the files are written": all((options.out_dir / name).is_file() for name in FILES),
    }
    if scenario.struck is not None:
        checks["the fault is found within a step"] = (
            first is not None and 0 <= first.step - options.start <= 1
        )
    if scenario.struck in ("parameter", "gradient"):
        checks["the struck tensor is named"] = (
            first is not None
            and first.offender is not None
            and first.offender.name == subject.struck_parameter
        )
    if scenario.struck is not None and options.is_guarded:
        checks["the run ends with a finite loss"] = math.isfinite(result.final_loss)
    if scenario.is_harmless:
        checks["nothing is reported"] = first is None
    if scenario.variant == "replicated":
        checks["the ranks' weights differ"] = result.ranks_disagree_from == options.start
    return [promise for promise, is_kept in checks.items() if not is_kept]
