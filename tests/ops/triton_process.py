"""Triton where there is no GPU.

Whether it interprets or compiles is settled at its import, so a test module runs itself as a
process for either: its functions `interpret` and `compile_kernels`.
"""

from __future__ import annotations

import concurrent.futures
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

CAPABILITIES = (80, 90)

# Triton 3.6 interprets no loop with the NumPy that came after it.
OLD_INTERPRETER = "only 0-dimensional arrays can be converted to Python scalars"


def results_of(module: str, folder: Path) -> Iterator[Callable[[str], Any]]:
    """Starts a module's tasks, and yields a call that waits for one's result."""
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


def main(tasks: Mapping[str, Callable[[], Any]]) -> None:
    """What a test module does when it is run as a process."""
    torch.save(tasks[sys.argv[1]](), sys.argv[2])


def interpreted(found: Any) -> Any:
    """A result of the interpreter, or the end of the test: with its traceback, or by a skip."""
    if isinstance(found, str) and OLD_INTERPRETER in found:
        pytest.skip("this Triton's interpreter is too old for this NumPy")
    assert not isinstance(found, str), found
    return found


def compile_all(sources: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Of every source and architecture: machine code, shared memory and PTX."""
    import triton
    from triton.backends.compiler import GPUTarget

    found: dict[str, Any] = {}
    for capability in CAPABILITIES:
        for name, source in sources.items():
            target = GPUTarget("cuda", capability, 32)
            kernel = triton.compile(source, target=target, options=dict(options))
            found[f"sm{capability}-{name}"] = {
                "cubin": kernel.asm["cubin"][:4],
                "shared_bytes": kernel.metadata.shared,
                "ptx": kernel.asm["ptx"],
            }
    return found
