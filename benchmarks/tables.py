"""Writes the tables of README.md and docs/ from the stored rows: `python -m benchmarks.tables`.

A table stands between two marks, <!-- table: NAME --> and <!-- end -->; `--check` only compares.
"""

from __future__ import annotations

import re
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


TABLES: dict[str, Callable[[], str]] = {
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
    "spikes": lambda: a_table_a_case(
        "spikes",
        [
            count("steps", "steps"),
            count("alarms", "false alarms"),
            number("per_10_000", "in 10 000 steps"),
        ],
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
}


def with_tables(text: str) -> str:
    """The text with every marked table made anew."""
    return _MARKED.sub(lambda m: f"{m[1]}{TABLES[m[2]]()}{m[3]}", text)


def main(arguments: list[str]) -> int:
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
