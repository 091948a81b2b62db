"""Starts the ranks of a test, and sees to it that none of them outlives it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def start(module: str, size: int, out: Path, *args: str) -> list[subprocess.Popen[str]]:
    """Processes that find each other through a file, on loopback."""
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-W", "error", "-m", module, str(out), str(size), *args]
    named = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TORCH_DISTRIBUTED_DEBUG": "OFF"}
    named["PYTHONFAULTHANDLER"] = "1"
    return [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **named, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def finish(ranks: list[subprocess.Popen[str]], timeout: float) -> list[tuple[str, str]]:
    """What they have said; they are ended if they have not by then."""
    try:
        return [rank.communicate(timeout=timeout) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


def results(size: int, out: Path, timeout: float) -> dict[str, list[Any]]:
    """What every check has come to on each rank: None, or what went wrong."""
    said = finish(start("tests.ranks.worker", size, out), timeout)
    found = [_result(out / f"result_{rank}.json", said[rank]) for rank in range(size)]
    names = {name for of_rank in found for name in of_rank}
    return {name: [of_rank.get(name, "not run") for of_rank in found] for name in names}


def _result(file: Path, said: tuple[str, str]) -> dict[str, Any]:
    if not file.exists():
        raise AssertionError(f"a rank has ended early: {said[1][-4000:]}")
    read: dict[str, Any] = json.loads(file.read_text())
    return read
