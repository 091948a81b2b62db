"""The two files of the metrics recorder, to which rows are appended at the price of those rows."""

import contextlib
import csv
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from foreshock.records.atomic_file import write_blocks_atomically
from foreshock.records.locked_file import LockedFile
from foreshock.records.metrics_reader import scan_json
from foreshock.records.metrics_row import (
    FIXED,
    Row,
    RowTexts,
    csv_header,
    csv_line,
    json_line,
    row_of_record,
    texts_of,
)

_BLOCK_BYTES = 1 << 20
_CLOSING = b"\n]\n"


class _Tail:
    """The end of a file that is written over: rows, and behind them what closes them."""

    def __init__(self, path: Path, closing: bytes) -> None:
        self._path = path
        self._closing = closing
        self._file = LockedFile(path)
        self.end = 0
        """Where the rows end."""
        self._size = self._file.size()

    @property
    def size(self) -> int:
        """Bytes in the file, as the last write has left it."""
        return self._size

    def append(self, data: bytes) -> None:
        """Writes rows over what closes the file, and closes it behind them, in one call.

        Raises:
            OSError: they are not in the file, which ends as it did before if that can be had.
        """
        self._file.check_unchanged(self._size)
        try:
            self._file.write(data + self._closing, self.end)
            self.end += len(data)
            self._size = self.end + len(self._closing)
        except BaseException:
            with contextlib.suppress(OSError):
                self.cut_back(self.end)
            raise

    def cut_back(self, end: int) -> None:
        """Ends the file where it ended earlier, or where its last whole row does.

        Raises:
            OSError: it may not be closed now; the next append closes it.
        """
        self.end = end
        try:
            self._file.write(self._closing if end else b"", end)
        finally:
            self._size = self._file.size()

    def sync(self) -> None:
        self._file.sync()

    def close(self) -> None:
        self._file.close()


