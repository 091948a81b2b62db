"""The rows of a comparison as a CSV, a table, a plot, and as stored rows."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks import rows as stored
from benchmarks.ood.extras import imported
from benchmarks.ood.trial import OURS, Row, standing
from benchmarks.tables import markdown, mean_and_deviation

CONVENTIONS = {
    "auroc": "AUROC in %; OOD is the positive class, a higher score is more OOD",
    "fpr95": "FPR in % at 95 % TPR: OOD inputs kept where 95 % of the normal ones are kept",
    "aupr": "AUPR in %; OOD is the positive class",
}


class Goal(NamedTuple):
    """Something that ours is to reach."""

    what: str
    reached: float
    is_met: bool


def percentages(rows: list[Row], figure: str) -> dict[str, dict[str, list[float]]]:
    """By method and set: the figure of each seed in percent."""
    return {
        method: {name: [100 * value for value in values] for name, values in of_method.items()}
        for method, of_method in standing(rows, figure).items()
    }


def titled(rows: list[Row], figure: str) -> str:
    """What the table says, with its convention."""
    num_seeds = len({row.seed for row in rows})
    return f"{CONVENTIONS[figure]}; mean ± deviation over {num_seeds} seeds"


def table(rows: list[Row], figure: str, sets: Sequence[str]) -> str:
    """As markdown: a line a method, a column an OOD set."""
    lines = [
        [method, *(mean_and_deviation(of_method[name]) for name in sets)]
        for method, of_method in percentages(rows, figure).items()
    ]
    return markdown([titled(rows, figure), *sets], lines)


def write(rows: list[Row], out: Path, name: str, sets: Sequence[str]) -> None:
    """NAME.csv with every row, NAME.md with the tables, NAME.png with the AUROC of every seed."""
    out.mkdir(parents=True, exist_ok=True)
    write_csv(rows, out / f"{name}.csv")
    tables = "\n\n".join(table(rows, figure, sets) for figure in CONVENTIONS)
    (out / f"{name}.md").write_text(f"{tables}\n")
    plot(rows, sets, out / f"{name}.png")


def write_csv(rows: Sequence[object], path: Path) -> None:
    """A line for each row, which is a dataclass; the header is its fields."""
    lines = [dataclasses.asdict(row) for row in rows]  # type: ignore[call-overload]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)


def store(rows: list[Row], benchmark: str, sets: Sequence[str], device: str = "cpu") -> None:
    """Stores every seed's figures, for the tables of docs/ood.md."""
    for figure in ("auroc", "fpr95"):
        variants = {
            method: {"percent": {name: [round(v, 4) for v in of_method[name]] for name in sets}}
            for method, of_method in percentages(rows, figure).items()
        }
        stored.store(benchmark, titled(rows, figure), device, variants)


def show(rows: list[Row], sets: Sequence[str], goals: Sequence[Goal] = ()) -> None:
    """The AUROC, and what was to be reached, on the console."""
    console = Console()
    seen = Table(title=titled(rows, "auroc"), title_justify="left")
    seen.add_column("method")
    for name in sets:
        seen.add_column(name, justify="right")
    for method, of_method in percentages(rows, "auroc").items():
        cells = [mean_and_deviation(of_method[name]) for name in sets]
        seen.add_row(method, *cells, style="bold" if method == OURS else None)
    console.print(seen)
    for goal in goals:
        mark = "[green]met[/]   " if goal.is_met else "[red]missed[/]"
        console.print(f"{mark} {goal.what}: {goal.reached:.2f}")


def plot(rows: list[Row], sets: Sequence[str], path: Path) -> None:
    """The AUROC of every seed: a panel an OOD set, a line a method, a bar at the mean."""
    figure_module = imported("matplotlib.figure", "plots")
    auroc = standing(rows, "auroc")
    methods = list(auroc)[::-1]
    figure = figure_module.Figure(figsize=(3 + 2 * len(sets), 1 + 0.25 * len(methods)))
    panels = figure.subplots(1, len(sets), sharey=True, squeeze=False)[0]
    for name, panel in zip(sets, panels, strict=True):
        for height, method in enumerate(methods):
            shown = [min(max(value, 0.01), 0.9995) for value in auroc[method][name]]
            color = "tab:red" if method == OURS else "tab:blue"
            panel.plot(shown, [height] * len(shown), ".", color=color, alpha=0.4)
            panel.plot(sum(shown) / len(shown), height, "|", color=color, markersize=12)
        panel.set_title(name)
        panel.axvline(0.5, color="black", linewidth=0.5)
        panel.set_xscale("logit")  # 99 and 99.9 are as far apart as 90 and 99
        panel.set_xlim(0.1, 0.9997)
        panel.set_xticks([0.5, 0.9, 0.99, 0.999], ["50", "90", "99", "99.9"])
        panel.set_xticks([], minor=True)
        panel.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(methods)), methods)
    figure.supxlabel("AUROC in %; OOD is the positive class")
    figure.savefig(path, bbox_inches="tight", dpi=100)
