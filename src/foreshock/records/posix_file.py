"""What opening and syncing takes for every kind of file here."""

import errno
import os
from pathlib import Path


def checked_path(path: str | os.PathLike[str]) -> Path:
    """Turns the argument `path` of a public function into a path of a file.

    Args:
        path: where a file is to be written or read.

    Returns:
        The path.

    Raises:
        TypeError: it is no path.
        ValueError: it is empty.
        IsADirectoryError: it is a directory.
    """
    if not isinstance(path, str | os.PathLike) or isinstance(os.fspath(path), bytes):
        raise TypeError(f"path must be str or os.PathLike[str], not {type(path).__name__}")
    if not os.fspath(path):
        raise ValueError("path must name a file, it is empty")
    file = Path(path)
    if file.is_dir():
        raise IsADirectoryError(errno.EISDIR, "path must name a file, it is a directory", str(file))
    return file


def make_parent_directory(path: Path) -> None:
    """Creates the directories above a file that is to be written, where they are missing.

    Args:
        path: the file.

    Raises:
        OSError: a directory cannot be created; the error names it.
    """
    # A parent that is a file is left for open() to report: its error names the whole path.
    if not path.parent.exists():
        path.parent.mkdir(parents=True, exist_ok=True)


def sync_descriptor(descriptor: int) -> None:
    """Makes what was written durable, where the file is of a kind that can be.

    Args:
        descriptor: an open file descriptor.

    Raises:
        OSError: the device failed.
    """
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Pipes, devices and the directories of some network file systems have nothing to sync.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EROFS):
            raise


def sync_directory(directory: Path) -> None:
    """Makes the names in a directory durable: new files, and those renamed.

    Args:
        directory: what holds them.

    Raises:
        OSError: the device failed.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        sync_descriptor(descriptor)
    finally:
        os.close(descriptor)
