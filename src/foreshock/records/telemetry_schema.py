"""What the writer and the reader of telemetry.jsonl agree on.

One JSON object a line. Records have "event", "step" and "time" (UTC), then the fields of the event.
A run, and each resumption of it, opens with a record without a step:
`{"event": "start", "schema_version": 1, "time": ..., ...}`.
"""

SCHEMA_VERSION = 1

START_EVENT = "start"
TELEMETRY_EVENT = "telemetry"

TEXT_FIELDS = frozenset({"event", "time"})
"""In which "NaN" is a text; anywhere else it is the float."""
