"""The one spelling of time in the records: UTC, milliseconds, a closing Z."""

from datetime import datetime, timezone


def format_utc(time_ns: int) -> str:
    """Writes a time as `2026-01-01T00:00:00.000Z`.

    Args:
        time_ns: nanoseconds since the epoch, as `time.time_ns()` gives them. Cut, not rounded, to
            milliseconds, so that no time stamp lies after what it stamps.

    Returns:
        ISO 8601 text of fixed width, which therefore sorts by time.
    """
    seconds, rest_ns = divmod(time_ns, 1_000_000_000)
    moment = datetime.fromtimestamp(seconds, timezone.utc)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{rest_ns // 1_000_000:03d}Z"


def parse_utc(text: object) -> int:
    """Reads what `format_utc` wrote.

    Args:
        text: in that spelling.

    Returns:
        Nanoseconds since the epoch.

    Raises:
        ValueError: it is another text, or none.
    """
    if not isinstance(text, str) or not text.endswith("Z"):
        raise ValueError(f"a time must end in Z, it is {text!r}")
    moment = datetime.fromisoformat(text[:-1] + "+00:00")
    seconds = int(moment.replace(microsecond=0).timestamp())
    return seconds * 1_000_000_000 + moment.microsecond * 1000
