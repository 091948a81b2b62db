"""Running a few lines in a Python of their own, which a test may kill, fork or starve."""

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import foreshock.records

# The package's own __init__ may import torch, which takes seconds and is no part of this room.
_PRELUDE = f"""
import sys, types
package = types.ModuleType("foreshock")
package.__path__ = [{str(Path(foreshock.records.__file__).parents[1])!r}]
sys.modules["foreshock"] = package
"""

StartPython = Callable[..., "contextlib.AbstractContextManager[subprocess.Popen[str]]"]
RunPython = Callable[..., str]


@pytest.fixture
def start_python() -> StartPython:
    """Starts a script with arguments, its output on pipes, and kills it in the end."""

    @contextlib.contextmanager
    def start(script: str, *arguments: object) -> Iterator["subprocess.Popen[str]"]:
        command = [sys.executable, "-c", _PRELUDE + script, *map(str, arguments)]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
            try:
                yield process
            finally:
                process.kill()

    return start


@pytest.fixture
def run_python(start_python: StartPython) -> RunPython:
    """Runs a script with arguments to its end, which must come soon and be clean."""

    def run(script: str, *arguments: object) -> str:
        with start_python(script, *arguments) as process:
            output, errors = process.communicate(timeout=20)
        assert process.returncode == 0, errors
        return output

    return run
