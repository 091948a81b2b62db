"""An append-only file of lines that a kill can tear in one place only: its end."""

import os
from pathlib import Path

from foreshock.records.posix_file import make_parent_directory, sync_descriptor


class LineFile:
    """Appends whole lines, each with a single write.

    A last line without its line break (a kill, a full disk) is left as it is, and the next line
    starts on a line of its own. For one thread at a time.

    Args:
        path: the file; it is created, with its parent directories, if missing.

    Raises:
        OSError: the file cannot be opened for appending; the error names the path.
    """

    def __init__(self, path: Path) -> None:
        make_parent_directory(path)
        self._descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        self._is_torn = self._ends_inside_line()

    def append(self, line: bytes) -> None:
        """Appends one line.

        Args:
            line: without line breaks; its own is added.

        Raises:
            OSError: the line is not in the file, or only a part of it.

        Cost: one system call; no sync, so it survives a kill of the process, not of the machine.
        """
        data = b"\n" + line + b"\n" if self._is_torn else line + b"\n"
        num_written = 0
        try:
            while num_written < len(data):
                num_written += os.write(self._descriptor, data[num_written:])
        finally:
            if num_written:
                self._is_torn = data[num_written - 1 : num_written] != b"\n"

    def sync(self) -> None:
        """Makes the lines appended so far survive a crash of the machine.

        Raises:
            OSError: the device failed.
        """
        sync_descriptor(self._descriptor)

    def close(self) -> None:
        """Closes the file; to be called once."""
        os.close(self._descriptor)

    def _ends_inside_line(self) -> bool:
        size = os.fstat(self._descriptor).st_size
        return size > 0 and os.pread(self._descriptor, 1, size - 1) != b"\n"
