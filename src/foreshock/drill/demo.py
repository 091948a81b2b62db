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
from foreshock.signals import RiskThresholds, SpectralSettings

STRUCK_PARAMETER = "blocks.2.mlp.up.weight"
_STRUCK_PLACE = (7, 3)
SPIKE_FACTOR = 30.0
_SPIKE_STEPS = 5
_SPECTRAL_WARMUP = 120
# A small model that has just begun is more restless than the thresholds allow for.
_SPECTRAL = SpectralSettings(thresholds=RiskThresholds(instability=0.01))
_PROMPT = "The "


@dataclasses.dataclass(frozen=True)
class DemoOptions:
    """What is to be shown."""

    steps: int = 200
    out_dir: Path = Path("runs/demo")
    is_guarded: bool = True
    strike_step: int | None = 50
    """Step before which one weight becomes NaN; None: none does."""
    spike_step: int | None = None
    """Step from which the learning rate is 30 times too high, for 5 steps; None: it never is."""
    seed: int = 0
    recipe: Recipe = dataclasses.field(default_factory=Recipe)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}; accepted: at least 1")
        for name, first in (("strike_step", 0), ("spike_step", _SPECTRAL_WARMUP)):
            step, last = getattr(self, name), self.steps - 1
            if step is not None and not first <= step <= last:
                raise ValueError(f"{name} is {step}; accepted: {first} to {last}, or None")


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
    risks: list[dict[str, Any]]
    """Changes of the spectral risk, likewise."""
    autopsies: list[dict[str, Any]]
    """What came of the steps that had failed, likewise."""
    sample: str | None
    """A line of text from the trained model; None if it no longer predicts anything."""
    broken_promises: list[str] = dataclasses.field(default_factory=list)
    """What should have happened and did not."""


def run_demo(options: DemoOptions, show: Callable[[int, float, Verdict], None]) -> DemoResult:
    """Trains as the options say, calling `show(step, loss, verdict)` after every step."""
    run = build(options.seed, options.recipe)
    guard = Guard(mode="recover" if options.is_guarded else "observe", snapshot_interval=10)
    monitor = Monitor(
        run.model,
        run.optimizer,
        options.out_dir,
        guard,
        state={"scheduler": run.scheduler},
        spectral_interval=1,
        spectral_warmup=_SPECTRAL_WARMUP,
        spectral_response="log" if options.spike_step is None else "act",
        spectral=_SPECTRAL,
    )
    losses: dict[int, float] = {}
    anomalies: list[Verdict] = []
    has_struck = False
    spikes_left = 0 if options.spike_step is None else _SPIKE_STEPS

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
        if spikes_left and step >= (options.spike_step or 0):
            spikes_left -= 1
            multiply_learning_rate(run.optimizer, SPIKE_FACTOR)
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
    risks = [r for r in telemetry.records if r["event"] == "risk_level_changed"]
    autopsies = [r for r in telemetry.records if r["event"] == "autopsy"]
    sample = sample_line(run.model) if math.isfinite(losses[max(losses)]) else None
    result = DemoResult(losses, anomalies, summary, rollbacks, risks, autopsies, sample)
    return dataclasses.replace(result, broken_promises=_broken_promises(options, result))


def strike(model: GPT) -> None:
    """Makes one weight NaN, as a flipped bit or a faulty kernel would."""
    with torch.no_grad():
        model.get_parameter(STRUCK_PARAMETER)[_STRUCK_PLACE] = math.nan


def multiply_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """For one update: the scheduler of the recipe sets the rate anew after each."""
    for group in optimizer.param_groups:
        group["lr"] *= factor


def sample_line(model: GPT, length: int = 72) -> str:
    """One line of text from the model; leaves the global generators alone."""
    vocabulary = Vocabulary()
    generator = torch.Generator().manual_seed(0)
    tokens = generate(model, vocabulary.encode(_PROMPT), length, generator=generator)
    return " ".join(vocabulary.decode(tokens).split())


def _broken_promises(options: DemoOptions, result: DemoResult) -> list[str]:
    is_struck, is_spiked = options.strike_step is not None, options.spike_step is not None
    losses, anomalies, guard = result.losses, result.anomalies, result.summary["guard"]
    survives = options.is_guarded or not is_struck
    first = anomalies[0] if anomalies else None
    expected = int(is_struck) + int(is_spiked and options.is_guarded)
    checks = {
        "every step was run": len(losses) == options.steps,
        "the run ends with a finite loss": math.isfinite(losses[max(losses)]) == survives,
        "only what was planted is reported": bool(anomalies) == bool(expected),
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
    if is_spiked and survives:
        raised = [r["step"] for r in result.risks if r["level"] in ("DANGER", "INSTABILITY")]
        checks["the risk level shows the spike"] = bool(raised) and raised[-1] >= max(
            options.spike_step or 0, _SPECTRAL_WARMUP
        )
    if is_struck and options.is_guarded:
        checks["the autopsy finds that the strike was transient"] = [
            (r["step"], r["cause"]) for r in result.autopsies if r["cause"] != "not_replayed"
        ] == [(options.strike_step, "transient")]
    if options.is_guarded and expected:
        checks["a rollback and a recovery for each"] = (
            guard["total_rollbacks"] == guard["total_recoveries"] == len(anomalies) == expected
        )
    return [promise for promise, is_kept in checks.items() if not is_kept]


FILES = {
    "telemetry.jsonl": "loss, gradient norm and events, step by step",
    "ledger.jsonl": "what the guard did, each record chained to the one before",
    "summary.json": "the run in numbers",
    "fingerprint.json": "the noise of the run, for later runs to be compared with",
    "config.json": "settings, versions, backends in use",
}
"""Files of the run directory, and what is in each."""
