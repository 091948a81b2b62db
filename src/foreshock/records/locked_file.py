"""A file of lines that one writer holds, so that it may know how the file ends."""

import contextlib
import errno
import fcntl
import os
import weakref
from pathlib import Path

from foreshock.records.posix_file import make_parent_directory, sync_descriptor, sync_directory

_BLOCK_BYTES = 65_536


class LockedFile:
    """Opens a file for reading and writing, and holds a lock on it until it is closed.

    The lock (flock) goes with the process, however that ends. File systems that have no locks are
    written to without.

    Args:
        path: the file; it is created, with its parent directories, if missing.

    Raises:
        BlockingIOError: another one holds it, in this process or elsewhere.
        OSError: the file cannot be opened for writing; the error names the path.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        make_parent_directory(path)
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        # Also when it is forgotten, not closed: else nobody in this process could open it again.
        self._closing = weakref.finalize(self, _unlock_and_close, self._descriptor, os.getpid())
        self._closing.atexit = False
        try:
            self._lock()
            sync_directory(path.parent)
        except BaseException:
            self._closing()
            raise

    def read_tail(self) -> tuple[bytes | None, bytes]:
        """Reads from the end of the file.

        Returns:
            The last whole line without its line break, None if there is none; and what stands
            behind it: a line that a kill has torn, usually nothing.

        Raises:
            OSError: the file cannot be read.

        Cost: reads these two only, whatever the size of the file.
        """
        tail, position = b"", self.size()
        while position and tail.count(b"\n") < 2:
            start = max(0, position - max(_BLOCK_BYTES, len(tail)))
            tail = os.pread(self._descriptor, position - start, start) + tail
            position = start
        *lines, torn = tail.split(b"\n")
        return (lines[-1] if lines else None), torn

    def write_synced(self, data: bytes, offset: int) -> None:
        """Makes `data` the end of the file, durably.

        Args:
            data: what is to be written.
            offset: where; what stood behind the new end is cut off after the new is written.

        Raises:
            OSError: none of it, a part of it, or all of it is in the file; `cut` takes it out.

        Cost: a sync, milliseconds on a real disk.
        """
        self.write(data, offset)
        self.sync()

    def write(self, data: bytes, offset: int) -> None:
        """As `write_synced`, but what is written survives a kill of the process only.

        Cost: one system call to write, one to look at the size.
        """
        num_written = 0
        while num_written < len(data):
            num_written += os.pwrite(self._descriptor, data[num_written:], offset + num_written)
        if self.size() > offset + num_written:
            self.cut(offset + num_written)

    def sync(self) -> None:
        """Makes what was written survive a crash of the machine.

        Raises:
            OSError: the device failed.
        """
        sync_descriptor(self._descriptor)

    def cut(self, size: int) -> None:
        """Cuts off what stands behind this many bytes.

        Raises:
            OSError: the device failed.
        """
        os.ftruncate(self._descriptor, size)

    def size(self) -> int:
        """How many bytes the file has."""
        return os.fstat(self._descriptor).st_size

    def check_unchanged(self, size: int) -> None:
        """Makes sure that what is written now will be found, behind what is expected there.

        Args:
            size: in bytes, as the last write has left it.

        Raises:
            OSError: the file was removed, replaced or written to by someone else. Moved to
                another name it is still the same file.
        """
        status = os.fstat(self._descriptor)
        if status.st_nlink == 0 or status.st_size != size:
            why = "the file was removed, replaced or written to by someone else"
            raise OSError(errno.ESTALE, why, str(self._path))

    def close(self) -> None:
        """Gives up the lock and closes the file. Again is harmless."""
        self._closing()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            why = "it is being written, in this process or another; two writers would break it"
            raise BlockingIOError(error.errno, why, str(self._path)) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
                raise


def _unlock_and_close(descriptor: int, process_id: int) -> None:
    # A forked child shares the lock, and must leave it to its parent. The parent gives it up by
    # name: closing would keep it for as long as a child lives.
    if os.getpid() == process_id:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)
