"""Stores what drills have found: `python -m benchmarks.drill DIR...`; see docs/drill.md.

Each DIR is an --out-dir of `foreshock drill`; drills of other seeds or trainings are joined.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

from benchmarks import rows
from foreshock.drill.campaign import RULES_BY_NAME, DrillResults
from foreshock.drill.results import (
    RULE_HEADER,
    SCENARIO_RULES,
    as_markdown,
    joined,
    plot,
    read_results,
    rule_cells,
    rule_row,
    scenario_table,
    scores_of,
)
from foreshock.drill.scenarios import SCENARIOS

PLOT = Path(__file__).parent.parent / "docs" / "drill.png"
TRAININGS = ("gpt", "mlp")
_BOTH = "both trainings"


def _of(results: DrillResults, subject: str) -> DrillResults:
    return dataclasses.replace(
        results,
        cases=[case for case in results.cases if case.subject == subject],
        healths=[health for health in results.healths if health.subject == subject],
    )


def store(results: DrillResults) -> None:
    """Puts the rows and the plot of these drills into the place of those stored before."""
    parts = {_BOTH: results, **{subject: _of(results, subject) for subject in TRAININGS}}
    seeds = {name: len({case.seed for case in parts[name].cases}) for name in TRAININGS}
    for case, part in parts.items():
        mine = {"seeds": seeds if case == _BOTH else {case: seeds[case]}}
        found = {score.rule: {**rule_row(score), **mine} for score in scores_of(part)}
        rows.store("drill", case, "cpu", found)
    header, lines = scenario_table(results)
    cells = {line[0]: dict(zip(header[1:], line[1:], strict=True)) for line in lines}
    rows.store("drill_scenarios", _BOTH, "cpu", {name: {"cells": c} for name, c in cells.items()})
    plotted = plot(results)
    if plotted is not None:
        PLOT.write_bytes(plotted)


def _stored(case: str) -> list[dict[str, Any]]:
    return [row for row in rows.load("drill") if row["case"] == case]


def _size(found: list[dict[str, Any]]) -> str:
    seeds = ", ".join(f"{count} of the {name}" for name, count in found[0]["seeds"].items())
    steps = max(row["healthy_steps"] for row in found)
    cases = max(row["cases"] for row in found)
    return (
        f"{cases} runs with a fault, {steps} healthy steps; seeds: {seeds}. torch "
        f"{found[0]['torch']}, commit {found[0]['git']}{'+' if found[0]['is_dirty'] else ''}"
    )


def rules_table(case: str = _BOTH) -> str:
    """What each rule did over all faults."""
    found = _stored(case)
    if not found:
        return ""
    lines = [rule_cells(RULES_BY_NAME[row["variant"]].owner, row) for row in found]
    header = [f"{case}: rule", *RULE_HEADER[1:]]
    return f"{as_markdown(header, lines)}\n\n{_size(found)}\n"


def scenarios_table() -> str:
    """What the rules did on each scenario."""
    header = ["loss doubled", *SCENARIO_RULES]
    found = rows.load("drill_scenarios")
    lines = [[row["variant"], *(row["cells"].get(key, "") for key in header)] for row in found]
    return f"{as_markdown(['scenario', *header], lines)}\n"


def faults_table() -> str:
    """What the scenarios are."""
    lines = [[s.name, s.group, s.what] for s in SCENARIOS.values()]
    marks = "| scenario | kind | what is done |\n| --- | --- | --- |\n"
    return marks + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


TABLES = {
    "drill_faults": faults_table,
    "drill": rules_table,
    "drill_gpt": lambda: rules_table("gpt"),
    "drill_mlp": lambda: rules_table("mlp"),
    "drill_scenarios": scenarios_table,
}


def main(arguments: list[str]) -> int:
    if not arguments:
        print("accepted: the --out-dir of one or more drills")
        return 2
    store(joined([read_results(Path(each) / "drill.json") for each in arguments]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
