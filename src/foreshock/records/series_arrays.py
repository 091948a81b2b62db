"""NumPy's own files, written row by row without NumPy, in memory that does not grow with them.

The format, a zip of .npy files, is the documented one: numpy.lib.format, version 1.0.
"""

import io
import math
import struct
import sys
import tempfile
import zipfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, NamedTuple

from foreshock.records.atomic_file import write_blocks_atomically
from foreshock.records.posix_file import make_parent_directory
from foreshock.records.series_row import Column, SeriesRow

_ROWS_AT_ONCE = 128
_NUMBER_BYTES = 8
_IS_LITTLE = sys.byteorder == "little"
_ORDER = "<" if _IS_LITTLE else ">"


class _Member(NamedTuple):
    """One array of N rows."""

    name: str
    kind: str
    labels: tuple[str, ...]
    start: int
    """Of its numbers among those of a row."""

    @property
    def width(self) -> int:
        return len(self.labels)

    def shape(self, num_rows: int) -> tuple[int, ...]:
        return (num_rows,) if self.labels == ("",) else (num_rows, self.width)


def write_arrays(
    path: Path,
    rows: Iterable[SeriesRow],
    columns: Sequence[Column],
    pause: Callable[[], object] = lambda: None,
) -> None:
    """Writes rows as arrays, in one step.

    `step` (N,) int64; `time` (N,) datetime64[ms], UTC; of each name an array of float64, (N,), or
    (N, L) where it has labels, which are in `NAME.labels` (L,). NaN where a row lacks a number.

    Args:
        path: of the .npz file.
        rows: N of them.
        columns: all that any row has.
        pause: called after every few rows.

    Raises:
        OSError: the file cannot be written; the old one is untouched.

    Cost: one pass; the numbers wait in a temporary file in the same directory.
    """
    make_parent_directory(path)
    spool = _Spool(columns)
    with tempfile.TemporaryFile(dir=path.parent) as file:
        spool.fill(file, rows, pause)
        write_blocks_atomically(path, _zipped(spool, file))


class _Spool:
    """Rows on their way from lines to columns: blocks of rows, in each the columns end to end."""

    def __init__(self, columns: Sequence[Column]) -> None:
        self.members = _members(columns)
        self._width = sum(member.width for member in self.members)
        self._places = {
            (member.name, label): member.start + i
            for member in self.members
            for i, label in enumerate(member.labels)
        }
        self.num_rows = 0

    def fill(self, file: IO[bytes], rows: Iterable[SeriesRow], pause: Callable[[], object]) -> None:
        rows = iter(rows)
        while batch := [*islice(rows, _ROWS_AT_ONCE)]:
            file.write(self._block(batch))
            self.num_rows += len(batch)
            pause()

    def blocks_of(self, file: IO[bytes], member: _Member) -> Iterator[bytes]:
        """The numbers of one array, in order."""
        for first in range(0, self.num_rows, _ROWS_AT_ONCE):
            height = min(_ROWS_AT_ONCE, self.num_rows - first)
            file.seek((first * self._width + height * member.start) * _NUMBER_BYTES)
            yield file.read(height * member.width * _NUMBER_BYTES)

    def _block(self, rows: Sequence[SeriesRow]) -> bytes:
        table = array("d", [math.nan]) * (self._width * len(rows))
        for i, row in enumerate(rows):
            start = i * self._width
            for column, number in zip(row.columns, row.numbers, strict=True):
                place = self._places.get(column)
                if place is not None:
                    table[start + place] = number
        blocks = [
            array("q", [row.step for row in rows]).tobytes(),
            array("q", [row.time_ns // 1_000_000 for row in rows]).tobytes(),
        ]
        for member in self.members[len(blocks) :]:
            block = array("d", bytes(_NUMBER_BYTES * member.width * len(rows)))
            for i in range(member.width):
                block[i :: member.width] = table[member.start + i :: self._width]
            blocks.append(block.tobytes())
        return b"".join(blocks)


def _members(columns: Iterable[Column]) -> list[_Member]:
    labels: dict[str, list[str]] = {}
    for name, label in columns:
        labels.setdefault(name, []).append(label)
    found = [_Member("step", "i8", ("",), 0), _Member("time", "M8[ms]", ("",), 1)]
    for name, of_name in labels.items():
        start = found[-1].start + found[-1].width
        found.append(_Member(name, "f8", tuple(of_name), start))
    return found


class _Outlet(io.RawIOBase):
    """What a zip file writes into, and another function out of."""

    def __init__(self) -> None:
        self._waiting: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: "bytes | memoryview", /) -> int:  # type: ignore[override]
        self._waiting.append(bytes(data))
        return len(data)

    def take(self) -> bytes:
        waiting, self._waiting = self._waiting, []
        return b"".join(waiting)


def _zipped(spool: _Spool, file: IO[bytes]) -> Iterator[bytes]:
    outlet = _Outlet()
    with zipfile.ZipFile(outlet, "w") as archive:
        for member in spool.members:
            with archive.open(f"{member.name}.npy", "w", force_zip64=True) as entry:
                entry.write(_header(_ORDER + member.kind, member.shape(spool.num_rows)))
                for block in spool.blocks_of(file, member):
                    entry.write(block)
                    yield outlet.take()
            if member.labels != ("",):
                archive.writestr(f"{member.name}.labels.npy", _text_array(member.labels))
    yield outlet.take()


def _text_array(texts: Sequence[str]) -> bytes:
    longest = max(map(len, texts))
    encoding = "utf-32-le" if _IS_LITTLE else "utf-32-be"
    header = _header(f"{_ORDER}U{longest}", (len(texts),))
    return header + b"".join(text.ljust(longest, "\0").encode(encoding) for text in texts)


def _header(kind: str, shape: tuple[int, ...]) -> bytes:
    said = repr({"descr": kind, "fortran_order": False, "shape": shape})
    prefix = b"\x93NUMPY\x01\x00"
    unpadded = len(prefix) + 2 + len(said) + 1
    text = said + " " * (-unpadded % 64) + "\n"
    return prefix + struct.pack("<H", len(text)) + text.encode("latin-1")
