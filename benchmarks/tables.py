"""Writes the tables of README.md and docs/ from the stored rows: `python -m benchmarks.tables`.

A table stands between two marks, <!-- table: NAME --> and <!-- end -->; `--check` only compares.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def health_scan() -> str:
    parts = []
    for (case, _), found in by_case("health_scan").items():
        lines = [
            [
                row["variant"],
                f"{row['median_ms']:.2f}",
                f"{row['p20_ms']:.2f} - {row['p80_ms']:.2f}",
                f"{row['gb_per_s']:.1f}",
                f"{row['times_ours']:.2f}",
            ]
            for row in sorted(found, key=lambda row: float(row["median_ms"]))
        ]
        header = [case, "median ms", "p20 - p80", "GB/s", "times ours"]
        parts.append(f"{markdown(header, lines)}\n\n{circumstances(found[0])}\n")
    return "\n".join(parts)


def health_scan_call() -> str:
    parts = []
    for (case, _), found in by_case("health_scan_call").items():
        lines = [[row["variant"], f"{row['median_us']:.2f}"] for row in found]
        parts.append(f"{markdown([case, 'median us'], lines)}\n\n{circumstances(found[0])}\n")
    return "\n".join(parts)


def overhead() -> str:
    parts = []
    for (case, _), found in by_case("overhead").items():
        lines = [
            [
                row["variant"],
                f"{row['median_ms']:.2f}",
                f"{row['p20_ms']:.2f} - {row['p80_ms']:.2f}",
                f"{row['percent']:+.2f} %",
            ]
            for row in found
        ]
        header = [case, "median ms", "p20 - p80", "overhead"]
        parts.append(f"{markdown(header, lines)}\n\n{circumstances(found[0])}\n")
    return "\n".join(parts)


def rolling_zscore() -> str:
    parts = []
    for (case, _), found in by_case("rolling_zscore").items():
        lines = [
            [
                row["variant"],
                f"{row['ns_per_push']:.0f}",
                f"{row['ns_per_value']:.2f}",
                f"{row['times_ours']:.2f}",
            ]
            for row in sorted(found, key=lambda row: float(row["median_ms"]))
        ]
        header = [case, "ns a push", "ns a value", "times ours"]
        parts.append(f"{markdown(header, lines)}\n\n{circumstances(found[0])}\n")
    return "\n".join(parts)


TABLES: dict[str, Callable[[], str]] = {
    "health_scan": health_scan,
    "health_scan_call": health_scan_call,
    "overhead": overhead,
    "rolling_zscore": rolling_zscore,
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
