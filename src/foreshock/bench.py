"""The bundled benchmarks, run on this machine by pytest-benchmark."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

_HERE = Path(__file__).parent


def folder() -> Path:
    """Where the benchmarks are: in the sources, or where installing has put a copy of them.

    Raises:
        FileNotFoundError: in neither.
    """
    places = (_HERE.parent.parent / "benchmarks", _HERE / "bundled" / "benchmarks")
    for place in places:
        if (place / "overhead.py").is_file():
            return place
    raise FileNotFoundError(f"the benchmarks are neither in {places[0]} nor in {places[1]}")


def descriptions() -> dict[str, str]:
    """The benchmarks by name, and what each is for in a line."""
    found = {}
    for path in sorted(folder().glob("*.py")):
        text = path.read_text()
        if "\ndef test_" in text:
            docstring = ast.get_docstring(ast.parse(text)) or ""
            found[path.stem] = " ".join(docstring.split("\n\n")[0].split())
    return found


def run(names: Sequence[str], out_dir: Path) -> int:
    """Runs benchmarks, and prints the tables of what they have measured.

    Every answer is asserted before it is timed, variants run in turn in one process, and the rows
    are stored with what they were measured on, in `out_dir`/results.

    Args:
        names: of `descriptions`.
        out_dir: made if it is not there.
    Returns:
        0; 1 if a benchmark has failed.
    Raises:
        ValueError: naming the name that is unknown, and those that are known.
        ModuleNotFoundError: pytest-benchmark is missing.
    """
    known = descriptions()
    for name in names:
        if name not in known:
            raise ValueError(f"no benchmark is named {name!r}; accepted: {', '.join(known)}")
    if importlib.util.find_spec("pytest_benchmark") is None:
        raise ModuleNotFoundError("pytest-benchmark is missing; install foreshock[bench]")
    results = out_dir.absolute() / "results"
    results.mkdir(parents=True, exist_ok=True)
    where = folder()
    paths = os.pathsep.join(filter(None, [str(where.parent), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"PYTHONPATH": paths, "FORESHOCK_BENCH_RESULTS": str(results)}
    files = [str(where / f"{name}.py") for name in names]
    options = ["--benchmark-only", "--benchmark-disable-gc", "-q", "-p", "no:cacheprovider"]
    devices = [] if torch.cuda.is_available() else ["-m", "not gpu"]
    done = subprocess.run([sys.executable, "-m", "pytest", *files, *options, *devices], env=env)
    subprocess.run([sys.executable, "-m", "benchmarks.tables", "--print"], env=env, check=True)
    return int(done.returncode != 0)
