"""What an event of telemetry.jsonl says, in a sentence; also one that a newer library wrote."""

from collections.abc import Callable, Mapping
from typing import Any

Record = Mapping[str, Any]


def event_sentence(record: Record) -> str:
    """Tells what happened.

    Args:
        record: of telemetry.jsonl, as `read_telemetry` gives it; fields may be missing.

    Returns:
        A sentence of one line, without the step; the event's name where no more is known.
    """
    tell = _SENTENCES.get(str(record.get("event")))
    said = _by_name(record) if tell is None else tell(record)
    return " ".join(said.split())


def offender_sentence(offender: object) -> str:
    """Names the tensor that an event is about.

    Args:
        offender: the field of that name.

    Returns:
        Its kind, name, ranks and what is wrong with it; empty if there is none.
    """
    if not isinstance(offender, dict):
        return ""
    ranks = offender.get("ranks")
    ranks = ranks if isinstance(ranks, list) else []
    where = f" on rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}" if ranks else ""
    named = f"{offender.get('kind', 'tensor')} {offender.get('name', 'without a name')}{where}"
    counts = [
        f"{offender[key]} {what}"
        for key, what in (("nan", "NaN"), ("inf", "Inf"))
        if offender.get(key)
    ]
    if not counts:
        return f"{named}: {'not the same' if len(ranks) > 1 else 'changed between two updates'}"
    return f"{named}: {' and '.join(counts)} of {offender.get('numel', '?')} values"


def reasons_of(record: Record) -> str:
    """The reasons of an event, in the order of their weight; empty if it has none."""
    reasons = record.get("reasons") or record.get("reason") or ()
    return ", ".join(map(str, reasons)) if isinstance(reasons, list | tuple) else str(reasons)


def _because(record: Record) -> str:
    reasons = reasons_of(record)
    offender = offender_sentence(record.get("offender"))
    return f": {reasons}{f' ({offender})' if offender else ''}" if reasons else ""


def _rolled_back(record: Record) -> str:
    factor = record.get("lr_factor", 1)
    rate = "" if factor == 1 else f", learning rate times {factor}"
    return f"rolled back to step {record.get('to_step', '?')}{rate}{_because(record)}"


def _risk_changed(record: Record) -> str:
    before, level = record.get("before", "?"), record.get("level", "?")
    return f"spectral risk {before} to {level} ({record.get('worst_layer', '?')})"


def _gate_at_risk(record: Record) -> str:
    is_alpha = record.get("what") == "alpha"
    what = "sigmoid(alpha)" if is_alpha else "|R^T R - I|"
    said = f"gate {record.get('gate', '?')}: {what} is {record.get('value', '?')}"
    expected = record.get("expected")
    return (
        said
        if expected is None
        else f"{said}, {'planned' if is_alpha else 'accepted'} is {expected}"
    )


def _straggler_seen(record: Record) -> str:
    rank, ratio = record.get("rank", "?"), record.get("ratio", "?")
    return f"rank {rank} takes {ratio} times as long as the others do"


def _by_name(record: Record) -> str:
    return str(record.get("event", "event without a name")).replace("_", " ") + _because(record)


_SENTENCES: dict[str, Callable[[Record], str]] = {
    "update_skipped": lambda record: f"update withheld{_because(record)}",
    "anomaly_seen": lambda record: (
        f"nothing done ({record.get('would', '?')} would have been){_because(record)}"
    ),
    "rollback_success": _rolled_back,
    "recovered": lambda record: "the step that had failed was passed",
    "snapshot_dropped": lambda record: f"snapshot dropped: {record.get('why', '?')}",
    "snapshot_saved": lambda record: f"snapshot saved in {record.get('path', '?')}",
    "snapshot_not_saved": lambda record: f"snapshot not saved: {record.get('why', '?')}",
    "resumed": lambda record: f"the run goes on from {record.get('path', '?')}",
    "aborted": lambda record: f"training was told to stop{_because(record)}",
    "risk_level_changed": _risk_changed,
    "gate_at_risk": _gate_at_risk,
    "straggler_seen": _straggler_seen,
    "autopsy": lambda record: str(record.get("sentence", "autopsy")),
}
