"""Triton without a GPU: whether it interprets or compiles is settled at its import, so each of the
two happens in a process of its own, which runs the test module that asks for it."""

from __future__ import annotations

import concurrent.futures
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# Triton 3.6 interprets no loop with the NumPy that came after it.
OLD_INTERPRETER = "only 0-dimensional arrays can be converted to Python scalars"


def results_of(module: str, folder: Path) -> Iterator[Callable[[str], Any]]:
    """For a fixture: gives results of the module's tasks `interpret` and `compile_kernels`."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "FORESHOCK_"))}

    def run(task: str) -> Any:
        is_interpreted = "1" if task == "interpret" else "0"
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", module, task, str(folder / task)],
            env=kept
            | {"TRITON_INTERPRET": is_interpreted, "TRITON_CACHE_DIR": str(folder / "cache")}
            | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return torch.load(folder / task, weights_only=True)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        runs = {task: pool.submit(run, task) for task in ("interpret", "compile_kernels")}
        yield lambda task: runs[task].result()


def save_result(*tasks: Callable[[], Any]) -> None:
    """Of a module run as such a process: runs the task that was asked for."""
    named = {task.__name__: task for task in tasks}
    torch.save(named[sys.argv[1]](), sys.argv[2])
