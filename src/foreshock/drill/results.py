"""The results of a drill: JSON, CSV, tables and a plot, and the way back from the JSON."""

from __future__ import annotations

import csv
import dataclasses
import io
import statistics
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from foreshock.drill.campaign import RULES_BY_NAME, DrillResults
from foreshock.drill.scenarios import SCENARIOS
from foreshock.drill.scoring import Case, Health, Score, score
from foreshock.records import write_atomically
from foreshock.records.strict_json import dump_json, load_json

SCHEMA_VERSION = 1
FILES = {
    "drill.json": "every case and every healthy run; `read_results` reads it",
    "cases.csv": "a line for each rule on each run with a fault",
    "rules.csv": "a line for each rule",
    "drill.md": "the tables",
    "drill.png": "lead time against false alarms; with matplotlib only",
}
"""What `write_results` writes, and what is in it."""

_HARM = {name for name, scenario in SCENARIOS.items() if not scenario.is_harmless}


def scores_of(results: DrillResults) -> list[Score]:
    """A score of each rule over all faults that do, or may do, harm."""
    cases = [case for case in results.cases if case.scenario in _HARM]
    present = {health.rule for health in results.healths}
    return [score(rule, cases, results.healths) for rule in RULES_BY_NAME if rule in present]


def write_results(results: DrillResults, out_dir: Path) -> list[str]:
    """Writes all files of a drill.

    Returns:
        Names of those written; without matplotlib there is no plot.
    Raises:
        OSError: the directory cannot be written to.
    """
    contents: dict[str, str | bytes] = {
        "drill.json": dump_json({"schema_version": SCHEMA_VERSION, **dataclasses.asdict(results)}),
        "cases.csv": _as_csv([_case_row(case) for case in results.cases]),
        "rules.csv": _as_csv([rule_row(s) for s in scores_of(results)]),
        "drill.md": markdown(results),
    }
    plotted = plot(results)
    if plotted is not None:
        contents["drill.png"] = plotted
    for name, content in contents.items():
        write_atomically(out_dir / name, content)
    return list(contents)


def read_results(file: Path) -> DrillResults:
    """What `write_results` has written to drill.json.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not such a file; says what it is and what is accepted.
    """
    found = load_json(file.read_bytes())
    version = found.get("schema_version") if isinstance(found, dict) else None
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"{file} has schema_version {version!r}; accepted: a drill.json of {SCHEMA_VERSION}"
        )
    cases = [Case(**case) for case in found["cases"]]
    return DrillResults(found["settings"], cases, [Health(**h) for h in found["healths"]])


def joined(parts: Sequence[DrillResults]) -> DrillResults:
    """Several drills in one, as of one training each; settings are those of the first."""
    cases = [case for part in parts for case in part.cases]
    healths = [health for part in parts for health in part.healths]
    return DrillResults(dict(parts[0].settings), cases, healths)


# ---- tables


def _case_row(case: Case) -> dict[str, Any]:
    return {**dataclasses.asdict(case), "delay": case.delay, "lead": case.lead}


def rule_row(found: Score) -> dict[str, Any]:
    """The fields of a score, whose rule it is, and its shares."""
    owner = RULES_BY_NAME[found.rule].owner
    shares = {"per_10_000": found.per_10_000, "standing_share": found.standing_share}
    return {"owner": owner, **dataclasses.asdict(found), **shares}


