"""Writes the tables of README.md and docs/ from the stored rows: `python -m benchmarks.tables`.

A table stands between two marks, <!-- table: NAME --> and <!-- end -->; `--check` only compares,
`--print` only prints those that have rows.
"""

from __future__ import annotations

import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import drill
from benchmarks.rows import load

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)

Row = dict[str, Any]


def markdown(header: list[str], lines: list[list[str]]) -> str:
    align = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, align, *lines])


def by_case(benchmark: str) -> dict[tuple[str, str], list[Row]]:
    cases: dict[tuple[str, str], list[Row]] = {}
    for row in load(benchmark):
        cases.setdefault((row["case"], row["machine"]), []).append(row)
    return cases


def circumstances(row: Row) -> str:
    where = row["machine"] if row["device"] == "cuda" else f"{row['threads']} threads, {row['isa']}"
    dirty = "+" if row["is_dirty"] else ""
    return f"{row['machine']}, {where}, torch {row['torch']}, commit {row['git']}{dirty}".replace(
        f"{row['machine']}, {row['machine']}", row["machine"]
    )


class Column(NamedTuple):
    """A column of a table, and how a row fills it."""

    title: str
    cell: Callable[[Row], str]


def number(key: str, title: str, digits: int = 2) -> Column:
    return Column(title, lambda row: f"{row[key]:.{digits}f}")


def count(key: str, title: str) -> Column:
    return Column(title, lambda row: str(row[key]))


def steps_after(key: str, title: str) -> Column:
    return Column(title, lambda row: "never" if row[key] is None else f"{row[key]} steps")


def percent(key: str, title: str, digits: int = 2, sign: str = "") -> Column:
    return Column(title, lambda row: f"{100 * row[key]:{sign}.{digits}f} %")


MEDIAN = number("median_ms", "median ms")
SPREAD = Column("p20 - p80", lambda row: f"{row['p20_ms']:.2f} - {row['p80_ms']:.2f}")
TIMES_OURS = number("times_ours", "times ours")
CALL = [number("median_us", "median us")]
PASS = [MEDIAN, SPREAD, number("gb_per_s", "GB/s", 1), TIMES_OURS]


def a_table_a_case(benchmark: str, columns: list[Column], by: str | None = None) -> str:
    """The rows of each case, sorted by a number if one is named."""
    parts = []
    for (case, _), found in by_case(benchmark).items():
        rows = found if by is None else sorted(found, key=lambda row: float(row[by]))
        lines = [[row["variant"], *(column.cell(row) for column in columns)] for row in rows]
        header = [case, *(column.title for column in columns)]
        parts.append(f"{markdown(header, lines)}\n\n{circumstances(found[0])}\n")
    return "\n".join(parts)


def ratios_a_case(benchmark: str, ours: str, others: dict[str, str]) -> str:
    """A line a case: our time, and how many times as long the others take, found by their names."""
    machines: dict[str, list[list[Row]]] = {}
    for (_, machine), found in by_case(benchmark).items():
        machines.setdefault(machine, []).append(found)
    parts = []
    for cases in machines.values():
        cases.sort(key=lambda found: [found[0][key] for key in ("is_faultless", "dtype", "d", "k")])
        lines = []
        for found in sorted(cases, key=lambda found: "backward" in found[0]["case"]):
            times = {row["variant"]: f"{row['times_ours']:.2f}" for row in found}
            base = next(row for row in found if row["variant"].startswith(ours))
            named = [next((t for v, t in times.items() if other in v), "") for other in others]
            lines.append([base["case"], f"{base['median_ms']:.2f}", *named])
        header = ["", "foreshock ms", *others.values()]
        parts.append(f"{markdown(header, lines)}\n\n{circumstances(cases[0][0])}\n")
    return "\n".join(parts)


def mean_and_deviation(values: list[float]) -> str:
    return f"{statistics.fmean(values):.2f} ± {statistics.pstdev(values):.2f}"


def a_column_a_set(benchmark: str) -> str:
    """The mean and deviation of every list in a row's `percent`."""
    (first, *_) = load(benchmark) or [{"percent": {}}]
    return a_table_a_case(
        benchmark,
        [
            Column(name, lambda row, name=name: mean_and_deviation(row["percent"][name]))
            for name in first["percent"]
        ],
    )


