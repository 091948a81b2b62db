"""What `foreshock watch` shows: a table in a terminal, plain lines in a pipe."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from foreshock.watch.progress import Progress, printable
from foreshock.watch.sparkline import sparkline

_STYLES = {"STABLE": "green", "LEARNING": "green", "OK": "green", "ABORTED": "bold red"}
_LABEL_WIDTH = 12


def table(name: str, state: str, progress: Progress, *, width: int, blocks: str) -> Group:
    """The run as it stands, to be drawn in place.

    Args:
        name: of the run.
        state: such as "running".
        progress: of the run.
        width: of the terminal; what does not fit is cut.
        blocks: of the curves.
    """
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="bold", no_wrap=True, min_width=_LABEL_WIDTH - 2)
    grid.add_column(overflow="ellipsis", no_wrap=True)
    grid.add_row("run", Text(printable(name)))
    grid.add_row("state", Text(state))
    curve_width = max(4, width - _LABEL_WIDTH - 14)
    for label, value in facts(progress).items():
        text = Text(value, style=_STYLES.get(value.split()[0], "") if value else "")
        history = {"loss": progress.losses, "grad norm": progress.grad_norms}.get(label)
        if history:
            text = Text(f"{value:<12}") + Text(sparkline(history, curve_width, blocks), "cyan")
        grid.add_row(label, text)
    events = [
        Text(printable(line), overflow="ellipsis", no_wrap=True) for line in progress.last_events
    ]
    return Group(grid, *([Text()] if events else []), *events)


def line(progress: Progress) -> str:
    """The run as it stands, in one plain line."""
    return "  ".join(f"{label} {value}" for label, value in facts(progress).items())


def facts(progress: Progress) -> dict[str, str]:
    """What is known of the run, by its label; what is not known is left out."""
    latest = progress.latest
    speed = progress.steps_per_second
    risk = f"{progress.level}" + _in_brackets(latest) if progress.level else None
    counts = ", ".join(f"{name} {count}" for name, count in progress.counts.items())
    found = {
        "step": latest.get("step"),
        "loss": _number(latest.get("train_loss")),
        "grad norm": _number(latest.get("grad_norm")),
        "rate": _number(latest.get("learning_rate")),
        "risk": risk,
        "speed": None if speed is None else f"{speed:.3g} steps/s",
        "overhead": _with_unit(latest.get("overhead_ms")),
        "events": counts or None,
    }
    return {label: printable(value) for label, value in found.items() if value is not None}


def state(progress: Progress, summary: Mapping[str, Any] | None) -> str:
    """Whether the run goes on, and how it ended if it does not."""
    if summary is not None:
        guard = summary.get("guard")
        status = guard.get("integrity_status") if isinstance(guard, dict) else None
        steps = summary.get("total_steps")
        return printable(f"ended after {steps} steps" + (f", {status}" if status else ""))
    if progress.last_moment is None:
        return "waiting for telemetry.jsonl"
    age = datetime.now(timezone.utc).replace(tzinfo=None) - progress.last_moment
    return f"running, last record {max(0, age.total_seconds()):.0f} s ago"


def _in_brackets(latest: Mapping[str, Any]) -> str:
    kappa, layer = _number(latest.get("spectral_kappa")), latest.get("worst_layer")
    return "" if kappa is None else f" (kappa {kappa}{f', {layer}' if layer else ''})"


def _with_unit(milliseconds: object) -> str | None:
    number = _number(milliseconds)
    return None if number is None else f"{number} ms a step"


def _number(value: object) -> str | None:
    return f"{value:.5g}" if isinstance(value, float) else None if value is None else str(value)