def _as_csv(rows: Sequence[dict[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _number(value: float | None, form: str = "g") -> str:
    return "-" if value is None else format(value, form)


RULE_HEADER = [
    "rule",
    "detected",
    "false alarms in 10 000 healthy steps",
    "stands, % of healthy steps",
    "delay, steps",
    "before the loss doubled",
    "lead, steps",
    "culprit named",
]


def rule_cells(owner: str, found: dict[str, Any]) -> list[str]:
    """A line of the table of rules; `found` is a `rule_row`."""
    named = f"{found['named']} of {found['nameable']}" if found["nameable"] else "-"
    share = found["standing_share"]
    return [
        found["rule"] if owner == "foreshock" else f"{owner}: {found['rule']}",
        f"{found['detected']} of {found['cases']}",
        _number(found["per_10_000"], ".1f"),
        _number(None if share is None else 100 * share, ".2f"),
        _number(found["median_delay"]),
        f"{found['before']} of {found['doubled']}",
        _number(found["median_lead"]),
        named,
    ]


def rule_table(results: DrillResults) -> list[list[str]]:
    """Lines of the table of rules, without its header."""
    rows = [rule_row(found) for found in scores_of(results)]
    return [rule_cells(row["owner"], row) for row in rows]


def scenario_cell(cases: Sequence[Case]) -> str:
    """What a rule did on a scenario: detected of all, and the median lead or delay."""
    found = [case for case in cases if case.alarm is not None]
    if not found:
        return "" if cases else "-"
    leads = [case.lead for case in found if case.lead is not None]
    delays = [case.delay for case in found if case.delay is not None]
    said = f"{statistics.median(leads):+g}" if leads else f"after {statistics.median(delays):g}"
    return f"{len(found)}/{len(cases)} {said}"


SCENARIO_RULES = (
    "non-finite scan",
    "module scan",
    "loss threshold",
    "loss spike",
    "gradient spike",
    "spectral INSTABILITY",
    "sigma growth",
    "precursor",
    "RMS_t, worst tensor",
    "attention logit",
    "ranks' checksums",
    "SkipStep",
    "ZClip",
    "SpikeDetection",
    "tenfold",
    "MAD and CUSUM",
)
"""Rules that have a column in the table of scenarios."""


def scenario_table(
    results: DrillResults, rules: Sequence[str] = SCENARIO_RULES
) -> tuple[list[str], list[list[str]]]:
    """Header and lines: a scenario a line, a rule a column."""
    lines = []
    for name in SCENARIOS:
        mine = [case for case in results.cases if case.scenario == name]
        if not mine:
            continue
        runs = [case for case in mine if case.rule == mine[0].rule]
        doubled = sum(case.doubled is not None for case in runs)
        cells = [scenario_cell([c for c in mine if c.rule == rule]) for rule in rules]
        lines.append([name, f"{doubled}/{len(runs)}", *cells])
    return ["scenario", "loss doubled", *rules], lines


def as_markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; all columns but the first to the right."""
    align = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, align, *lines])


def markdown(results: DrillResults) -> str:
    """Both tables, and what they are of."""
    settings = results.settings
    steps = max((found.healthy_steps for found in scores_of(results)), default=0)
    head = (
        f"# Drill\n\n{len(results.cases)} cases, {steps} healthy steps, {settings['seeds']} "
        f"seeds, fault at step {settings['fault_step']}, torch {settings['torch']}\n"
    )
    rules = as_markdown(RULE_HEADER, rule_table(results))
    scenarios = as_markdown(*scenario_table(results))
    legend = (
        "A cell: runs in which it was detected, and the median lead in steps before the loss "
        "doubled (negative: after it), or the steps after the fault where it never did.\n"
    )
    return f"{head}\n## Rules\n\n{rules}\n\n## Scenarios\n\n{legend}\n{scenarios}\n"


# ---- the plot


def plot(results: DrillResults) -> bytes | None:
    """Lead time against false alarms as PNG; None without matplotlib (extra `plots`)."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    names: dict[tuple[float, float], list[str]] = {}
    for found in scores_of(results):
        if found.median_lead is None or found.per_10_000 is None:
            continue
        is_ours = RULES_BY_NAME[found.rule].owner == "foreshock"
        size = 20 + 180 * found.detected / max(found.cases, 1)
        place = found.per_10_000, found.median_lead
        axes.scatter(*place, s=size, color="tab:blue" if is_ours else "tab:orange", alpha=0.6)
        names.setdefault(place, []).append(found.rule)
    for place, together in names.items():
        # Many lie side by side on the line of no lead: names that lean do not run into each other.
        is_many = len(together) > 2
        axes.annotate(
            textwrap.fill("; ".join(together), 50),
            place,
            xytext=(6, -6 if is_many else 4),
            textcoords="offset points",
            fontsize=7,
            rotation=0 if is_many else 35,
            va="top" if is_many else "bottom",
        )
    axes.margins(x=0.1, y=0.15)
    axes.set_xscale("symlog", linthresh=1.0)
    axes.set_yscale("symlog", linthresh=1.0)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    axes.set_xlabel("false alarms in 10 000 healthy steps")
    axes.set_ylabel("median lead before the loss doubles, steps (negative: after it)")
    axes.set_title("Blue: foreshock, orange: peers. Area: share of the faults that are detected.")
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=120)
    return out.getvalue()
