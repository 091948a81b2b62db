"""How much host memory there is left, and how an amount of it is said."""

from __future__ import annotations

import os
from pathlib import Path

_GROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "inactive_file"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "total_inactive_file",
    ),
)


def available_bytes() -> int | None:
    """Memory that can be had without swapping, of the machine and of the process's control group.

    Returns:
        None where neither says.
    """
    found = [_of_machine(), *(_of_group(*files) for files in _GROUPS)]
    known = [size for size in found if size is not None]
    return min(known, default=None)


def _of_machine() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(s.split()[1]) << 10 for s in lines if s.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return _of_free_pages()


def _of_free_pages() -> int | None:
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None


def _of_group(limit: str, usage: str, reclaimable: str) -> int | None:
    try:
        most = int(Path(limit).read_text())  # "max": no limit, and no number
        used = int(Path(usage).read_text())
        stat = Path(limit).with_name("memory.stat").read_text().split()
        cached = int(stat[stat.index(reclaimable) + 1])  # files in memory that can be dropped
    except (OSError, ValueError, IndexError):
        return None
    return max(0, most - used + cached)


def as_text(size_bytes: int) -> str:
    """An amount of memory, as people read it."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size_bytes >= size:
            return f"{size_bytes / size:.1f} {unit}"
    return f"{size_bytes} bytes"
