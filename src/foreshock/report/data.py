"""All that the report of a run says, as plain numbers and texts."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

from foreshock.records.rank_telemetry import rank_folders
from foreshock.report.curves import MAIN_CURVES, Curves, place_of
from foreshock.report.rank_events import RankEvents
from foreshock.report.ranks import Ranks
from foreshock.report.run_files import RunFiles, checked_run, losses_in
from foreshock.report.telemetry import RunSeen, moment_of

_MOST_SETTINGS = 2000


def report_data(run_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a run's directory.

    Args:
        run_dir: the directory; files that are missing or broken are told in `problems`.

    Returns:
        What the page shows, of lists, dicts, texts and numbers. What its script draws is under
        `drawing`; it holds no number that is not finite.

    Raises:
        ValueError: it is no run's directory.

    Cost: one pass over the files; memory does not grow with them.
    """
    path = checked_run(run_dir)
    files, curves = RunFiles(path), Curves()
    folders = rank_folders(path)
    events = RankEvents() if folders else None
    seen = RunSeen(curves, events)
    files.telemetry(seen)
    files.other_curves(curves)
    summary, config = files.summary(), files.config()
    autopsies, more_autopsies = files.autopsies(folders)
    ledger, pictures, layerwise = files.ledger(), files.pictures(), files.layerwise()
    ranks = None if events is None else Ranks(folders, events, seen, curves, ledger["state"])
    drawn = curves.drawn()
    of_ranks = {} if ranks is None else {"ranks": ranks.drawn(drawn["steps"])}
    problems = [*files.problems, *losses_in(summary), *(() if ranks is None else ranks.problems)]
    if curves.omitted:
        problems.append(f"{curves.omitted} numbers belong to curves beyond the limit of this page")
    return {
        "name": path.resolve().name,
        "facts": _facts(seen, summary),
        "integrity": _integrity(summary, seen),
        "problems": problems,
        "drawing": {
            **drawn,
            "curves": sorted(drawn["curves"], key=place_of),
            "bands": seen.bands.bands(),
            "lanes": seen.events.marks(),
            "main": MAIN_CURVES,
            "shades": [[layer.pop("shades") for layer in map_["layers"]] for map_ in layerwise],
            **of_ranks,
        },
        "numbers": _numbers(drawn),
        "ranks": None if ranks is None else ranks.told(),
        "counts": dict(sorted(seen.events.counts.items())),
        "actions": seen.events.actions(),
        "risk_changes": seen.events.risk_changes(),
        "worst_layers": {"spectral": seen.layers.spectral(), "gradients": seen.layers.gradients()},
        "spectral": _mapping(summary, "spectral"),
        "guard": _mapping(summary, "guard"),
        "autopsies": autopsies,
        "more_autopsies": more_autopsies,
        "overhead": _mapping(summary, "overhead"),
        "ledger": ledger,
        "settings": _settings(config),
        "layerwise": layerwise,
        "pictures": pictures,
    }


def _facts(seen: RunSeen, summary: Mapping[str, Any]) -> list[tuple[str, Any]]:
    facts: list[tuple[str, Any]] = [
        ("steps", summary.get("total_steps")),
        ("last step written", seen.last_step),
        ("final loss", summary.get("final_loss")),
    ]
    first, last = moment_of(seen.first_time), moment_of(seen.last_time)
    if first is not None and last is not None:
        facts += [
            ("begun", f"{first:%Y-%m-%d %H:%M:%S} UTC"),
            ("last record", f"{last:%Y-%m-%d %H:%M:%S} UTC"),
            ("duration", _duration((last - first).total_seconds())),
        ]
    facts += [("telemetry records", seen.records), ("processes", seen.starts)]
    return [(label, value) for label, value in facts if value is not None]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(int(minutes), 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest:.0f} s" if minutes else f"{rest:.1f} s"


def _integrity(summary: Mapping[str, Any], seen: RunSeen) -> dict[str, str]:
    """What became of the run, in a word and a sentence."""
    status = str(_mapping(summary, "guard").get("integrity_status", "NOT ENDED"))
    abort = _mapping(_mapping(summary, "guard"), "abort")
    actions = seen.events.counts
    sentences = {
        "OK": "The guard had nothing to withhold and nothing to restore.",
        "RECOVERED": "The guard withheld an update or restored an earlier state, and the run "
        "went on.",
        "ABORTED": f"The run was told to stop at step {abort.get('step', '?')}.",
        "NOT ENDED": "There is no summary of the guard: the run goes on, was killed, or had none.",
    }
    sentence = sentences.get(status, "")
    if status == "OK" and actions["anomaly_seen"]:
        sentence = "Anomalies were seen, and nothing was done about them: the guard observes."
        status = "ANOMALIES SEEN"
    return {"status": status, "sentence": sentence}


def _numbers(drawn: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The curves as a table, for those who do not see them."""
    rows = []
    for curve in drawn["curves"]:
        steps, means = drawn["steps"][curve["steps"]], curve["mean"]
        lows, highs = curve.get("low", means), curve.get("high", means)
        known = [i for i, mean in enumerate(means) if mean is not None]
        row = {"name": curve["name"], "source": curve["source"], "width": curve["width"]}
        row["nonfinite"] = sum(count for _, count in curve.get("nonfinite", ()))
        if known:
            lowest = min(known, key=lambda i: lows[i])
            highest = max(known, key=lambda i: highs[i])
            row |= {
                "first": means[known[0]],
                "last": means[known[-1]],
                "lowest": lows[lowest],
                "lowest_step": steps[lowest],
                "highest": highs[highest],
                "highest_step": steps[highest],
            }
        rows.append(row)
    return rows


def _settings(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """config.json by its sections; what stands under none comes first."""
    plain = [(key, _text(value)) for key, value in config.items() if not isinstance(value, dict)]
    sections = [{"name": "run", "rows": plain}] if plain else []
    for name, section in config.items():
        if isinstance(section, dict):
            rows = list(_flattened(section))
            shown = rows[:_MOST_SETTINGS]
            if len(rows) > len(shown):
                shown.append(("...", f"{len(rows) - len(shown)} more in config.json"))
            sections.append({"name": str(name), "rows": shown})
    return sections


def _flattened(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in section.items():
        if isinstance(value, dict) and value:
            yield from _flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _text(value)


def _text(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.7g}" if math.isfinite(value) else str(value)
    if isinstance(value, list):
        return ", ".join(map(_text, value)) or "none"
    return "none" if value == {} else str(value)


def _mapping(mapping: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = mapping.get(key)
    return value if isinstance(value, dict) else {}
