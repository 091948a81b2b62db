"""Follows a run until it ends, or until nobody wants to see more."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.live import Live

from foreshock.records import read_summary
from foreshock.records.telemetry_schema import START_EVENT, TELEMETRY_EVENT
from foreshock.watch import view
from foreshock.watch.progress import Progress, printable, told
from foreshock.watch.sparkline import ASCII_BLOCKS, BLOCKS
from foreshock.watch.telemetry_tail import TelemetryTail


def watch_run(
    run_dir: str | os.PathLike[str],
    console: Console | None = None,
    *,
    once: bool = False,
    interval_s: float = 1.0,
) -> bool:
    """Shows a run as it goes on: in a terminal a table that is drawn anew, else plain lines.

    Args:
        run_dir: the run's directory; its files may not be there yet.
        console: where to; default: standard output.
        once: show how the run stands now, and return.
        interval_s: seconds between looks at the files.

    Returns:
        Whether anything is known of the run.

    Raises:
        ValueError: run_dir is no directory.
        OSError: a file is there and cannot be read.
        KeyboardInterrupt: Ctrl-C; the terminal is in order.

    Cost: reads what is new; memory does not grow with the run.
    """
    path = Path(run_dir)
    if not path.is_dir():
        what = "a file" if path.exists() else "not there"
        raise ValueError(f"RUN is {str(path)!r}, which is {what}; accepted: a run's directory")
    console = console or Console()
    followed = _Followed(path)
    if once:
        followed.catch_up()
        _show_once(console, followed)
    elif console.is_terminal:
        _follow_in_place(console, followed, interval_s)
    else:
        _follow_in_lines(console, followed, interval_s)
    return followed.progress.last_moment is not None or followed.summary is not None


class _Look(NamedTuple):
    records: list[dict[str, Any]]
    has_more: bool
    has_ended: bool


class _Followed:
    """A run, and what has been read of it."""

    def __init__(self, path: Path) -> None:
        self.name = path.resolve().name
        self.progress = Progress()
        self.summary: dict[str, Any] | None = None
        self._telemetry = path / "telemetry.jsonl"
        self._summary = path / "summary.json"
        self._tail = TelemetryTail(self._telemetry)

    def look(self) -> _Look:
        """Reads on."""
        # In this order: records behind the summary mean that the run has gone on.
        summary = self._read_summary()
        restarts = self._tail.restarts
        records, has_more = self._tail.read()
        if self._tail.restarts > restarts:
            self.progress = Progress()
        for record in records:
            self.progress.add(record)
        self.summary = None if has_more else summary
        return _Look(records, has_more, self.summary is not None)

    def catch_up(self) -> _Look:
        """Reads all that is there; returns the last look."""
        while (look := self.look()).has_more:
            pass
        return look

    def _read_summary(self) -> dict[str, Any] | None:
        """The summary, if it was written after the last record: a resumed run has an old one."""
        try:
            written = self._summary.stat().st_mtime_ns
            if self._telemetry.exists() and self._telemetry.stat().st_mtime_ns > written:
                return None
            return read_summary(self._summary)
        except (FileNotFoundError, ValueError):
            return None

    @property
    def state(self) -> str:
        return view.state(self.progress, self.summary)


def _show_once(console: Console, followed: _Followed) -> None:
    if console.is_terminal:
        console.print(_table(console, followed))
    else:
        _print_all(console, followed)


def _follow_in_place(console: Console, followed: _Followed, interval_s: float) -> None:
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        while True:
            look = followed.look()
            live.update(_table(console, followed), refresh=True)
            if look.has_ended:
                return
            if not look.has_more:
                time.sleep(interval_s)


def _follow_in_lines(console: Console, followed: _Followed, interval_s: float) -> None:
    look = followed.catch_up()
    _print_all(console, followed)
    while not look.has_ended:
        time.sleep(interval_s)
        look = followed.look()
        happened = [r for r in look.records if r.get("event") not in (START_EVENT, TELEMETRY_EVENT)]
        for record in happened:
            _print_line(console, told(record))
        if len(happened) < len(look.records):
            _print_line(console, view.line(followed.progress))
        if look.has_ended:
            _print_line(console, f"{followed.name}: {followed.state}")


def _print_all(console: Console, followed: _Followed) -> None:
    _print_line(console, f"{followed.name}: {followed.state}")
    for event in followed.progress.last_events:
        _print_line(console, event)
    if followed.progress.latest:
        _print_line(console, view.line(followed.progress))


def _print_line(console: Console, text: str) -> None:
    console.print(printable(text), markup=False, highlight=False, soft_wrap=True)
    console.file.flush()


def _table(console: Console, followed: _Followed) -> Any:
    blocks = BLOCKS if console.encoding.startswith("utf") else ASCII_BLOCKS
    return view.table(
        followed.name, followed.state, followed.progress, width=console.width, blocks=blocks
    )
