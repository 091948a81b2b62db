"""Reads the machine code of CUDA kernels."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest


def _run(option: str, compiled: Path) -> str:
    triton = importlib.util.find_spec("triton")
    bundled = (
        Path(triton.origin).parent / "backends/nvidia/bin" if triton and triton.origin else None
    )
    cuobjdump = shutil.which("cuobjdump") or (bundled and shutil.which("cuobjdump", path=bundled))
    if cuobjdump is None:
        pytest.skip("cuobjdump is not installed")
    done = subprocess.run([cuobjdump, option, compiled], capture_output=True, text=True, check=True)
    return done.stdout


def disassemble(compiled: Path) -> list[str]:
    """Of an object file: the code of each kernel for each architecture, its name first."""
    return _run("-sass", compiled).split("Function :")[1:]


def resources(compiled: Path) -> list[tuple[str, dict[str, int]]]:
    """Name, and REG, STACK, SHARED and so on, of each kernel for each architecture."""
    found = re.findall(r"Function (\S+):\s+(REG:.*)", _run("-res-usage", compiled))
    return [
        (name, {key: int(n) for key, n in re.findall(r"(\w+):(\d+)", numbers)})
        for name, numbers in found
    ]
