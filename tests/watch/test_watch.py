"""`foreshock watch` follows a run while another process writes it."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from foreshock.records import TelemetryWriter
from foreshock.watch import watch_run
from foreshock.watch.progress import Progress
from foreshock.watch.sparkline import sparkline
from foreshock.watch.telemetry_tail import TelemetryTail
from tests.report.runs import HOSTILE, write_run

WRITER = """
import sys, time
from foreshock.records import TelemetryWriter, write_summary
with TelemetryWriter(sys.argv[1] + "/telemetry.jsonl") as writer:
    for step in range(12):
        writer.write("telemetry", step, train_loss=3.0 - step / 10, grad_norm=1.0, overhead_ms=0.25)
        if step == 6:
            writer.write("update_skipped", step, reasons=["LOSS_SPIKE"], offender=None)
        writer.flush(5)
        time.sleep(0.05)
summary = {"total_steps": 12, "guard": {"integrity_status": "OK"}}
write_summary(sys.argv[1] + "/summary.json", summary)
"""


def shown(path: Path, *, once: bool = True, terminal: bool = False, width: int = 100) -> str:
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=width, color_system=None)
    watch_run(path, console, once=once, interval_s=0.02)
    return file.getvalue()


def record(step: int, **more: object) -> str:
    fields = "".join(f', "{name}": {value}' for name, value in more.items())
    return f'{{"event": "telemetry", "step": {step}{fields}}}\n'


@pytest.mark.parametrize("terminal", [False, True], ids=["pipe", "terminal"])
def test_a_run_is_followed_from_before_its_first_line_to_its_end(
    tmp_path: Path, terminal: bool
) -> None:
    with subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)]) as writer:
        said = shown(tmp_path, once=False, terminal=terminal)
        assert writer.wait(10) == 0
    assert "waiting for telemetry.jsonl" in said
    assert "running, last record" in said or not terminal
    assert "step 6: update withheld: LOSS_SPIKE" in said
    assert "ended after 12 steps, OK" in said
    assert "0.25 ms a step" in said
    assert "steps/s" in said
    if not terminal:
        assert said.count("update withheld") == 1
        steps = [
            line.split()[1]
            for line in said.splitlines()
            if line.startswith("step ") and "loss" in line
        ]
        assert len(steps) >= 3
        assert steps[-1] == "11"


def test_once_shows_an_ended_run_in_a_terminal_and_in_a_pipe(tmp_path: Path) -> None:
    run = write_run(tmp_path / "first")
    plain = shown(run)
    assert plain.startswith("first: ended after 40 steps, RECOVERED\n")
    assert "\nstep 20: rolled back to step 15" in plain
    assert "\nstep 39  loss 0.66" in plain
    assert "\x1b" not in plain
    drawn = shown(run, terminal=True)
    assert "█" in drawn
    assert "events" in drawn


@pytest.mark.parametrize("width", [20, 40, 200])
def test_no_line_is_wider_than_the_terminal(tmp_path: Path, width: int) -> None:
    said = shown(write_run(tmp_path), terminal=True, width=width)
    assert max(map(len, said.splitlines())) <= width


def test_what_a_name_holds_does_not_reach_the_terminal_as_a_command(tmp_path: Path) -> None:
    run = write_run(tmp_path, name="\x1b[2J\x9b31m[bold]" + HOSTILE)
    for terminal in (False, True):
        said = shown(run, terminal=terminal, width=400)
        assert "\x1b[2J" not in said
        assert "\x9b" not in said
        assert "?[2J?31m[bold]</script>" in said


def test_a_resumed_run_has_not_ended(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    later = time.time() + 5
    with TelemetryWriter(run / "telemetry.jsonl") as writer:
        writer.write("telemetry", 40, train_loss=1.0)
    os.utime(run / "telemetry.jsonl", (later, later))
    assert "running" in shown(run)


def test_a_directory_without_files_is_waited_for_and_no_directory_is_refused(
    tmp_path: Path,
) -> None:
    assert "waiting for telemetry.jsonl" in shown(tmp_path)
    assert watch_run(tmp_path, Console(file=io.StringIO()), once=True) is False
    with pytest.raises(ValueError, match="nowhere', which is not there; accepted: a run's dir"):
        watch_run(tmp_path / "nowhere")


def test_ctrl_c_leaves_the_terminal_in_order(tmp_path: Path) -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            watch_run(tmp_path, console, interval_s=0.05)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert file.getvalue().rstrip().endswith("\x1b[?25h")  # the cursor is shown again


# ---- the tail of a file


def write_in_two(path: Path, tail: TelemetryTail) -> list[int]:
    whole = record(1) + record(2)
    path.write_text(whole[:30])
    first, _ = tail.read()
    with path.open("a") as file:
        file.write(whole[30:])
    return [r["step"] for r in (first + tail.read()[0])]


def replace_by_another(path: Path, tail: TelemetryTail) -> list[int]:
    path.write_text(record(1))
    first, _ = tail.read()
    other = path.with_name("other")
    other.write_text(record(2))
    other.replace(path)
    return [r["step"] for r in (first + tail.read()[0])]


def cut(path: Path, tail: TelemetryTail) -> list[int]:
    path.write_text(record(1) * 3)
    first, _ = tail.read()
    path.write_text(record(2))
    return [r["step"] for r in (first[:1] + tail.read()[0])]


@pytest.mark.parametrize("grow", [write_in_two, replace_by_another, cut])
def test_a_tail_reads_on_whatever_becomes_of_the_file(
    tmp_path: Path, grow: Callable[[Path, TelemetryTail], list[int]]
) -> None:
    tail = TelemetryTail(tmp_path / "telemetry.jsonl")
    assert tail.read() == ([], False)
    assert grow(tmp_path / "telemetry.jsonl", tail) == [1, 2]
    assert tail.torn_lines == 0


def test_a_tail_counts_torn_lines_and_reads_a_large_file_in_parts(tmp_path: Path) -> None:
    path = tmp_path / "telemetry.jsonl"
    path.write_text('{"event": "tel\n' + record(1, train_loss=0.125) * 30_000)
    tail, records, looks = TelemetryTail(path), 0, 0
    has_more = True
    while has_more:
        found, has_more = tail.read()
        records, looks = records + len(found), looks + 1
    assert (records, tail.torn_lines) == (30_000, 1)
    assert looks > 1


# ---- numbers


def test_the_speed_is_that_of_the_last_records_and_going_back_is_no_speed() -> None:
    progress = Progress()
    for second, step in [(0, 0), (1, 10), (2, 5), (3, 15), (4, 25)]:
        time = f"2026-01-01T00:00:{second:02d}.000Z"
        progress.add({"event": "telemetry", "step": step, "time": time})
    assert progress.steps_per_second == pytest.approx(30 / 4)


def test_a_sparkline_goes_from_the_lowest_to_the_highest() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 20) == "▁▂▃▄▅▆▇█"
    assert sparkline([5, 5], 20) == "▁▁"
    assert sparkline([0, float("nan"), 7], 20) == "▁x█"
    assert sparkline([float("nan")], 20) == "x"
    assert sparkline([], 20) == ""
    assert sparkline([0.0] * 50 + [1.0] * 50, 4, "_#") == "__##"
    assert sparkline([1e308, 1e308, 1e308, 0.0], 2) == "█▁"
