"""health_scan in Triton and CUDA C++.

Triton runs in its interpreter, and everything is compiled for the devices that it may meet; on a
device it is test_health_scan_on_gpu.py that runs both. Run as a module, this file is the process in
which Triton interprets or compiles: which of them it does is settled at its import.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foreshock.ops import _device
from foreshock.ops._tensors import FLOATING_DTYPES
from foreshock.ops.health_scan import cuda, device_table
from foreshock.ops.health_scan.device_table import DeviceTable, coalesce
from tests.interpreter import NO_EXTENSION, NO_TRITON, run_python
from tests.ops.cuobjdump import disassemble
from tests.ops.health_scan_cases import (
    CASES,
    CPU,
    DTYPES,
    SUM_TOLERANCE,
    assert_agrees,
    case,
    scan,
)
from tests.ops.triton_process import CAPABILITIES, compile_all, interpreted, main, results_of

# One process has what Triton makes, once.
pytestmark = pytest.mark.xdist_group("health_scan in Triton")

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"

COLUMNS_OF_CHUNKS = ["CHUNK_NUMEL", "FIRST_CHUNK", "IS_STRIDED"]


@st.composite
def strided_views(draw: st.DrawFn) -> Tensor:
    """Slices, permutations and expansions of a small dense tensor that holds 0, 1, 2, ..."""
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    x = torch.arange(torch.Size(shape).numel(), dtype=torch.float64).view(shape)
    for d in range(x.dim()):
        start, step = draw(st.sampled_from([(0, 1), (0, 2), (1, 1), (1, 3)]))
        x = x[(slice(None),) * d + (slice(start, None, step),)]
    x = x.permute(draw(st.permutations(range(x.dim()))))
    return x.unsqueeze(0).expand(3, *x.shape) if draw(st.booleans()) else x


def elements_reached(dims: list[tuple[int, int]]) -> list[int]:
    places = [0]
    for size, stride in dims:
        places = [place + i * stride for place in places for i in range(size)]
    return sorted(places)


@given(strided_views())
def test_coalescing_reaches_the_same_elements(x: Tensor) -> None:
    dims = coalesce(x.shape, x.stride())
    offset = x.storage_offset()
    if x.numel():
        assert elements_reached(dims) == sorted(int(v) - offset for v in x.flatten().tolist())
    if x.is_contiguous() and x.numel() > 1:
        assert dims == [(x.numel(), 1)]


@settings(deadline=None)
@given(st.lists(st.one_of(st.none(), strided_views()), min_size=1, max_size=8), st.data())
def test_the_table_names_every_element_once(
    tensors: list[Tensor | None], data: st.DataObject
) -> None:
    dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16])
    tensors = [t if t is None or t.numel() % 2 else t.to(data.draw(dtypes)) for t in tensors]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_table, "CHUNK_BYTES", 64)
        patch.setattr(device_table, "LARGE_BYTES", 200)
        patch.setattr(device_table, "LARGE_CHUNK_BYTES", 128)
        table = DeviceTable(tensors, CPU)
    rows, owners = table.rows.tolist(), table.owners.tolist()
    assert len(rows) == len(tensors)
    assert not table.tickets.any()
    dealt = []
    for t, (tensor, row) in enumerate(zip(tensors, rows, strict=True)):
        address, numel, dtype, chunk_numel, first, is_strided = row[: device_table.SIZES]
        assert numel == (0 if tensor is None else tensor.numel())
        chunks = max(1, -(-numel // chunk_numel))
        assert owners[first : first + chunks] == [t] * chunks
        dealt.append(chunks)
        if tensor is None or numel == 0:
            continue
        assert FLOATING_DTYPES[dtype] is tensor.dtype
        assert chunk_numel * tensor.element_size() == (128 if tensor.nbytes > 200 else 64)
        kind = next(k for k in table.kinds if 0 <= first - k.first_chunk < k.chunk_count)
        assert (kind.dtype, kind.is_strided) == (tensor.dtype, bool(is_strided))
        if any(source.data_ptr() == tensor.data_ptr() for _, source in table.copies):
            continue
        sizes, strides = row[device_table.SIZES : device_table.STRIDES], row[device_table.STRIDES :]
        dims = list(zip(sizes, strides, strict=True)) if is_strided else [(numel, 1)]
        assert address == tensor.data_ptr()
        assert elements_reached(dims) == elements_reached(coalesce(tensor.shape, tensor.stride()))
    assert sum(dealt) == len(owners)
    assert sum(k.chunk_count for k in table.kinds) == len(owners) - sum(row[1] == 0 for row in rows)


def test_the_kernels_read_the_table_as_it_is_written() -> None:
    source = (CSRC / "health_scan" / "cuda.cu").read_text()
    struct = source.split("struct Source {")[1].split("};")[0]
    fields = re.findall(r"(\w+)(?:\[kMaxDims\])?;", struct)
    assert [name.upper() for name in fields[1:6]] == ["NUMEL", "DTYPE", *COLUMNS_OF_CHUNKS]
    assert fields[0] == "data"
    assert fields[6:] == ["sizes", "strides"]
    columns = ["ADDRESS", "NUMEL", "DTYPE", *COLUMNS_OF_CHUNKS, "SIZES"]
    assert [getattr(device_table, name) for name in columns] == list(range(7))
    assert f"kMaxDims = {device_table.MAX_DIMS};" in source


# Triton without a GPU.


def interpret() -> dict[str, Any]:
    from foreshock.ops.health_scan import triton

    assert triton.why_unavailable("cpu") is None

    def attempt(name: str) -> Tensor | str:
        try:
            return scan(triton.bind, case(name, CPU))
        except Exception:
            return traceback.format_exc()

    return {name: attempt(name) for name in [*CASES, "mixed"]} | {"rows": add_rows()}


def add_rows() -> tuple[Tensor, Tensor] | str:
    """Rows of chunks, more than there are threads, and what the tensor kernel makes of them."""
    from foreshock.ops.health_scan import triton

    chunks = [700, 256, 1]
    chunk_numel = device_table.CHUNK_BYTES // 4
    # Nothing is read: the memory is one element, repeated.
    tensors = [torch.zeros(1).as_strided((count * chunk_numel,), (0,)) for count in chunks]
    table = DeviceTable(tensors, CPU)
    partial = torch.randint(1 << 40, (sum(chunks), 5))
    partial[:, 2:] = torch.rand(sum(chunks), 3, dtype=torch.float64).view(torch.int64)
    packed = torch.empty(len(chunks), 6, dtype=torch.int64)
    try:
        triton._health_scan_tensor_kernel[(len(chunks),)](table.rows, partial, packed)
    except Exception:
        return traceback.format_exc()
    return partial, packed


def compile_kernels() -> dict[str, Any]:
    """Of every kernel, dtype and architecture: machine code, shared memory and PTX."""
    from triton.compiler import ASTSource

    from foreshock.ops.health_scan import triton as ours

    pointers = {"table_ptr": "*i64", "owners_ptr": "*i32", "partial_ptr": "*i64"}
    sources = {
        "tensor": ASTSource(
            ours._health_scan_tensor_kernel,
            {"table_ptr": "*i64", "partial_ptr": "*i64", "packed_ptr": "*i64"},
        )
    }
    for name, dtype in DTYPES.items():
        for is_strided in (False, True):
            constants = {"F": ours.FORMATS[dtype], "IS_STRIDED": is_strided}
            signature = pointers | {"first_chunk": "i32"} | dict.fromkeys(constants, "constexpr")
            sources[f"chunk-{name}-{'strided' if is_strided else 'dense'}"] = ASTSource(
                ours._health_scan_chunk_kernel, signature, constants
            )
    return compile_all(sources, ours.OPTIONS)


COMPILED = [
    f"sm{capability}-{kernel}"
    for capability in CAPABILITIES
    for kernel in [
        "tensor",
        *(f"chunk-{d}-{kind}" for d in DTYPES for kind in ("dense", "strided")),
    ]
]


@pytest.fixture(scope="module")
def triton_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Any]]:
    yield from results_of(__name__, tmp_path_factory.mktemp("triton"))


@pytest.mark.parametrize("name", [*CASES, "mixed"])
def test_triton_agrees_with_the_reference(triton_process: Callable[[str], Any], name: str) -> None:
    assert_agrees(interpreted(triton_process("interpret")[name]), case(name, CPU))


def test_triton_adds_up_more_chunks_than_it_has_threads(
    triton_process: Callable[[str], Any],
) -> None:
    partial, packed = interpreted(triton_process("interpret")["rows"])
    for rows, row in zip(partial.split([700, 256, 1]), packed, strict=True):
        sums = rows.view(torch.float64)
        assert row[1:3].tolist() == rows[:, :2].sum(0).tolist()
        assert row.view(torch.float64)[3] == sums[:, 2].max()
        torch.testing.assert_close(
            row.view(torch.float64)[4:], sums[:, 3:].sum(0), rtol=SUM_TOLERANCE, atol=0
        )


@pytest.mark.parametrize("name", COMPILED)
def test_triton_compiles_ahead_of_time(triton_process: Callable[[str], Any], name: str) -> None:
    kernel = triton_process("compile_kernels")[name]
    assert kernel["cubin"] == b"\x7fELF"
    assert kernel["shared_bytes"] <= 48 << 10  # what every device grants without being asked
    assert ".ftz" not in kernel["ptx"], "denormals would be flushed"
    if name.endswith("dense"):
        assert re.search(r"ld\.global\.v(4\.b32|2\.b64)", kernel["ptx"]), "no 16-byte load"


# CUDA C++ without a GPU.


@pytest.fixture(scope="module")
def compiled_cuda(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """ptxas' report on cuda.cu and the object file."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    made = tmp_path_factory.mktemp("cuda") / "cuda.o"
    flags = ["-std=c++17", "-O3", f"-I{CSRC}", "-DFORESHOCK_HAS_CUDA", "-Werror", "all-warnings"]
    targets = [f"-gencode=arch=compute_{cc},code=sm_{cc}" for cc in (80, 90)]
    done = subprocess.run(
        [nvcc, *flags, *targets, "-Xptxas", "-v", "-c", CSRC / "health_scan/cuda.cu", "-o", made],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr, made


def test_the_cuda_kernel_keeps_to_its_registers(compiled_cuda: tuple[str, Path]) -> None:
    report, _ = compiled_cuda
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", report)
    assert spills == [("0", "0")] * 2, report
    assert [int(used) <= 64 for used in re.findall(r"Used (\d+) registers", report)] == [True] * 2


def test_the_cuda_kernel_loads_16_bytes_and_flushes_nothing(
    compiled_cuda: tuple[str, Path],
) -> None:
    kernels = disassemble(compiled_cuda[1])
    assert len(kernels) == 2
    for kernel in kernels:
        # Of each of six dtypes, four loads under way before the first is used.
        assert kernel.count("LDG.E.128.CONSTANT") == 6 * 4
        assert not re.search(r"\b(F2F|FMNMX|FADD|FMUL|FFMA)\S*\.FTZ", kernel)


def test_the_cuda_implementation_imports_anywhere_and_says_what_it_lacks() -> None:
    done = run_python(
        """
        from foreshock.ops.health_scan import cuda
        print(cuda.why_unavailable("cpu"))
        print(cuda.why_unavailable("cuda"))
        """,
        NO_EXTENSION,
        NO_TRITON,
    )
    on_cpu, on_cuda = done.stdout.splitlines()
    assert on_cpu == "reads the memory of CUDA devices only"
    assert "extension is not installed" in on_cuda, done.stderr


def test_an_extension_without_cuda_is_named_as_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    class Extension:
        @staticmethod
        def has_cuda() -> bool:
            return False

    monkeypatch.setattr(_device, "load_kernels", Extension)
    assert "built without CUDA" in str(cuda.why_unavailable("cuda"))


if __name__ == "__main__":
    main({"interpret": interpret, "compile_kernels": compile_kernels})