TABLES: dict[str, Callable[[], str]] = {
    "ood_digits": lambda: a_column_a_set("ood_digits"),
    "ood_ablation": lambda: a_table_a_case(
        "ood_ablation",
        [
            percent("near_auroc", "near"),
            percent("random_near_auroc", "random-near"),
            percent("slightly_blurred_auroc", "slightly blurred"),
            percent("near_auroc_of_l_plus_h", "near, L + H of these codes"),
            percent("estimated_overhead", "multiply-adds", 0, "+"),
            percent("measured_overhead", "processor time", 0, "+"),
        ],
    ),
    **drill.TABLES,
    "health_scan": lambda: a_table_a_case("health_scan", PASS, by="median_ms"),
    "health_scan_call": lambda: a_table_a_case("health_scan_call", CALL),
    "overhead": lambda: a_table_a_case(
        "overhead",
        [MEDIAN, SPREAD, Column("overhead", lambda row: f"{row['percent']:+.2f} %")],
    ),
    "power_iteration": lambda: a_table_a_case("power_iteration", PASS, by="median_ms"),
    "power_iteration_call": lambda: a_table_a_case("power_iteration_call", CALL),
    "power_iteration_cold": lambda: a_table_a_case(
        "power_iteration_cold",
        [
            number("median_ms", "median ms", 1),
            TIMES_OURS,
            percent("relative_error", "below the truth", 3),
        ],
        by="median_ms",
    ),
    "power_iteration_gaussian": lambda: a_table_a_case(
        "power_iteration_gaussian",
        [
            count("matrices", "matrices"),
            percent("mean_error", "mean below"),
            percent("worst_error", "worst"),
            percent("over_1_percent", "by more than 1 %", 0),
        ],
    ),
    "power_iteration_per_step": lambda: a_table_a_case(
        "power_iteration_per_step",
        [
            count("passes", "passes"),
            number("median_ms", "ms a look", 1),
            number("ms_per_step", "ms a step"),
            number("times_its_reads", "times the read probe, a pass"),
        ],
    ),
    "power_iteration_tracking": lambda: a_table_a_case(
        "power_iteration_tracking",
        [
            percent("median_error", "median below", 4),
            percent("worst_error", "worst"),
            percent("worst_error_after_100", "worst after 100 steps"),
            Column(
                "checks with a matrix over 1 %",
                lambda row: f"{row['checks_over_1_percent']} of {row['checks']}",
            ),
        ],
    ),
    "spectral_risk": lambda: a_table_a_case(
        "spectral_risk",
        [
            count("restless_until", "healthy: WARNING or more until step"),
            steps_after("loss_doubled_after", "spiked: loss doubled after"),
            steps_after("unstable_after", "spiked: INSTABILITY after"),
        ],
    ),
    "snapshot_copy": lambda: a_table_a_case(
        "snapshot_copy", [MEDIAN, SPREAD, number("times_a_copy", "times a copy")], by="median_ms"
    ),
    "snapshots": lambda: a_table_a_case(
        "snapshots",
        [MEDIAN, SPREAD, percent("loss_of_throughput", "throughput lost", sign="+")],
        by="median_ms",
    ),
    "surprise": lambda: a_table_a_case(
        "surprise",
        [
            MEDIAN,
            SPREAD,
            Column("overhead", lambda row: f"{row['percent']:+.1f} %"),
            Column(
                "more kept for backward",
                lambda row: f"{row['saved_percent']:+.1f} %" if "saved_percent" in row else "",
            ),
        ],
    ),
    "gates": lambda: a_table_a_case("gates", [MEDIAN, SPREAD, TIMES_OURS], by="median_ms"),
    "gates_in_training": lambda: a_table_a_case(
        "gates_in_training",
        [MEDIAN, SPREAD, Column("overhead", lambda row: f"{row['percent']:+.2f} %")],
        by="percent",
    ),
    "spikes": lambda: a_table_a_case(
        "spikes",
        [
            count("steps", "steps"),
            count("alarms", "false alarms"),
            number("per_10_000", "in 10 000 steps"),
        ],
    ),
    "recorder": lambda: a_table_a_case("recorder", [number("median_us", "median us", 1)]),
    "calibrated_scores": lambda: a_table_a_case(
        "calibrated_scores", [number("us_per_call", "us a call", 1), TIMES_OURS], by="median_ms"
    ),
    "rolling_zscore": lambda: a_table_a_case(
        "rolling_zscore",
        [
            number("ns_per_push", "ns a push", 0),
            number("ns_per_value", "ns a value"),
            TIMES_OURS,
        ],
        by="median_ms",
    ),
    "soft_assign": lambda: ratios_a_case(
        "soft_assign",
        "foreshock",
        {
            "ceiling": "FMA + exp probe",
            "torch.compile": "torch.compile",
            "torch, expansion": "torch, expansion",
            "torch.cdist": "torch.cdist",
            "nervecode": "nervecode",
            "faiss": "faiss, nearest only",
        },
    ),
}


def with_tables(text: str) -> str:
    """The text with every marked table made anew."""
    return _MARKED.sub(lambda m: f"{m[1]}{TABLES[m[2]]()}{m[3]}", text)


def main(arguments: list[str]) -> int:
    if "--print" in arguments:
        print("\n".join(f"\n{TABLES[name]()}" for name in TABLES if load(name)))
        return 0
    stale = []
    for page in PAGES:
        text = page.read_text()
        fresh = with_tables(text)
        if fresh != text:
            stale.append(page.name)
            if "--check" not in arguments:
                page.write_text(fresh)
    for name in TABLES:
        if "--check" not in arguments:
            print(f"\n## {name}\n\n{TABLES[name]()}")
    if stale and "--check" in arguments:
        print(f"not what the stored rows say: {', '.join(stale)}; run make bench")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
