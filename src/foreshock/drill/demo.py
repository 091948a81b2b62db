"""The demonstration: a small GPT learns from real text, a NaN strikes, the run survives or dies."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from foreshock.drill.gpt import GPT, Recipe, build, generate, next_token_loss
from foreshock.drill.text import Vocabulary
from foreshock.guard import Action, Guard
from foreshock.monitor import Monitor, Verdict
from foreshock.records import read_telemetry

STRUCK_PARAMETER = "blocks.2.mlp.up.weight"
_STRUCK_PLACE = (7, 3)
_PROMPT = "The "


@dataclasses.dataclass(frozen=True)
class DemoOptions:
    """What is to be shown."""

    steps: int = 200
    out_dir: Path = Path("runs/demo")
    is_guarded: bool = True
    strike_step: int | None = 50
    """Step before which one weight becomes NaN; None: nothing strikes."""
    seed: int = 0
    recipe: Recipe = dataclasses.field(default_factory=Recipe)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}; accepted: at least 1")
        if self.strike_step is not None and not 0 <= self.strike_step < self.steps:
            raise ValueError(
                f"strike_step is {self.strike_step}; accepted: 0 to {self.steps - 1}, or None"
            )


@dataclasses.dataclass(frozen=True)
class DemoResult:
    """What happened."""

    losses: dict[int, float]
    """Loss of each step, as it was when the step was last run."""
    anomalies: list[Verdict]
    """Verdicts on the steps that were not clean."""
    summary: dict[str, Any]
    rollbacks: list[dict[str, Any]]
    """Rollback events, as the telemetry file has them."""
    sample: str | None
    """A line of text from the trained model; None if it no longer predicts anything."""
    broken_promises: list[str]
    """What should have happened and did not."""


def run_demo(options: DemoOptions, show: Callable[[int, float, Verdict], None]) -> DemoResult:
    """Trains as the options say, calling `show(step, loss, verdict)` after every step."""
    run = build(options.seed, options.recipe)
    guard = Guard(mode="recover" if options.is_guarded else "observe", snapshot_interval=10)
    monitor = Monitor(
        run.model, run.optimizer, options.out_dir, guard, state={"scheduler": run.scheduler}
    )
    losses: dict[int, float] = {}
    anomalies: list[Verdict] = []
    has_struck = False

    for step, (x_BT, y_BT) in monitor.loop(run.batches):
        if step == options.steps:
            break
        if step == options.strike_step and not has_struck:
            strike(run.model)
            has_struck = True
        run.optimizer.zero_grad()
        loss = next_token_loss(run.model(x_BT), y_BT)
        loss.backward()
        monitor.clip_grad_norm_(options.recipe.max_norm)
        verdict = monitor.step(loss)
        run.optimizer.step()
        run.scheduler.step()

        losses[step] = loss.item()
        if verdict.action is not Action.CONTINUE:
            anomalies.append(verdict)
        show(step, losses[step], verdict)
        if not verdict:
            break

    summary = monitor.finalize()
    telemetry = read_telemetry(options.out_dir / "telemetry.jsonl")
    rollbacks = [r for r in telemetry.records if r["event"] == "rollback_success"]
    sample = sample_line(run.model) if math.isfinite(losses[max(losses)]) else None
    broken = list(_broken_promises(options, losses, anomalies, summary))
    return DemoResult(losses, anomalies, summary, rollbacks, sample, broken)


def strike(model: GPT) -> None:
    """Makes one weight NaN, as a flipped bit or a faulty kernel would."""
    with torch.no_grad():
        model.get_parameter(STRUCK_PARAMETER)[_STRUCK_PLACE] = math.nan


def sample_line(model: GPT, length: int = 72) -> str:
    """One line of text from the model; leaves the global generators alone."""
    vocabulary = Vocabulary()
    generator = torch.Generator().manual_seed(0)
    tokens = generate(model, vocabulary.encode(_PROMPT), length, generator=generator)
    return " ".join(vocabulary.decode(tokens).split())


def _broken_promises(
    options: DemoOptions,
    losses: dict[int, float],
    anomalies: list[Verdict],
    summary: dict[str, Any],
) -> list[str]:
    is_struck = options.strike_step is not None
    survives = options.is_guarded or not is_struck
    first = anomalies[0] if anomalies else None
    checks = {
        "every step was run": len(losses) == options.steps,
        "the run ends with a finite loss": math.isfinite(losses[max(losses)]) == survives,
        "only what was planted is reported": (first is not None) == is_struck,
        "the files are written": all((options.out_dir / name).is_file() for name in FILES),
    }
    if not survives:
        checks["the run dies without the guard"] = checks.pop("the run ends with a finite loss")
    if is_struck:
        offender = first.offender if first else None
        checks["the struck tensor is named"] = offender is not None and (
            (first.step if first else None, offender.name, offender.nan)
            == (options.strike_step, STRUCK_PARAMETER, 1)
        )
    if is_struck and options.is_guarded:
        guard = summary["guard"]
        checks["one rollback, one recovery"] = (
            guard["total_rollbacks"] == guard["total_recoveries"] == len(anomalies) == 1
        )
    return [promise for promise, is_kept in checks.items() if not is_kept]


FILES = {
    "telemetry.jsonl": "loss, gradient norm and events, step by step",
    "ledger.jsonl": "what the guard did, each record chained to the one before",
    "summary.json": "the run in numbers",
    "config.json": "settings, versions, backends in use",
}
"""Files of the run directory, and what is in each."""
