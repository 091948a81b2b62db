"""Whole files that are never seen half written."""

import contextlib
import os
import secrets
import stat
from collections.abc import Iterable
from pathlib import Path

from foreshock.records.posix_file import (
    checked_path,
    make_parent_directory,
    sync_descriptor,
    sync_directory,
)


def write_atomically(path: str | os.PathLike[str], text_or_bytes: str | bytes) -> None:
    """Replaces a file in one step: a reader, or a kill, finds the old contents or the new.

    The contents go to a temporary file in the same directory, which is synced and then renamed. A
    symbolic link is followed, the permissions of an existing file are kept, missing parent
    directories are created. A kill (not an error) may leave a file `.foreshock-*.tmp` behind.

    Args:
        path: the file.
        text_or_bytes: its new contents; text is written as UTF-8, line breaks as they are.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: the path is empty, or the text cannot be written as UTF-8.
        IsADirectoryError: the path is a directory.
        OSError: the file cannot be written; the old one is untouched and no temporary file stays.

    Cost: two syncs, so milliseconds on a real disk.
    """
    contents = text_or_bytes.encode() if isinstance(text_or_bytes, str) else text_or_bytes
    if not isinstance(contents, bytes):
        raise TypeError(f"text_or_bytes must be str or bytes, not {type(contents).__name__}")
    write_blocks_atomically(path, [contents])


def write_blocks_atomically(path: str | os.PathLike[str], blocks: Iterable[bytes]) -> None:
    """As `write_atomically`, for contents that are too large to be held in memory.

    Args:
        path: the file.
        blocks: its new contents, in order; they may come out of the old file.

    Raises:
        Exception: as `write_atomically`, and whatever making the blocks raises; the old file is
            then untouched.
    """
    target = Path(os.path.realpath(checked_path(path)))
    make_parent_directory(target)
    temporary = target.parent / f".foreshock-{secrets.token_hex(8)}.tmp"
    try:
        _write_synced(temporary, blocks, permissions_like=target)
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_directory(target.parent)


def _write_synced(path: Path, blocks: Iterable[bytes], *, permissions_like: Path) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    with open(descriptor, "wb") as file:
        with contextlib.suppress(FileNotFoundError):
            os.fchmod(descriptor, stat.S_IMODE(os.stat(permissions_like).st_mode))
        file.writelines(blocks)
        file.flush()
        sync_descriptor(descriptor)
