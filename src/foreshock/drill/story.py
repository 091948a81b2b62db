"""What a demonstration or a drill has shown, for people to read on a console."""

from __future__ import annotations

import math
from typing import Any

from rich.console import Console
from rich.table import Table

from foreshock.drill.campaign import DrillResults
from foreshock.drill.demo import FILES, DemoOptions, DemoResult
from foreshock.drill.fault_demo import FaultDemoOptions, FaultDemoResult
from foreshock.drill.results import RULE_HEADER, rule_table
from foreshock.drill.scenarios import SCENARIOS

_MOST_EVENTS = 12


def tell_drill(console: Console, results: DrillResults) -> None:
    """The table of rules."""
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    for title in RULE_HEADER:
        table.add_column(title, justify="left" if title == "rule" else "right")
    for line in rule_table(results):
        table.add_row(*line)
    console.print(table)


def tell_scenarios(console: Console) -> None:
    """The faults that there are, and on which trainings they are tried."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for title in ("fault", "group", "on", "what happens"):
        table.add_column(title)
    for scenario in SCENARIOS.values():
        on = ", ".join(scenario.subjects)
        table.add_row(scenario.name, scenario.group, on, scenario.what)
    console.print(table)


def _story_table() -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    return table


def tell_demo(console: Console, options: DemoOptions, result: DemoResult, seconds: float) -> None:
    """The story of the run, and where it is written."""
    guard, overhead = result.summary["guard"], result.summary["overhead"]
    last = max(result.losses)
    table = _story_table()
    for seen in result.anomalies if options.is_guarded else result.anomalies[:1]:
        reasons = ", ".join(reason.value for reason in seen.reasons)
        table.add_row("what struck", f"{reasons} at step {seen.step}")
        if seen.offender is not None:
            table.add_row("where", str(seen.offender))
        for event in result.rollbacks:
            if event["step"] == seen.step:
                did = (
                    f"update withheld, state of step {event['to_step']} restored, "
                    f"learning rate x {event['lr_factor']:g}, returning to x 1"
                )
                table.add_row("what was done", did)
        for found in result.autopsies:
            if found["step"] == seen.step:
                table.add_row("autopsy", f"step {seen.step}: {found['sentence']}")
                if found["file"] is not None:
                    table.add_row("file", f"{options.out_dir / found['file']}  (the same in full)")
        if not options.is_guarded:
            table.add_row("what was done", f"nothing; with the guard: {seen.action.value}")
    if options.is_guarded:
        table.add_row("rollbacks", f"{guard['total_rollbacks']}")
        table.add_row("recoveries", f"{guard['total_recoveries']}")
        table.add_row("integrity", guard["integrity_status"])
    else:
        table.add_row("bad steps seen", f"{guard['anomalies_seen']}")
    spectral = result.summary["spectral"]
    table.add_row("kappa-tilde", f"{_number(spectral['final_kappa'])} ({spectral['worst_layer']})")
    table.add_row("spectral risk", _risk_story(result.risks, spectral["final_risk_level"]))
    table.add_row("overhead", f"{overhead['mean_ms']:.2f} ms a step, {overhead['percent']:.2f} %")
    table.add_row("loss", f"{result.losses[min(result.losses)]:.3f} -> {result.losses[last]:.3f}")
    table.add_row("steps", f"{len(result.losses)} in {seconds:.1f} s")
    if result.sample is not None:
        table.add_row("the model says", result.sample)
    elif math.isnan(result.losses[last]):
        table.add_row("the model says", "nothing: every prediction is NaN")
    for name, content in FILES.items():
        table.add_row("file", f"{options.out_dir / name}  ({content})")
    console.print()
    console.print(table)
    for promise in result.broken_promises:
        console.print(f"[red]did not happen:[/] {promise}")


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.1f}"


def _risk_story(risks: list[dict[str, Any]], final: str) -> str:
    """The levels in the order they were reached."""
    levels = ["STABLE", *(f"{r['level']} (step {r['step']})" for r in risks)]
    return f"{final}; {' > '.join(levels)}" if risks else final


def tell_fault(console: Console, options: FaultDemoOptions, result: FaultDemoResult) -> None:
    """What was done to the training, what was seen, and what came of it."""
    scenario = options.scenario
    lasts = f", for {scenario.duration} steps" if scenario.duration > 1 else ""
    table = _story_table()
    table.add_row("fault", f"{scenario.what}; at step {options.start}{lasts}")
    if result.anomalies:
        first = result.anomalies[0]
        reasons = ", ".join(reason.value for reason in first.reasons)
        table.add_row("first seen", f"step {first.step}: {reasons}")
        if first.offender is not None:
            table.add_row("where", str(first.offender))
    elif scenario.is_harmless:
        table.add_row("first seen", "nothing, as it should be: the scaler deals with it")
    else:
        table.add_row("first seen", "nothing that the guard acts on")
    for event in result.events[:_MOST_EVENTS]:
        table.add_row("event", f"step {event['step']}: {_event_story(event)}")
    if len(result.events) > _MOST_EVENTS:
        table.add_row("event", f"and {len(result.events) - _MOST_EVENTS} more in telemetry.jsonl")
    if result.ranks_disagree_from is not None:
        said = f"the simulated ranks' weights differ from step {result.ranks_disagree_from} on"
        table.add_row("ranks", said)
    table.add_row("integrity", result.summary["guard"]["integrity_status"])
    table.add_row("loss at the end", f"{result.final_loss:.3f} (mean of 20 steps)")
    table.add_row("without the fault", f"{result.final_twin_loss:.3f}")
    for name, content in FILES.items():
        table.add_row("file", f"{options.out_dir / name}  ({content})")
    console.print()
    console.print(table)
    for promise in result.broken_promises:
        console.print(f"[red]did not happen:[/] {promise}")


def _event_story(event: dict[str, Any]) -> str:
    name = str(event["event"]).replace("_", " ")
    if "level" in event:
        return f"{name}: {event['before']} to {event['level']} ({event['worst_layer']})"
    said = event.get("reasons") or event.get("reason") or ""
    reasons = ", ".join(said) if isinstance(said, list) else str(said)
    to = f", state of step {event['to_step']} restored" if "to_step" in event else ""
    return f"{name}{': ' if reasons else ''}{reasons}{to}"
