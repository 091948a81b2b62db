"""power_iteration in Triton and CUDA C++.

Triton runs in its interpreter, and everything is compiled for the devices that it may meet; on a
device it is test_power_iteration_on_gpu.py that runs both. Run as a module, this file is the
process in which Triton interprets or compiles: which of them it does is settled at its import.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foreshock.ops._backend import load_kernels
from foreshock.ops._tensors import DTYPE_CODES
from foreshock.ops.power_iteration import cuda, device_table
from foreshock.ops.power_iteration.device_table import SEGMENT_BYTES, DeviceTable, Shape
from foreshock.ops.power_iteration.matrices import layout_of
from tests.interpreter import NO_EXTENSION, NO_TRITON, run_python
from tests.ops.cuobjdump import disassemble, resources
from tests.ops.power_iteration_cases import (
    ALL_CASES,
    DTYPES,
    Pass,
    assert_agrees,
    case,
    run_pass,
)
from tests.ops.triton_process import CAPABILITIES, compile_all, interpreted, main, results_of

# One process has what Triton makes, once.
pytestmark = pytest.mark.xdist_group("power_iteration in Triton")

CSRC = Path(__file__).parents[2] / "csrc" / "power_iteration"
CPU = torch.device("cpu")


# ---- the table


def key_of(shape: Shape) -> tuple[int, bool]:
    return DTYPE_CODES[shape.dtype], shape.is_cut


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """Nothing is read: the memory is short, and most of a matrix lies behind it."""
    rows, columns = draw(st.integers(0, 400)), draw(st.integers(0, 400))
    dtype = draw(st.sampled_from(list(DTYPES.values())))
    strides = draw(st.sampled_from([(columns, 1), (columns + 8, 1), (1, rows), (2 * columns, 2)]))
    room = torch.empty(rows * strides[0] + columns * strides[1] + 1, dtype=dtype)
    return room.as_strided((rows, columns), strides)


@settings(deadline=None)
@given(st.lists(matrices(), min_size=1, max_size=6))
def test_the_table_names_every_element_once(weights: list[Tensor]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_table, "MIN_BLOCK_BYTES", 4096)
        patch.setattr(device_table, "MAX_BLOCK_BYTES", 16384)
        patch.setattr(device_table, "MAX_CUT_ROWS", 48)
        patch.setattr(device_table, "SEGMENT_BYTES", 512)
        table = DeviceTable(weights, CPU, 1024, key_of)
    owners, chunk_owners = table.owners.tolist(), table.chunk_owners.tolist()
    assert (len(owners), len(chunk_owners)) == (table.tasks, table.chunks)
    assert sum(kind.task_count for kind in table.kinds) == table.tasks
    assert not table.tickets.any()
    first = partial_end = dots_end = 0
    for m, (weight, words) in enumerate(zip(weights, table.rows.tolist(), strict=True)):
        row = dict(zip(NAMES, words, strict=True))
        layout = layout_of(weight)
        shape = row["ROWS"], row["COLUMNS"]
        assert shape == (layout.rows, layout.columns)
        assert (row["FIRST"], row["DTYPE"]) == (first, DTYPE_CODES[weight.dtype])
        tasks = range(row["FIRST_TASK"], row["FIRST_TASK"] + row["TASKS"])
        assert all(owners[task] == m for task in tasks)
        assert owners.count(m) == len(tasks)
        chunks = range(row["FIRST_CHUNK"], row["FIRST_CHUNK"] + row["CHUNKS"])
        assert chunk_owners.count(m) == len(chunks) == max(1, -(-shape[1] // 64))
        assert all(chunk_owners[chunk] == m for chunk in chunks)
        seen = torch.zeros(shape, dtype=torch.int64)
        for number in range(len(tasks)):
            block, segment = divmod(number, row["SEGMENTS"])
            begin, column = block * row["BLOCK_ROWS"], segment * row["SEGMENT_COLUMNS"]
            part = seen[begin : begin + row["BLOCK_ROWS"], column:][:, : row["SEGMENT_COLUMNS"]]
            assert part.numel() > 0
            part += 1
        assert (seen == 1).all()
        if tasks:
            kind = next(k for k in table.kinds if 0 <= tasks[0] - k.first_task < k.task_count)
            assert kind.key == (row["DTYPE"], row["SEGMENTS"] > 1)
            assert tasks[-1] < kind.first_task + kind.task_count
        item, wide = weight.element_size(), 8 if weight.dtype is torch.float64 else 4
        if row["SEGMENTS"] > 1:
            assert row["SEGMENT_COLUMNS"] * wide <= 512
            assert row["SEGMENT_COLUMNS"] * item % 16 == 0
            assert row["BLOCK_ROWS"] <= 48
        blocks = len(tasks) // row["SEGMENTS"]
        assert row["PARTIAL"] == partial_end
        assert row["PARTIAL_COLUMNS"] >= shape[1]
        partial_end += -(-blocks * row["PARTIAL_COLUMNS"] * wide // 8)
        assert row["DOTS"] == dots_end
        dots_end += row["SEGMENTS"] * shape[0] if row["SEGMENTS"] > 1 else 0
        first += shape[1]
    assert (partial_end, dots_end) == (table.partial_words, table.dots_words)


NAMES = (
    *("ADDRESS", "ROWS", "COLUMNS", "ROW_STRIDE", "COLUMN_OFFSETS", "FIRST", "DTYPE"),
    *("BLOCK_ROWS", "SEGMENT_COLUMNS", "SEGMENTS", "FIRST_TASK", "TASKS", "FIRST_CHUNK", "CHUNKS"),
    *("PARTIAL", "PARTIAL_COLUMNS", "DOTS", "IS_ALIGNED"),
)


def fields_of(struct: str, source: str) -> list[str]:
    body = re.sub(r"//.*", "", source.split(f"struct {struct} {{")[1].split("};")[0])
    return re.findall(r"(\w+)(?:\[\d+\])?;", body)


def test_the_kernels_read_the_table_as_it_is_written() -> None:
    assert [getattr(device_table, name) for name in NAMES] == list(range(device_table.WORDS))
    header = (CSRC / "kernel.h").read_text()
    source = "".join(part.read_text() for part in sorted(CSRC.glob("*.cu*")))
    matrix = ["data", *(name.lower() for name in NAMES[1:7])]
    assert fields_of("Matrix", header) == matrix
    assert fields_of("Source", source) == ["matrix", *(name.lower() for name in NAMES[7:])]
    assert f"kMaxCutRows = {device_table.MAX_CUT_ROWS};" in source
    assert f"kChunkColumns = {device_table.CHUNK_COLUMNS};" in source
    assert f"kUsualRowBytes = {SEGMENT_BYTES >> 10} << 10;" in source


def test_the_plan_is_written_as_it_is_read() -> None:
    header = (CSRC / "kernel.h").read_text()
    fields = fields_of("DevicePlan", header)
    weights = [torch.ones(2, n, dtype=d) for d in DTYPES.values() for n in (5, 9000, 20_000)]
    vectors = torch.zeros(2, sum(w.shape[1] for w in weights), dtype=torch.float64)
    packed = torch.zeros(len(weights), 5, dtype=torch.float64)
    plan, memory = cuda.make_plan(weights, vectors, packed, 2 * SEGMENT_BYTES)
    words = dict(zip(fields, plan.tolist(), strict=False))
    assert [words["v"], words["previous"]] == [row.data_ptr() for row in vectors]
    assert words["rows"] == packed.data_ptr()
    assert words["table"] == memory[0].data_ptr()
    assert words["chunks"] == sum(-(-w.shape[1] // 64) for w in weights)
    assert fields[-1] == "tasks"
    assert fields_of("TaskCounts", header) == ["whole", "cut", "longer"]
    # 9000 float64 are in segments, three of them; 9000 of the others are a long row.
    counts = plan[len(fields) - 1 :].view(4, 3).tolist()
    assert counts == [[1, 3 + 5, 0], [1, 3, 1], [1, 3, 1], [1, 3, 1]]


# ---- Triton without a GPU

# Long rows take the interpreter seconds.
INTERPRETED = [name for name in ALL_CASES if name not in ("long_rows-float32", "long_rows-float16")]


def interpret() -> dict[str, Any]:
    from foreshock.ops.power_iteration import triton

    assert triton.why_unavailable("cpu") is None

    def attempt(name: str) -> tuple[Tensor, Tensor] | str:
        try:
            return tuple(run_pass(triton.bind, *case(name, CPU)))
        except Exception:
            return traceback.format_exc()

    return {name: attempt(name) for name in INTERPRETED}


PASSES = {
    **{f"{dtype}-longest": (dtype, "longest", True, True, True) for dtype in DTYPES},
    **{f"{dtype}-1024": (dtype, 1024, True, True, True) for dtype in ("float32", "bfloat16")},
    "bfloat16-gathered": ("bfloat16", 1024, False, True, True),
    "bfloat16-finds-u": ("bfloat16", "longest", True, True, False),
    "bfloat16-uses-u": ("bfloat16", "longest", True, False, True),
}


def compile_kernels() -> dict[str, Any]:
    from triton.compiler import ASTSource

    from foreshock.ops.power_iteration import triton as ours

    def source(kernel: Any, constants: dict[str, Any], **numbers: str) -> Any:
        pointers = {n: "*fp64" for n in kernel.arg_names if n.endswith("_ptr")}
        pointers |= {"table_ptr": "*i64"}
        pointers |= {"owners_ptr": "*i32"} if "owners_ptr" in pointers else {}
        signature = pointers | numbers | dict.fromkeys(constants, "constexpr")
        return ASTSource(kernel, signature, constants)

    sources = {
        "chunk": source(ours._power_iteration_chunk_kernel, {}),
        "matrix": source(ours._power_iteration_matrix_kernel, {}),
    }
    for name, (dtype, columns, is_aligned, finds_u, uses_u) in PASSES.items():
        longest = SEGMENT_BYTES // device_table.sum_bytes(DTYPES[dtype])
        constants = {
            "F": ours.FORMATS[DTYPES[dtype]],
            "MOST_COLUMNS": longest if columns == "longest" else columns,
            "IS_ALIGNED": is_aligned,
            "FINDS_U": finds_u,
            "USES_U": uses_u,
        }
        sources[name] = source(ours._power_iteration_pass_kernel, constants, first_task="i32")
    return compile_all(sources, ours.OPTIONS)


COMPILED = [
    f"sm{capability}-{kernel}"
    for capability in CAPABILITIES
    for kernel in ("chunk", "matrix", *PASSES)
]


@pytest.fixture(scope="module")
def triton_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Any]]:
    yield from results_of(__name__, tmp_path_factory.mktemp("triton"))


@pytest.mark.parametrize("name", INTERPRETED)
def test_triton_agrees_with_the_reference(triton_process: Callable[[str], Any], name: str) -> None:
    found = interpreted(triton_process("interpret")[name])
    assert_agrees(Pass(*found), *case(name, CPU))


@pytest.mark.parametrize("name", COMPILED)
def test_triton_compiles_ahead_of_time(triton_process: Callable[[str], Any], name: str) -> None:
    kernel = triton_process("compile_kernels")[name]
    assert kernel["cubin"] == b"\x7fELF"
    # What every device grants that is asked: 99 KiB.
    assert kernel["shared_bytes"] <= 99 << 10
    assert ".ftz" not in kernel["ptx"], "denormals would be flushed"
    if name.split("-", 1)[1] in PASSES and "gathered" not in name and "uses-u" not in name:
        copied = re.findall(r"cp\.async\.c[ag]\.shared\.global .*?, (0x\w+)", kernel["ptx"])
        assert len(copied) >= 8, "loads are not under way while others are used"
        assert set(copied) == {"0x10"}, "no 16-byte loads"


# ---- CUDA C++ without a GPU: what the extension was built with


@pytest.fixture(scope="module")
def extension() -> Path:
    kernels = load_kernels()
    if isinstance(kernels, str) or not kernels.has_cuda():
        pytest.skip("the extension was built without CUDA")
    return Path(str(kernels.__file__))


def test_the_cuda_kernels_keep_to_their_registers(extension: Path) -> None:
    found = [(name, r) for name, r in resources(extension) if "power_iteration" in name]
    assert len(found) == 2 * (4 * 2 + 1)  # on two architectures, dtypes and lengths of rows
    for name, used in found:
        assert used["STACK"] == used["LOCAL"] == 0, (name, used)
    # On devices that have shared memory for it two blocks are to run on a multiprocessor.
    usual = sorted(used["REG"] for name, used in found if "Li256E" in name)
    assert usual[3] <= 128, usual


def test_the_cuda_kernels_copy_16_bytes_and_flush_nothing(extension: Path) -> None:
    kernels = [k for k in disassemble(extension) if "_power_iteration_pass_kernel" in k]
    assert len(kernels) == 2 * 4 * 2
    for kernel in kernels:
        name = kernel.split()[0]
        # Of a tile eight, where the first tiles are begun and in the loop.
        stages, layouts = (3, 2 if "loat16" in name else 3) if "Li256E" in name else (2, 1)
        assert kernel.count("LDGSTS.E.BYPASS.128") == 8 * stages * layouts, name
        assert not re.search(r"\b(FADD|FMUL|FFMA|HADD2)\S*\.FTZ", kernel), name
        assert not re.search(r"\b(LDL|STL)\b", kernel), name


def test_the_cuda_implementation_imports_anywhere_and_says_what_it_lacks() -> None:
    done = run_python(
        """
        from foreshock.ops.power_iteration import cuda
        print(cuda.why_unavailable("cpu"))
        print(cuda.why_unavailable("cuda"))
        """,
        NO_EXTENSION,
        NO_TRITON,
    )
    on_cpu, on_cuda = done.stdout.splitlines()
    assert on_cpu == "reads the memory of CUDA devices only"
    assert "extension is not installed" in on_cuda, done.stderr


if __name__ == "__main__":
    main({"interpret": interpret, "compile_kernels": compile_kernels})
