"""Everything that is written to disk: files in, files out.

Every file is strict JSON, survives a kill at any instruction, and has its reader here.
"""

from foreshock.records.atomic_file import write_atomically
from foreshock.records.autopsy_file import read_autopsy, write_autopsy
from foreshock.records.ledger import Ledger
from foreshock.records.ledger_chain import is_private_value
from foreshock.records.ledger_verification import Verification, read_ledger, verify
from foreshock.records.metrics_reader import Metrics, read_metrics
from foreshock.records.metrics_recorder import MetricsRecorder
from foreshock.records.poc_report import read_poc_report, read_poc_summary
from foreshock.records.rank_telemetry import read_rank_telemetry
from foreshock.records.series_reader import Series, read_series
from foreshock.records.series_recorder import SeriesRecorder
from foreshock.records.summary import read_summary, write_summary
from foreshock.records.telemetry_reader import Telemetry, read_telemetry
from foreshock.records.telemetry_writer import TelemetryWriter

__all__ = [
    "Ledger",
    "Metrics",
    "MetricsRecorder",
    "Series",
    "SeriesRecorder",
    "Telemetry",
    "TelemetryWriter",
    "Verification",
    "is_private_value",
    "read_autopsy",
    "read_ledger",
    "read_metrics",
    "read_poc_report",
    "read_poc_summary",
    "read_rank_telemetry",
    "read_series",
    "read_summary",
    "read_telemetry",
    "verify",
    "write_atomically",
    "write_autopsy",
    "write_summary",
]
