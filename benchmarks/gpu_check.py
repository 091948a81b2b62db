"""Everything that needs a GPU, in one command: builds, tests, measures. `make gpu-check`.

Uses the torch and triton that the interpreter has, and no network. Python packages that are missing
are taken from a folder of wheels, if $FORESHOCK_WHEELS names one. The rows go to benchmarks/results
and, if $OUT names a folder, are copied there too.

Exit code 0: all passed; 1: something failed; 2: there is no GPU, or something to build with is
missing.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build" / "gpu-check"
SITE = BUILD / "site"
LIMIT_S = 8 * 60
NEEDED = {
    "torch": "torch",
    "triton": "triton",
    "numpy": "numpy",
    "pydantic": "pydantic",
    "typer": "typer",
    "rich": "rich",
    "xxhash": "xxhash",
    "safetensors": "safetensors",
    "sklearn": "scikit-learn",
    "scipy": "scipy",
    "PIL": "pillow",
    "matplotlib": "matplotlib",
    "pytest": "pytest",
    "pytest_benchmark": "pytest-benchmark",
    "xdist": "pytest-xdist",
    "hypothesis": "hypothesis",
    "expecttest": "expecttest",
    "scikit_build_core": "scikit-build-core",
    "pybind11": "pybind11",
}


class Unfit(Exception):
    """This machine cannot run the check."""


def run(what: str, command: list[str], began: float, **env: str) -> bool:
    """Runs one stage within what is left of the time, and says how it went."""
    left = LIMIT_S - (time.monotonic() - began)
    print(f"\n== {what} ({left:.0f} s left)", flush=True)
    paths = os.pathsep.join([str(SITE), str(ROOT), os.environ.get("PYTHONPATH", "")])
    try:
        done = subprocess.run(
            command,
            cwd=BUILD,
            env=os.environ | {"PYTHONPATH": paths} | env,
            timeout=max(1, left),
            check=False,
        )
    except subprocess.TimeoutExpired:
        print(f"== {what}: stopped, the {LIMIT_S // 60} minutes are over")
        return False
    print(f"== {what}: {'passed' if done.returncode == 0 else f'exit code {done.returncode}'}")
    return done.returncode == 0


def check_machine() -> None:
    """Raises Unfit with what is missing."""
    missing = [pip for name, pip in NEEDED.items() if importlib.util.find_spec(name) is None]
    if "torch" in missing:
        raise Unfit("torch is not installed for this Python")
    import torch

    if not torch.cuda.is_available():
        raise Unfit("there is no CUDA GPU here (torch.cuda.is_available() is false)")
    if shutil.which("nvcc") is None:
        raise Unfit("nvcc is not on the PATH")
    wheels = os.environ.get("FORESHOCK_WHEELS")
    if missing and not wheels:
        raise Unfit(
            f"missing Python packages: {', '.join(missing)}; FORESHOCK_WHEELS can bring them"
        )


def install(began: float) -> bool:
    """The package with its CUDA kernels, and what travels as wheels, into a folder of its own."""
    shutil.rmtree(SITE, ignore_errors=True)
    SITE.mkdir(parents=True)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
    pip += ["--no-compile", "--target", str(SITE), "--upgrade"]
    wheels = (
        sorted(Path(os.environ["FORESHOCK_WHEELS"]).resolve().glob("*.whl"))
        if ("FORESHOCK_WHEELS" in os.environ)
        else []
    )
    if wheels and not run("wheels", [*pip, *map(str, wheels)], began):
        return False
    build = ["--no-build-isolation", f"--config-settings=build-dir={BUILD}/cmake", str(ROOT)]
    return run("build", [*pip, *build], began, FORESHOCK_CUDA="ON")


def skipped_gpu_tests(report: Path) -> list[str]:
    """Tests that were skipped although the GPU is there."""
    skipped = []
    for case in ET.parse(report).iter("testcase"):
        reason = case.find("skipped")
        if reason is not None:
            skipped.append(f"{case.get('classname')}.{case.get('name')}: {reason.get('message')}")
    return skipped


def main() -> int:
    began = time.monotonic()
    try:
        check_machine()
    except Unfit as unfit:
        print(f"gpu-check cannot run: {unfit}")
        return 2
    if not install(began):
        return 1
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "--maxfail=20"]
    settings = [f"--rootdir={ROOT}", f"--config-file={ROOT / 'pyproject.toml'}"]
    strict = {"FORESHOCK_STRICT": "1", "FORESHOCK_REQUIRE_GPU": "1"}
    report = BUILD / "tests.xml"
    gpu_first = [*pytest, *settings, f"--junitxml={report}", "-m", "gpu", str(ROOT / "tests")]
    results = [run("tests on the GPU", gpu_first, began, **strict)]
    skipped = skipped_gpu_tests(report) if report.exists() else ["no report"]
    if skipped:
        print("== skipped although there is a GPU:", *skipped, sep="\n   ")
        results.append(False)
    measured = ("health_scan", "power_iteration", "rolling_zscore", "soft_assign", "overhead")
    names = [str(ROOT / "benchmarks" / f"{name}.py") for name in measured]
    bench = [*pytest, *settings, "--benchmark-only", "-W", "default", "-m", "gpu", *names]
    results.append(run("benchmarks", bench, began, **strict))
    rest = [*pytest, *settings, "-n", "8", "-m", "not gpu", str(ROOT / "tests")]
    results.append(run("all other tests", rest, began, FORESHOCK_STRICT="1"))
    results.append(run("tables", [sys.executable, "-m", "benchmarks.tables"], began))
    if "OUT" in os.environ:
        for row in (ROOT / "benchmarks" / "results").glob("*.jsonl"):
            shutil.copy(row, os.environ["OUT"])
    print(f"\ngpu-check: {'all passed' if all(results) else 'FAILED'}")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
