"""A file that is written piece by piece."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from foreshock.records.posix_file import sync_descriptor, sync_directory

_WRITE_BYTES = 8 << 20


class Incoming:
    """A file that comes piece by piece, and is there when it is finished or not at all.

    Args:
        path: replaced if it exists.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
        self._descriptor: int | None = None
        self._size = 0
        self._error: OSError | None = None

    def take(self, piece: memoryview) -> None:
        """Writes it; after an error, which `finish` raises, it is passed over."""
        if self._error is not None:
            return
        try:
            if self._descriptor is None:
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
                self._descriptor = os.open(self._temporary, flags, 0o666)
            _write_all(self._descriptor, piece)
            self._size += len(piece)
        except OSError as error:
            self._error = error

    def finish(self) -> int:
        """Gives the file its name.

        Returns:
            Its size in bytes.
        Raises:
            OSError: it could not be written.
        """
        try:
            if self._error is not None:
                raise self._error
            if self._descriptor is not None:
                sync_descriptor(self._descriptor)
            self._close()
            os.replace(self._temporary, self._path)
        except BaseException:
            self.drop()
            raise
        sync_directory(self._path.parent)
        return self._size

    def drop(self) -> None:
        """Leaves nothing of it behind."""
        self._close()
        self._temporary.unlink(missing_ok=True)

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


def _write_all(descriptor: int, page: memoryview) -> None:
    begin = 0
    while begin < len(page):
        begin += os.write(descriptor, page[begin : begin + _WRITE_BYTES])
