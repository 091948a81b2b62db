"""The build keeps instruction sets apart, and does without a compiler where there is none."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from foreshock.ops._backend import list_ops

ROOT = Path(__file__).parent.parent
CXX = os.environ.get("CXX", "c++")
CMAKE = shutil.which("cmake", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
ISA_FLAGS = {
    "baseline": (16, []),
    "avx2": (32, ["-mavx2", "-mfma"]),
    "avx512": (64, ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]),
}

needs_x86_compiler = pytest.mark.skipif(
    platform.machine() != "x86_64" or not all(map(shutil.which, (CXX, "nm", "objdump"))),
    reason="needs a C++ compiler and binutils on x86-64",
)


def compile_kernel(op: str, isa: str, folder: Path) -> Path:
    vector_bytes, flags = ISA_FLAGS[isa]
    built = folder / f"{op}_{isa}.o"
    defines = [f"-DFORESHOCK_ISA={isa}", f"-DFORESHOCK_VECTOR_BYTES={vector_bytes}"]
    source = ROOT / "csrc" / op / "cpu.cpp"
    command = [CXX, "-std=c++17", "-O3", "-fPIC", f"-I{ROOT / 'csrc'}", *defines, *flags]
    subprocess.run([*command, "-c", str(source), "-o", str(built)], check=True)
    return built


@needs_x86_compiler
@pytest.mark.parametrize("op", list_ops())
@pytest.mark.parametrize("isa", ISA_FLAGS)
def test_a_kernel_shares_no_inline_code_with_other_translation_units(
    op: str, isa: str, tmp_path: Path
) -> None:
    """Trap 33: a weak symbol could be taken by the linker from the AVX-512 object."""
    built = compile_kernel(op, isa, tmp_path)
    symbols = subprocess.run(["nm", "-C", str(built)], capture_output=True, text=True, check=True)
    weak = [s for s in symbols.stdout.splitlines() if re.match(r"[0-9a-f]+ [VWuBDGR] ", s)]
    assert weak == []
    exported = [s for s in symbols.stdout.splitlines() if re.match(r"[0-9a-f]+ T ", s)]
    assert exported
    assert all(f"foreshock::{op}::{isa}::" in s for s in exported)


@needs_x86_compiler
@pytest.mark.parametrize("op", list_ops())
def test_baseline_kernels_hold_no_wide_instructions(op: str, tmp_path: Path) -> None:
    wide = {}
    for isa in ISA_FLAGS:
        built = compile_kernel(op, isa, tmp_path)
        code = subprocess.run(["objdump", "-d", str(built)], capture_output=True, text=True).stdout
        wide[isa] = {register for register in ("ymm", "zmm") if f"%{register}" in code}
    assert wide == {"baseline": set(), "avx2": {"ymm"}, "avx512": wide["avx512"]}
    assert "zmm" in wide["avx512"]


def test_nothing_is_built_with_relaxed_floating_point() -> None:
    """Trap 8."""
    text = (ROOT / "CMakeLists.txt").read_text()
    flags = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    for flag in ("fast-math", "Ofast", "unsafe-math", "finite-math", "march=native", "ftz"):
        assert not any(flag in line for line in flags), flag


@pytest.mark.skipif(CMAKE is None, reason="needs cmake")
def test_without_a_compiler_the_package_installs_what_it_can_and_says_so(tmp_path: Path) -> None:
    env = os.environ | {"CXX": "/nowhere/c++", "CC": "/nowhere/cc"}
    done = subprocess.run(
        [str(CMAKE), "-S", str(ROOT), "-B", str(tmp_path / "build")],
        capture_output=True,
        text=True,
        env=env,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "installed without compiled kernels" in " ".join(done.stderr.split())
    there = tmp_path / "there"
    build = ["--install", str(tmp_path / "build"), "--prefix", str(there)]
    subprocess.run([str(CMAKE), *build], check=True, capture_output=True)
    bundled = {path.name for path in (there / "foreshock/bundled/benchmarks").iterdir()}
    assert {"overhead.py", "rows.py", "probe.cpp"} <= bundled
    assert "results" not in bundled
