"""Everything that is written to disk: files in, files out.

Every file is strict JSON, survives a kill at any instruction, and has its reader here.
"""

from foreshock.records.atomic_file import write_atomically
from foreshock.records.summary import read_summary, write_summary
from foreshock.records.telemetry_reader import Telemetry, read_telemetry
from foreshock.records.telemetry_writer import TelemetryWriter

__all__ = [
    "Telemetry",
    "TelemetryWriter",
    "read_summary",
    "read_telemetry",
    "write_atomically",
    "write_summary",
]
