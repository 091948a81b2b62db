"""What is shown of a demonstration while it goes on."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from foreshock.monitor import Verdict


@contextlib.contextmanager
def told_by_the_console() -> Iterator[None]:
    """The console tells the story itself; only errors are logged."""
    log = logging.getLogger("foreshock")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


@contextlib.contextmanager
def progress_of_training(
    console: Console, steps: int
) -> Iterator[Callable[[int, float, Verdict], None]]:
    """A bar, and a line for each reason that is seen for the first time."""
    columns = (
        TextColumn("[bold]training a small GPT"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=steps, loss="-")
        told: list[str] = []  # without a guard every later step is bad too

        def show(step: int, loss: float, verdict: Verdict) -> None:
            progress.update(task, completed=step + 1, loss=f"{loss:.3f}")
            reason = verdict.reasons[0].value if verdict.reasons else None
            if reason is not None and reason not in told:
                told.append(reason)
                progress.console.print(f"[red]step {step}:[/] {verdict.offender or reason}")

        yield show


@contextlib.contextmanager
def progress_of_drill(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A bar, and what is being tried."""
    columns = (TextColumn("[bold]drill"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[what]}"), console=console) as progress:
        task = progress.add_task("", total=None, what="")
        yield lambda what, done, of: progress.update(task, what=what, completed=done, total=of)
