"""Stored results: a JSON object a line, one for each benchmark, case, variant and machine."""

from __future__ import annotations

import functools
import json
import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from foreshock.ops._backend import active_isa

RESULTS = Path(os.environ.get("FORESHOCK_BENCH_RESULTS") or Path(__file__).parent / "results")
_SOURCES = Path(__file__).parent.parent
_KEY = ("benchmark", "case", "variant", "machine")


def _git(*arguments: str) -> str:
    if not (_SOURCES / ".git").exists():
        return ""  # installed: a repository further up is somebody else's
    done = subprocess.run(
        ["git", *arguments], cwd=_SOURCES, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


@functools.cache
def circumstances(device: str) -> dict[str, Any]:
    """What a number was measured on, and with what."""
    is_gpu = device == "cuda"
    return {
        "machine": torch.cuda.get_device_name() if is_gpu else _cpu_name(),
        "device": device,
        "isa": active_isa(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "git": _git("rev-parse", "--short=12", "HEAD") or f"of version {version('foreshock')}",
        "is_dirty": bool(_git("status", "--porcelain", "--untracked-files=no", "--", ":!*.jsonl")),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def load(benchmark: str) -> list[dict[str, Any]]:
    """The stored rows of a benchmark."""
    path = RESULTS / f"{benchmark}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def store(benchmark: str, case: str, device: str, rows: dict[str, dict[str, Any]]) -> None:
    """Stores a case's rows, by variant, in the place of older ones from the same machine."""
    new = [
        {"benchmark": benchmark, "case": case, "variant": v, **row, **circumstances(device)}
        for v, row in rows.items()
    ]
    machine = circumstances(device)["machine"]
    kept = [r for r in load(benchmark) if (r["case"], r["machine"]) != (case, machine)]
    RESULTS.mkdir(exist_ok=True)
    lines = [json.dumps(row) for row in sorted(kept + new, key=lambda r: [r[k] for k in _KEY[:2]])]
    (RESULTS / f"{benchmark}.jsonl").write_text("\n".join(lines) + "\n")