class JsonRows:
    """`training_metrics.json`: an array with one row a line, closed after every append.

    The rows and the bracket behind them go over the old bracket in one system call. So every JSON
    parser reads the file at any time, but for a kill inside that call, which may leave the last
    row torn and the bracket missing; `read_metrics` reads that too, and opening it here mends it.

    Args:
        path: the file; it is created, with its parent directories, if missing.
        take_in: is given what the file holds already, batch by batch.

    Raises:
        BlockingIOError: another recorder writes the file.
        ValueError: the file holds something else; it is left alone.
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path, take_in: Callable[[list[Row]], object]) -> None:
        self.path = path
        self.num_rows = 0
        self._tail = _Tail(path, _CLOSING)
        try:
            self._continue(take_in)
        except BaseException:
            self._tail.close()
            raise

    def append(self, rows: Sequence[RowTexts]) -> None:
        """Appends rows.

        Raises:
            OSError: none of them is in the file.

        Cost: two system calls, whatever is in the file; no sync.
        """
        start = ",\n" if self.num_rows else "\n"
        self._tail.append((start + ",\n".join(map(json_line, rows))).encode())
        self.num_rows += len(rows)

    def mark(self) -> tuple[int, int]:
        """Where the file ends now, for `cut_back`."""
        return self._tail.end, self.num_rows

    def cut_back(self, mark: tuple[int, int]) -> None:
        """Takes out what was appended since."""
        self._tail.cut_back(mark[0])
        self.num_rows = mark[1]

    def rows(self) -> Iterator[Row]:
        """Reads all rows, one at a time."""
        with open(self.path, "rb") as file:
            for record, _ in scan_json(file):
                if record is not None:
                    yield row_of_record(record)

    def blocks(self) -> Iterator[bytes]:
        """The text of the array, in pieces."""
        rest = self._tail.end
        with open(self.path, "rb") as file:
            while rest > 0 and (block := file.read(min(rest, _BLOCK_BYTES))):
                rest -= len(block)
                yield block
        yield b"\n]"

    def sync(self) -> None:
        """Makes what was appended survive a crash of the machine."""
        self._tail.sync()

    def close(self) -> None:
        """Closes the file."""
        self._tail.close()

    def _continue(self, take_in: Callable[[list[Row]], object]) -> None:
        if self._tail.size == 0:
            self._tail.append(b"[")
            return
        end, torn = 1, False
        batch: list[Row] = []
        with open(self.path, "rb") as file:
            for record, record_end in scan_json(file):
                if torn:
                    raise ValueError("a line in its middle is no record")
                if record is None:
                    torn = True
                    continue
                batch.append(row_of_record(record))
                self.num_rows, end = self.num_rows + 1, record_end
                if len(batch) == 1024:
                    take_in(batch)
                    batch = []
        take_in(batch)
        self._tail.cut_back(end)


class CsvRows:
    """`training_metrics.csv`: a header, one row a line, each with all columns.

    A name that no row had before widens the file: it is streamed into a new one, with one more
    comma a line, which then takes its place. That costs a pass over the file, once for each name.

    Args:
        path: the file; it is created, with its parent directories, if missing.
        json_rows: what the file must hold; if it does not, it is made anew.
        names: of all optional values among them.

    Raises:
        BlockingIOError: another recorder writes the file.
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path, json_rows: JsonRows, names: Iterable[str]) -> None:
        self.path = path
        self._tail = _Tail(path, b"")
        try:
            self._columns, num_rows = self._look()
            if num_rows != json_rows.num_rows or not {*names} <= {*self._columns}:
                self._columns = (*FIXED, *names)
                self._replace(self._lines_of(json_rows.rows()))
        except BaseException:
            self._tail.close()
            raise

    def append(self, rows: Sequence[RowTexts]) -> None:
        """Appends rows, for whose names `widen` has made room.

        Raises:
            OSError: none of them is in the file.

        Cost: two system calls, whatever is in the file; no sync.
        """
        columns = self._columns
        self._tail.append("".join([csv_line(row, columns) + "\n" for row in rows]).encode())

    def widen(self, rows: Sequence[RowTexts]) -> None:
        """Makes room for names that no row had before.

        Raises:
            OSError: there is none, and the file is as it was.
        """
        known = {*self._columns}
        new = [name for names in {row.names: None for row in rows} for name in names]
        added = tuple(dict.fromkeys(name for name in new if name not in known))
        if added:
            columns, self._columns = self._columns, self._columns + added
            try:
                self._replace(self._wider_blocks(len(added)))
            except BaseException:
                self._columns = columns
                raise

    def mark(self) -> int:
        """Where the file ends now, for `cut_back`."""
        return self._tail.end

    def cut_back(self, mark: int) -> None:
        """Takes out what was appended since."""
        self._tail.cut_back(mark)

    def sync(self) -> None:
        """Makes what was appended survive a crash of the machine."""
        self._tail.sync()

    def close(self) -> None:
        """Closes the file."""
        self._tail.close()

    def _look(self) -> tuple[tuple[str, ...], int]:
        """Columns and number of rows; a torn last line is cut off."""
        header = csv_header(FIXED).encode() + b"\n"
        if self._tail.size < len(header) and self._is_beginning_of(header):
            self._tail.append(header)
            return FIXED, 0
        num_lines = 0
        with open(self.path, "rb") as file:
            header = file.readline()
            end = len(header)
            for line in file:
                if line.endswith(b"\n"):
                    end, num_lines = end + len(line), num_lines + 1
        columns = tuple(next(csv.reader([header.decode().rstrip("\n")], strict=True)))
        if columns[: len(FIXED)] != FIXED:
            raise ValueError("its columns are not those of a metrics file")
        self._tail.cut_back(end)
        return columns, num_lines

    def _is_beginning_of(self, header: bytes) -> bool:
        # A device of size 0 is not read: it may have no end.
        return self._tail.size == 0 or header.startswith(self.path.read_bytes())

    def _lines_of(self, rows: Iterable[Row]) -> Iterator[bytes]:
        yield csv_header(self._columns).encode() + b"\n"
        for row in rows:
            yield csv_line(texts_of(row), self._columns).encode() + b"\n"

    def _wider_blocks(self, num_added: int) -> Iterator[bytes]:
        yield csv_header(self._columns).encode() + b"\n"
        with open(self.path, "rb") as file:
            file.readline()
            rest = self._tail.end - file.tell()
            while rest > 0 and (block := file.read(min(rest, _BLOCK_BYTES))):
                rest -= len(block)
                yield block.replace(b"\n", b"," * num_added + b"\n")

    def _replace(self, blocks: Iterable[bytes]) -> None:
        write_blocks_atomically(self.path, blocks)
        old, self._tail = self._tail, _Tail(self.path, b"")
        old.close()
        self._tail.end = self._tail.size
