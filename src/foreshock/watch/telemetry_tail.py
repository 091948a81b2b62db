"""The end of a telemetry file, as it grows."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from foreshock.records.telemetry_reader import parse_telemetry_line

_BYTES_AT_ONCE = 1 << 20


class TelemetryTail:
    """Reads on where it stopped; a file that is not there yet, or was replaced, is no error.

    Args:
        path: of telemetry.jsonl.

    Attributes:
        torn_lines: lines that were no whole record. A last line without its end is not one of
            them: it is read when its end is there.
        restarts: how often another file stood in the place of the one that was read.
    """

    def __init__(self, path: Path) -> None:
        self.torn_lines = 0
        self.restarts = 0
        self._path = path
        self._place: tuple[int, int] | None = None
        self._offset = 0
        self._rest = b""

    def read(self) -> tuple[list[dict[str, Any]], bool]:
        """Reads what is new, up to about a megabyte.

        Returns:
            The records, and whether there is more.

        Raises:
            OSError: the file is there and cannot be read.
        """
        try:
            file = open(self._path, "rb")  # noqa: SIM115
        except FileNotFoundError:
            return [], False
        with file:
            status = os.fstat(file.fileno())
            self._recognise(status)
            file.seek(self._offset)
            block = file.read(_BYTES_AT_ONCE)
        self._offset += len(block)
        *lines, self._rest = (self._rest + block).split(b"\n")
        return self._records(lines), self._offset < status.st_size

    def _recognise(self, status: os.stat_result) -> None:
        place = status.st_dev, status.st_ino
        if self._place is not None and (place != self._place or status.st_size < self._offset):
            self.restarts += 1
            self._offset, self._rest = 0, b""
        self._place = place

    def _records(self, lines: list[bytes]) -> list[dict[str, Any]]:
        records = []
        for line in lines:
            record = parse_telemetry_line(line) if line.strip() else {}
            if record is None:
                self.torn_lines += 1
            elif record:
                records.append(record)
        return records
