"""The command line: `foreshock --help`.

What a command needs is imported when it runs: help and completion import no torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from foreshock import records
from foreshock.records.ledger_verification import head_in_summary
from foreshock.records.verification_story import tell_limits, tell_lines

_REFUSED = "the arguments are wrong"


def _notes(*examples: str, done: str, failed: str | None = None, refused: str = _REFUSED) -> str:
    """What stands at the end of a command's help."""
    codes = [("0", done), ("1", failed), ("2", refused)]
    told = [f"  [bold]{code}[/]  {what}" for code, what in codes if what]
    shown = "\n".join(["[bold]Examples[/]", *(f"  {example}" for example in examples)])
    # A paragraph that begins so keeps its lines.
    return f"\b\n{shown}\n\n\b\n" + "\n".join(["[bold]Exit codes[/]", *told])


app = typer.Typer(
    help="Watches a PyTorch training run from inside and keeps it alive.",
    epilog="Exit codes: 0 if what was promised happened, 1 if it did not, 2 if the arguments are "
    "wrong; each command's help says what that means for it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


@contextlib.contextmanager
def _arguments_checked() -> Iterator[None]:
    """What is wrong with the arguments ends the command with exit code 2."""
    try:
        yield
    except (ModuleNotFoundError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None


@contextlib.contextmanager
def _disk_watched() -> Iterator[None]:
    """A file that cannot be written, or read, ends the command with exit code 1."""
    try:
        yield
    except OSError as error:
        Console(stderr=True).print(f"Error: {error}", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None


def _fresh(kind: str) -> Path:
    return Path(f"runs/{kind}-{datetime.now():%Y%m%d-%H%M%S}")


def _scenarios() -> list[str]:
    from foreshock.drill.scenarios import SCENARIOS

    return list(SCENARIOS)


def _subjects() -> list[str]:
    from foreshock.drill.subjects import SUBJECTS

    return list(SUBJECTS)


@app.command(
    epilog=_notes(
        "foreshock demo",
        "foreshock demo --no-guard",
        "foreshock demo --fault nan-activation --strike-step 80",
        done="everything happened that should have",
        failed="something did not, or the files could not be written",
    )
)
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
            help="A fault of the drill (`foreshock drill --list`), put in at --strike-step in the "
            "place of the NaN.",
            autocompletion=_scenarios,
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps to train.", min=1)] = 200,
    out_dir: Annotated[
        Path | None, typer.Option(help="Directory for the files; default runs/demo-<time>.")
    ] = None,
) -> None:
    """Train a small GPT on Python's documentation, lose a weight to NaN, and carry on."""
    out_dir = out_dir or _fresh("demo")
    if fault is not None:
        if inject_lr_spike:
            raise typer.BadParameter("--fault and --inject-lr-spike: accepted: one of them")
        _demonstrate_fault(fault, guard, strike_step, steps, out_dir)
        return
    for is_wanted, step in ((inject_nan, strike_step), (inject_lr_spike, spike_step)):
        if is_wanted and step >= steps:
            raise typer.BadParameter(f"is {step}; accepted: less than --steps, {steps}")

    from foreshock.drill.demo import DemoOptions, run_demo
    from foreshock.drill.progress import progress_of_training, told_by_the_console
    from foreshock.drill.story import tell_demo

    console = Console()
    options = DemoOptions(
        steps=steps,
        out_dir=out_dir,
        is_guarded=guard,
        strike_step=strike_step if inject_nan else None,
        spike_step=spike_step if inject_lr_spike else None,
    )
    begun = time.perf_counter()
    with _disk_watched(), told_by_the_console(), progress_of_training(console, steps) as show:
        result = run_demo(options, show)
    tell_demo(console, options, result, time.perf_counter() - begun)
    if result.broken_promises:
        raise typer.Exit(1)


def _demonstrate_fault(fault: str, guard: bool, fault_step: int, steps: int, out_dir: Path) -> None:
    from foreshock.drill.fault_demo import FaultDemoOptions, run_fault_demo
    from foreshock.drill.progress import progress_of_training, told_by_the_console
    from foreshock.drill.story import tell_fault

    console = Console()
    with _arguments_checked():
        options = FaultDemoOptions(
            fault=fault, steps=steps, fault_step=fault_step, out_dir=out_dir, is_guarded=guard
        )
    with _disk_watched(), told_by_the_console(), progress_of_training(console, steps) as show:
        result = run_fault_demo(options, show)
    tell_fault(console, options, result)
    if result.broken_promises:
        raise typer.Exit(1)


@app.command(
    epilog=_notes(
        "foreshock drill --quick",
        "foreshock drill --scenario nan-weight --scenario rate-x10 --model gpt --seeds 3",
        done="what is promised held: every fault that is not finite was found within a step, the "
        "struck weight or gradient was named, and nothing that acts by default had a false alarm",
        failed="it did not, or the results could not be written",
    )
)
def drill(
    quick: Annotated[
        bool, typer.Option(help="One seed and short healthy runs: about 2 minutes.")
    ] = False,
    is_list: Annotated[
        bool, typer.Option("--list", help="Say which faults there are, and try none.")
    ] = False,
    scenario: Annotated[
        list[str] | None,
        typer.Option(
            help="Faults to try; may be repeated. Default: all.", autocompletion=_scenarios
        ),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Trainings to try them on, gpt or mlp; may be repeated. Default: both.",
            autocompletion=_subjects,
        ),
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
    """
    from foreshock.drill import campaign, results, story
    from foreshock.drill.progress import progress_of_drill

    console = Console()
    if is_list:
        story.tell_scenarios(console)
        return
    out_dir = out_dir or _fresh("drill")
    with _arguments_checked():
        options = campaign.DrillOptions(
            scenarios=tuple(scenario or _scenarios()), subjects=tuple(model or _subjects())
        )
        options = campaign.quickened(options) if quick else options
        options = options if seeds is None else dataclasses.replace(options, seeds=seeds)
    with progress_of_drill(console) as show:
        found = campaign.run_drill(options, show)
    with _disk_watched():
        written = results.write_results(found, out_dir)
    story.tell_drill(console, found)
    for name in written:
        console.print(f"{out_dir / name}  ({results.FILES[name]})", soft_wrap=True)
    broken = campaign.broken_promises(found)
    for promise in broken:
        console.print(f"[red]did not hold:[/] {promise}", soft_wrap=True)
    if broken:
        raise typer.Exit(1)


@app.command(
    epilog=_notes("foreshock info", done="always", refused="there are arguments; it takes none")
)
def info() -> None:
    """Print which implementation of each op runs here, and why the others do not."""
    from foreshock.installation import installation_table

    Console().print(installation_table())


@app.command(
    epilog=_notes(
        "foreshock bench",
        "foreshock bench --list",
        "foreshock bench health_scan soft_assign --out-dir runs/costs",
        done="all of them ran",
        failed="one failed",
        refused="there is no such benchmark, or a package for it is missing",
    )
)
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

    Takes minutes for each benchmark.
    """
    from foreshock import bench as benchmarks

    console = Console()
    where = out_dir or _fresh("bench")
    with _disk_watched(), _arguments_checked():
        if is_list:
            table = Table.grid(padding=(0, 2))
            for name, what in benchmarks.descriptions().items():
                table.add_row(Text(name, style="bold"), what)
            console.print(table)
            return
        status = benchmarks.run(names or ["overhead"], where)
    console.print(f"rows: {where}/results", soft_wrap=True)
    if status:
        raise typer.Exit(1)


_Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run's directory.")]


@app.command(
    epilog=_notes(
        "foreshock report runs/first",
        done="report.html is in the run's directory",
        failed="it could not be written",
        refused="RUN is not the directory of a run",
    )
)
def report(run: _Run) -> None:
    """Write RUN/report.html: all that a run's files say, with curves, in one page.

    Of many ranks, those that keep records of their own in RUN/rank_00001 and so on are shown too.
    The page loads nothing. The run may go on meanwhile, or have been killed.
    """
    from foreshock.report import write_report

    with _arguments_checked(), _disk_watched():
        path = write_report(run)
    Console().print(str(path), markup=False, highlight=False, soft_wrap=True)


@app.command(
    epilog=_notes(
        "foreshock watch runs/first",
        "foreshock watch runs/first --once",
        "foreshock watch runs/first | tee watched.txt",
        done="the run has ended, or Ctrl-C was pressed",
        failed="with --once: there is nothing yet; or a file could not be read",
        refused="RUN is not a directory",
    )
)
def watch(
    run: _Run,
    once: Annotated[bool, typer.Option("--once", help="Show how it stands, and return.")] = False,
    interval: Annotated[
        float, typer.Option(help="Seconds between looks.", min=0.05, max=3600)
    ] = 1.0,
) -> None:
    """Show a run as it goes on: losses, risk, speed, overhead and the last events.

    In a terminal the view is drawn anew at each look; in a pipe there is a line for whatever is
    new. It ends with the run.
    """
    from foreshock.watch import watch_run

    with _arguments_checked(), _disk_watched(), contextlib.suppress(KeyboardInterrupt):
        is_known = watch_run(run, once=once, interval_s=interval)
        if once and not is_known:
            raise typer.Exit(1)


_FILE = {"exists": True, "dir_okay": False, "readable": True}


@app.command(
    epilog=_notes(
        "foreshock verify runs/first/ledger.jsonl",
        "foreshock verify ledger.jsonl --head sha256:1f0c... --key-file ledger.key",
        done="the ledger is intact",
        failed="it is not; the first line that is wrong is named",
        refused="it could not be verified",
    )
)
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
    """Find the first line of a ledger that was altered, removed, inserted or reordered."""
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
        said = f": {ledger}, {tell_lines(found.lines)}"
        console.print(Text.assemble(("intact", "bold green"), said), soft_wrap=True)
    else:
        said = f": {ledger}, line {found.first_bad_line}: {found.problem}"
        console.print(Text.assemble(("broken", "bold red"), said), soft_wrap=True)
        console.print(f"before it {tell_lines(found.lines)} that fit together")
    console.print(f"head of these: {found.head}", soft_wrap=True)
    for line in tell_limits(found, head_source) if found else ():
        console.print(line, soft_wrap=True)


if __name__ == "__main__":
    app()
