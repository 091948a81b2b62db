"""The command line: `foreshock --help`."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from foreshock import bench as benchmarks
from foreshock import records
from foreshock.drill import results as drill_results
from foreshock.drill.campaign import DrillOptions, broken_promises, quickened, run_drill
from foreshock.drill.demo import FILES, DemoOptions, DemoResult, run_demo
from foreshock.drill.fault_demo import FaultDemoOptions, run_fault_demo
from foreshock.drill.scenarios import SCENARIOS
from foreshock.drill.story import tell_drill, tell_fault
from foreshock.drill.subjects import SUBJECTS
from foreshock.monitor import Verdict
from foreshock.ops._backend import active_isa, explain, list_ops, load_kernels
from foreshock.records.ledger_verification import head_in_summary

app = typer.Typer(
    help="Watches a PyTorch training run from inside and keeps it alive.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.command()
def demo(
    guard: Annotated[bool, typer.Option(help="Let the guard act, or let the run die.")] = True,
    inject_nan: Annotated[bool, typer.Option(help="Make one weight NaN during the run.")] = True,
    strike_step: Annotated[int, typer.Option(help="Step at which it does.", min=0)] = 50,
    inject_lr_spike: Annotated[
        bool, typer.Option(help="Make the learning rate 30 times too high for 5 steps.")
    ] = False,
    spike_step: Annotated[int, typer.Option(help="Step at which it begins.", min=120)] = 150,
    fault: Annotated[
        str | None,
        typer.Option(
            help="A fault of the drill, put in at --strike-step in the place of the NaN: one of "
            f"{', '.join(SCENARIOS)}."
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps to train.", min=1)] = 200,
    out_dir: Annotated[
        Path | None, typer.Option(help="Directory for the files; default runs/demo-<time>.")
    ] = None,
) -> None:
    """Train a small GPT on Python's documentation, lose a weight to NaN, and carry on.

    Exit code 0 if everything happened that should have, 1 if not.
    """
    if fault is not None:
        if inject_lr_spike:
            raise typer.BadParameter("--fault and --inject-lr-spike: accepted: one of them")
        _demonstrate_fault(fault, guard, strike_step, steps, out_dir)
        return
    for is_wanted, step in ((inject_nan, strike_step), (inject_lr_spike, spike_step)):
        if is_wanted and step >= steps:
            raise typer.BadParameter(f"is {step}; accepted: less than --steps, {steps}")
    console = Console()
    options = DemoOptions(
        steps=steps,
        out_dir=out_dir or Path(f"runs/demo-{datetime.now():%Y%m%d-%H%M%S}"),
        is_guarded=guard,
        strike_step=strike_step if inject_nan else None,
        spike_step=spike_step if inject_lr_spike else None,
    )
    begun = time.perf_counter()
    with _told_by_us(), _progress_of_training(console, steps) as show:
        result = run_demo(options, show)
    _tell(console, options, result, time.perf_counter() - begun)
    if result.broken_promises:
        raise typer.Exit(1)


@contextlib.contextmanager
def _told_by_us() -> Iterator[None]:
    """The console tells the story itself; only errors are logged."""
    log = logging.getLogger("foreshock")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


@contextlib.contextmanager
def _progress_of_training(
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


def _demonstrate_fault(
    fault: str, guard: bool, fault_step: int, steps: int, out_dir: Path | None
) -> None:
    console = Console()
    try:
        options = FaultDemoOptions(
            fault=fault,
            steps=steps,
            fault_step=fault_step,
            out_dir=out_dir or Path(f"runs/demo-{datetime.now():%Y%m%d-%H%M%S}"),
            is_guarded=guard,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    with _told_by_us(), _progress_of_training(console, steps) as show:
        result = run_fault_demo(options, show)
    tell_fault(console, options, result)
    if result.broken_promises:
        raise typer.Exit(1)


@app.command()
def drill(
    quick: Annotated[
        bool, typer.Option(help="One seed and short healthy runs: about 2 minutes.")
    ] = False,
    scenario: Annotated[
        list[str] | None,
        typer.Option(help=f"Faults to try; may be repeated. Default: all. {', '.join(SCENARIOS)}."),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(help=f"Trainings to try them on: {', '.join(SUBJECTS)}; may be repeated."),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(help="Seeds, of each training; 7, or 1 with --quick.", min=1)
    ] = None,
    out_dir: Annotated[
        Path | None, typer.Option(help="Directory for the results; default runs/drill-<time>.")
    ] = None,
) -> None:
    """Try faults on small real trainings, and see which rule finds them, and how early.

    Every rule of foreshock and of its peers judges the same runs. Writes drill.json, cases.csv,
    rules.csv, drill.md and, with matplotlib, drill.png.

    Exit code 0 if what is promised held: every fault that is not finite was found within a step,
    the struck weight or gradient was named, and nothing that acts by default had a false alarm.
    1 if not, 2 if the arguments are wrong.
    """
    console = Console()
    try:
        options = DrillOptions(
            scenarios=tuple(scenario or SCENARIOS), subjects=tuple(model or SUBJECTS)
        )
        options = quickened(options) if quick else options
        options = options if seeds is None else dataclasses.replace(options, seeds=seeds)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    out_dir = out_dir or Path(f"runs/drill-{datetime.now():%Y%m%d-%H%M%S}")
    columns = (TextColumn("[bold]drill"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[what]}"), console=console) as progress:
        task = progress.add_task("", total=None, what="")
        results = run_drill(
            options,
            lambda what, done, of: progress.update(task, what=what, completed=done, total=of),
        )
    written = drill_results.write_results(results, out_dir)
    tell_drill(console, results)
    for name in written:
        console.print(f"{out_dir / name}  ({drill_results.FILES[name]})", soft_wrap=True)
    broken = broken_promises(results)
    for promise in broken:
        console.print(f"[red]did not hold:[/] {promise}", soft_wrap=True)
    if broken:
        raise typer.Exit(1)


def _tell(console: Console, options: DemoOptions, result: DemoResult, seconds: float) -> None:
    """The story of the run, and where it is written."""
    guard, overhead = result.summary["guard"], result.summary["overhead"]
    last = max(result.losses)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
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


_SWITCHES = ("FORESHOCK_BACKEND", "FORESHOCK_ISA", "FORESHOCK_STRICT")


@app.command()
def info() -> None:
    """Print which implementation of each op runs here, and why the others do not."""
    import torch

    import foreshock

    console = Console()
    kernels = load_kernels()
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("foreshock", foreshock.__version__)
    table.add_row("torch", torch.__version__)
    if isinstance(kernels, str):
        table.add_row("compiled kernels", f"none: {kernels}")
    else:
        isas = [
            f"{name}{'' if usable else ' (not on this CPU)'}" for name, usable in kernels.isas()
        ]
        table.add_row("compiled kernels", str(kernels.__file__))
        table.add_row("instruction sets", f"{', '.join(isas)}; in use: {active_isa()}")
        table.add_row("threads", str(kernels.thread_count()))
    for switch in _SWITCHES:
        if switch in os.environ:
            table.add_row(switch, os.environ[switch])
    for op in list_ops():
        for device in ("cpu", "cuda"):
            for backend, said in explain(op, device).items():
                table.add_row(f"{op} on {device}", f"{backend}: {said}")
    console.print(table)


@app.command()
def bench(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Benchmarks; default: overhead, what the monitor costs a whole loop."),
    ] = None,
    is_list: Annotated[
        bool, typer.Option("--list", help="Say which there are, and run none.")
    ] = False,
    out_dir: Annotated[
        Path | None, typer.Option(help="Directory for the rows; default runs/bench-<time>.")
    ] = None,
) -> None:
    """Measure on this machine what foreshock costs, beside what else there is.

    Takes minutes for each benchmark. Exit code 0 if all of them ran, 1 if one failed.
    """
    console = Console()
    try:
        if is_list:
            table = Table.grid(padding=(0, 2))
            for name, what in benchmarks.descriptions().items():
                table.add_row(Text(name, style="bold"), what)
            console.print(table)
            return
        where = out_dir or Path(f"runs/bench-{datetime.now():%Y%m%d-%H%M%S}")
        status = benchmarks.run(names or ["overhead"], where)
    except (FileNotFoundError, ModuleNotFoundError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None
    console.print(f"rows: {where}/results", soft_wrap=True)
    if status:
        raise typer.Exit(1)


_FILE = {"exists": True, "dir_okay": False, "readable": True}


@app.command()
def verify(
    ledger: Annotated[Path, typer.Argument(help="A ledger.jsonl.", **_FILE)],
    head: Annotated[
        str | None,
        typer.Option(help="Hash of a line that must be there; default: summary.json beside it."),
    ] = None,
    key_file: Annotated[
        Path | None, typer.Option(help="File whose bytes are the HMAC key.", **_FILE)
    ] = None,
    public_key: Annotated[
        Path | None, typer.Option(help="Ed25519 public key: PEM, or 32 bytes.", **_FILE)
    ] = None,
) -> None:
    """Find the first line of a ledger that was altered, removed, inserted or reordered.

    Exit code 0 if the ledger is intact, 1 if it is not, 2 if it could not be verified.
    """
    try:
        head_source = "--head" if head is not None else "summary.json"
        found = records.verify(
            ledger,
            head=head if head is not None else head_in_summary(ledger),
            hmac_key=None if key_file is None else key_file.read_bytes(),
            public_key=None if public_key is None else public_key.read_bytes(),
        )
    except (OSError, TypeError, ValueError, ImportError) as error:
        raise typer.BadParameter(str(error)) from None
    _tell_verification(Console(), ledger, found, head_source)
    if not found:
        raise typer.Exit(1)


def _tell_verification(
    console: Console, ledger: Path, found: records.Verification, head_source: str
) -> None:
    if found:
        said = f": {ledger}, {_lines(found.lines)}"
        console.print(Text.assemble(("intact", "bold green"), said), soft_wrap=True)
    else:
        said = f": {ledger}, line {found.first_bad_line}: {found.problem}"
        console.print(Text.assemble(("broken", "bold red"), said), soft_wrap=True)
        console.print(f"before it {_lines(found.lines)} that fit together")
    console.print(f"head of these: {found.head}", soft_wrap=True)
    for line in _limits(found, head_source) if found else ():
        console.print(line, soft_wrap=True)


def _lines(number: int) -> str:
    return "1 line" if number == 1 else f"{number} lines"


def _limits(found: records.Verification, head_source: str) -> Iterator[str]:
    """What a ledger that is intact proves, and what it does not."""
    if found.torn_bytes:
        yield (
            f"line {found.lines + 1} is unfinished ({found.torn_bytes} bytes): it is being "
            "written, a kill has torn it, or it was cut"
        )
    if found.head_line is None:
        yield "not proven: that no lines are missing at the end; give --head"
    else:
        added = found.lines - found.head_line
        yield f"complete up to line {found.head_line}, the head in {head_source}" + (
            f"; behind it {_lines(added)}" if added else ""
        )
    if found.is_keyed:
        yield "every line bears the HMAC of the key"
    if found.is_signed:
        yield "every line bears the signature of the key"
    if not (found.is_keyed or found.is_signed):
        yield (
            "not proven: that nobody wrote the whole chain anew; give --key-file or --public-key "
            "for a ledger that was written with a key, or a --head that was kept elsewhere"
        )


if __name__ == "__main__":
    app()
