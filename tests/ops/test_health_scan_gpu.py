"""health_scan in Triton and CUDA C++.

Without a GPU, Triton runs in its interpreter, and everything is compiled for the devices that it
may meet; tests marked gpu run both implementations on the device. Run as a module, this file is the
process in which Triton interprets or compiles: which of them it does is settled at its import.
"""

from __future__ import annotations

import concurrent.futures
import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foreshock.ops._tensors import FLOATING_DTYPES
from foreshock.ops.health_scan import cuda, device_table, reference
from foreshock.ops.health_scan.device_table import DeviceTable, coalesce
from tests.interpreter import NO_EXTENSION, NO_TRITON, run_python

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
CPU = torch.device("cpu")
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATING_DTYPES}

# The same float64 terms in another order, over the sum of their magnitudes: measured 4e-15.
SUM_TOLERANCE = 1e-12

COLUMNS_OF_CHUNKS = ["CHUNK_NUMEL", "FIRST_CHUNK", "IS_STRIDED"]

Bind = Callable[[list[Tensor | None], Tensor], Callable[[], object]]
Build = Callable[[torch.dtype, torch.device], list[Tensor | None]]


# What is scanned. Every builder makes the same values each time, on whatever device.


def random_tensor(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))
    return values.to(dtype).to(device)


def odd_sizes(dtype: torch.dtype, device: torch.device) -> list[Tensor | None]:
    """Around a vector, a tile and a chunk, from every alignment."""
    vector = 16 // dtype.itemsize
    chunk = device_table.CHUNK_BYTES // dtype.itemsize
    sizes = [1, vector - 1, vector, vector + 1, 255, 256 * vector + 1, 1024 * vector, chunk + 3]
    return [
        random_tensor(size + start, dtype=dtype, device=device)[start:]
        for size in sizes
        for start in {0, 1, vector - 1}
    ]


def absent(dtype: torch.dtype, device: torch.device) -> list[Tensor | None]:
    x = random_tensor(40, 5, dtype=dtype, device=device)
    return [None, x[:0], x, None, x[:, 3:3], x[0, 0], x.new_empty(0, 7), x[1:2, 1:2]]


def views(dtype: torch.dtype, device: torch.device) -> list[Tensor | None]:
    x = random_tensor(12, 10, 41, dtype=dtype, device=device)
    six_dims = random_tensor(*[3] * 6, dtype=dtype, device=device)
    return [
        x.permute(2, 0, 1),
        x[:, ::2],
        x.transpose(0, 2)[1:, :, 3:],
        x[3:7, :, ::5].permute(1, 2, 0),
        x[:, :, 7],
        x.as_strided((50, 40, 9), (7, 3, 1)),
        x[:1].expand(9, 10, 41),
        x[0, 0, :1].expand(1000, 3),
        six_dims[:, :2, :, :2],
        six_dims[::2, ::2, ::2, ::2, ::2, ::2],
    ]


def nonfinite(dtype: torch.dtype, device: torch.device) -> list[Tensor | None]:
    """NaN and both infinities, alone in a chunk and many in one, dense and strided."""
    x = random_tensor(3 * 5003, dtype=dtype, device=device)
    wide = random_tensor(device_table.CHUNK_BYTES // dtype.itemsize + 9, dtype=dtype, device=device)
    place = torch.Generator().manual_seed(0)
    for value in (float("nan"), float("inf"), -float("inf")):
        where = torch.randint(len(x), (7,), generator=place)
        x[where.to(device)] = torch.tensor(value).to(dtype).to(device)
        wide[int(torch.randint(len(wide), (), generator=place))] = value
    strided = x.view(5003, 3)[:, ::2]
    return [x, x[1:], strided, wide, wide[-1:], x.new_full((33,), float("nan"))]


def extremes(dtype: torch.dtype, device: torch.device) -> list[Tensor | None]:
    """The largest and the smallest of each sign, denormals and the zeros."""
    info = torch.finfo(dtype)
    # Not the largest float64, whose sums overflow in one order and not in another.
    most = 1e300 if dtype is torch.float64 else info.max
    smallest = info.smallest_normal * info.eps
    kinds = [most, -most, info.smallest_normal, smallest, -3 * smallest, 0.0, -0.0]
    edges = torch.tensor(kinds, dtype=torch.float64).to(dtype).to(device)
    return [*edges.split(1), edges, edges.repeat(400)[1:], edges[3:].repeat(5000)]


def every_bit_pattern(dtype: torch.dtype, device: torch.device) -> list[Tensor | None]:
    """All elements that there are of a narrow dtype; random bits of a wide one."""
    ints = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    low, high = torch.iinfo(ints).min, torch.iinfo(ints).max
    if dtype.itemsize <= 2:
        bits = torch.arange(low, high + 1).to(ints)
    else:
        bits = torch.randint(low, high, (3001,), generator=torch.Generator().manual_seed(0))
        # The sums of random float64 are the largest of them: nothing to compare.
        bits = bits.to(ints) if dtype.itemsize == 4 else bits & ~(0x3FF << 53)
    x = bits.view(dtype).to(device)
    return [x, x[::3]]


BUILDERS = (odd_sizes, absent, views, nonfinite, extremes, every_bit_pattern)
CASES: dict[str, tuple[Build, torch.dtype]] = {
    f"{build.__name__}-{name}": (build, dtype)
    for build in BUILDERS
    for name, dtype in DTYPES.items()
}


def mixed(device: torch.device) -> list[Tensor | None]:
    """Tensors of every builder and dtype in one list, dtypes taking turns."""
    lists = [build(dtype, device)[::3] for build in BUILDERS[1:4] for dtype in DTYPES.values()]
    return [tensor for turn in zip(*lists, strict=False) for tensor in turn]


def case(name: str, device: torch.device) -> list[Tensor | None]:
    if name == "mixed":
        return mixed(device)
    build, dtype = CASES[name]
    return build(dtype, device)


def scan(bind: Bind, tensors: list[Tensor | None], device: torch.device = CPU) -> Tensor:
    packed = torch.full((len(tensors), 6), torch.nan, dtype=torch.float64, device=device)
    bind(tensors, packed)()
    return packed


def assert_agrees(packed: Tensor, tensors: list[Tensor | None]) -> None:
    """Counts and absmax are the reference's; so are the sums, but for the order of their terms."""
    expected = scan(reference.bind, tensors)
    found = packed.cpu()
    counts, right = found.view(torch.int64)[:, :3], expected.view(torch.int64)[:, :3]
    assert torch.equal(counts, right), f"{counts} for {right}"
    assert torch.equal(found[:, 3], expected[:, 3]), f"{found[:, 3]} for {expected[:, 3]}"
    for i, tensor in enumerate(tensors):
        if tensor is None:
            continue
        x = (tensor.float() if tensor.dtype.itemsize == 1 else tensor).double()
        terms = x[x.isfinite()].abs().sum()
        torch.testing.assert_close(
            found[i, 4], expected[i, 4], rtol=0, atol=float(SUM_TOLERANCE * terms)
        )
    torch.testing.assert_close(found[:, 5], expected[:, 5], rtol=SUM_TOLERANCE, atol=0)


# The device table.


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
    import triton
    from triton.backends.compiler import GPUTarget
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
    found: dict[str, Any] = {}
    for capability in (80, 90):
        for name, source in sources.items():
            target = GPUTarget("cuda", capability, 32)
            kernel = triton.compile(source, target=target, options=dict(ours.OPTIONS))
            found[f"sm{capability}-{name}"] = {
                "cubin": kernel.asm["cubin"][:4],
                "shared_bytes": kernel.metadata.shared,
                "ptx": kernel.asm["ptx"],
            }
    return found


COMPILED = [
    f"sm{capability}-{kernel}"
    for capability in (80, 90)
    for kernel in [
        "tensor",
        *(f"chunk-{d}-{kind}" for d in DTYPES for kind in ("dense", "strided")),
    ]
]


# Triton 3.6 interprets no loop with the NumPy that came after it.
OLD_INTERPRETER = "only 0-dimensional arrays can be converted to Python scalars"


@pytest.fixture(scope="module")
def triton_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Any]]:
    """Results of `interpret` and `compile_kernels`, each run in a process of its own."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    folder = tmp_path_factory.mktemp("triton")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "FORESHOCK_"))}

    def run(task: str) -> Any:
        is_interpreted = "1" if task == "interpret" else "0"
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", __name__, task, str(folder / task)],
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


@pytest.mark.parametrize("name", [*CASES, "mixed"])
def test_triton_agrees_with_the_reference(triton_process: Callable[[str], Any], name: str) -> None:
    found = triton_process("interpret")[name]
    if isinstance(found, str) and OLD_INTERPRETER in found:
        pytest.skip("this Triton's interpreter is too old for this NumPy")
    assert isinstance(found, Tensor), found
    assert_agrees(found, case(name, CPU))


def test_triton_adds_up_more_chunks_than_it_has_threads(
    triton_process: Callable[[str], Any],
) -> None:
    found = triton_process("interpret")["rows"]
    if isinstance(found, str) and OLD_INTERPRETER in found:
        pytest.skip("this Triton's interpreter is too old for this NumPy")
    assert not isinstance(found, str), found
    partial, packed = found
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
    triton = importlib.util.find_spec("triton")
    bundled = (
        Path(triton.origin).parent / "backends/nvidia/bin" if triton and triton.origin else None
    )
    cuobjdump = shutil.which("cuobjdump") or (bundled and shutil.which("cuobjdump", path=bundled))
    if cuobjdump is None:
        pytest.skip("cuobjdump is not installed")
    code = subprocess.run(
        [cuobjdump, "-sass", compiled_cuda[1]], capture_output=True, text=True, check=True
    ).stdout
    kernels = code.split("Function :")[1:]
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

    monkeypatch.setattr(cuda, "load_kernels", Extension)
    assert "built without CUDA" in str(cuda.why_unavailable("cuda"))


# On a GPU.


@pytest.fixture(params=["triton", "cuda"])
def bind(request: pytest.FixtureRequest) -> Bind:
    module = importlib.import_module(f"foreshock.ops.health_scan.{request.param}")
    reason = module.why_unavailable("cuda")
    if reason is not None:
        pytest.skip(reason)
    return module.bind  # type: ignore[no-any-return]


GPU = torch.device("cuda", 0)
GPT_SHAPES = [(50257, 768), (1024, 768)] + 12 * [
    *[(768,), (768,), (2304, 768), (2304,), (768, 768), (768,)],
    *[(768,), (768,), (3072, 768), (3072,), (768, 3072), (768,)],
] + [(768,), (768,)]  # fmt: skip


def gpt_gradients(dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(shape, device=GPU, dtype=torch.float32).to(dtype) for shape in GPT_SHAPES]


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*CASES, "mixed"])
def test_agrees_on_the_device(bind: Bind, name: str) -> None:
    assert_agrees(scan(bind, case(name, GPU), GPU), case(name, CPU))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scans_a_whole_model(bind: Bind, dtype: torch.dtype) -> None:
    gradients = gpt_gradients(dtype)
    assert len(gradients) == 148
    gradients[77].view(-1)[5] = torch.nan
    gradients[2].view(-1)[-1] = -torch.inf
    assert_agrees(scan(bind, list(gradients), GPU), [g.cpu() for g in gradients])


@pytest.mark.gpu
@pytest.mark.parametrize("scale", [1e-6, 1e18])
def test_a_hundred_million_elements_are_summed_to_one_in_a_million(
    bind: Bind, scale: float
) -> None:
    x = (torch.rand(100_000_000, device=GPU) * scale).bfloat16()
    found, wide = scan(bind, [x], GPU)[0], x.double()
    torch.testing.assert_close(found[4], wide.sum(), rtol=1e-6, atol=0)
    torch.testing.assert_close(found[5], wide.square().sum(), rtol=1e-6, atol=0)


@pytest.mark.gpu
def test_scans_more_elements_than_an_int32_counts(bind: Bind) -> None:
    n = 2**31 + 2**20 + 3
    if torch.cuda.mem_get_info()[0] < 3 * n:
        pytest.skip("needs 7 GB of device memory")
    x = torch.zeros(n, dtype=torch.bfloat16, device=GPU)
    for place, value in ((0, 2.0), (2**31 - 1, torch.nan), (2**31, -3.0), (n - 1, torch.inf)):
        x[place] = value
    found = scan(bind, [x, x[1:], x.view(-1)[::2]], GPU).cpu()
    assert found.view(torch.int64)[:, :3].tolist() == [
        [n, 1, 1],
        [n - 1, 1, 1],
        [(n + 1) // 2, 0, 1],
    ]
    assert found[:, 3:].tolist() == [[3, -1, 13], [3, -3, 9], [3, -1, 13]]


@pytest.mark.gpu
def test_the_same_scan_gives_the_same_bits(bind: Bind) -> None:
    gradients: list[Tensor | None] = [*gpt_gradients(torch.float32)]
    runs = [scan(bind, gradients, GPU).view(torch.int64) for _ in range(20)]
    assert all(torch.equal(run, runs[0]) for run in runs)
    alone = torch.cat([scan(bind, [gradient], GPU) for gradient in gradients])
    assert torch.equal(alone.view(torch.int64), runs[0])


@pytest.mark.gpu
def test_a_captured_scan_reads_what_is_there_at_its_replay(bind: Bind) -> None:
    tensors: list[Tensor | None] = [*gpt_gradients(torch.bfloat16), None]
    packed = torch.full((len(tensors), 6), torch.nan, dtype=torch.float64, device=GPU)
    call = bind(tensors, packed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for step in range(3):
        for tensor in tensors[:-1]:
            assert tensor is not None
            tensor.fill_(step).view(-1)[step] = torch.nan
        packed.fill_(torch.nan)
        graph.replay()
        assert_agrees(packed, [None if t is None else t.cpu() for t in tensors])


@pytest.mark.gpu
def test_nothing_waits_for_the_device(bind: Bind) -> None:
    tensors = case("mixed", GPU)
    packed = torch.empty(len(tensors), 6, dtype=torch.float64, device=GPU)
    bind(tensors, packed)  # compiles what it needs
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        call = bind(tensors, packed)
        bound = torch.cuda.memory_stats()["allocation.all.allocated"]
        call()
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == bound > before
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_agrees(packed, case("mixed", CPU))


@pytest.mark.gpu
def test_runs_on_the_current_stream(bind: Bind) -> None:
    """Both the bind, still under way on the other stream, and the values are waited for."""
    x = torch.zeros(1 << 22, device=GPU)
    packed = torch.empty(1, 6, dtype=torch.float64, device=GPU)
    bind([x], packed)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    torch.cuda._sleep(100_000_000)
    call = bind([x], packed)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        x.fill_(2.0)
        call()
    stream.synchronize()
    assert packed[0, 3:].tolist() == [2, 2 << 22, 4 << 22]


@pytest.mark.gpu
def test_triton_compiles_when_it_binds_and_never_later(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = importlib.import_module("foreshock.ops.health_scan.triton")
    if triton.why_unavailable("cuda") is not None:
        pytest.skip(triton.why_unavailable("cuda"))
    tensors = case("mixed", GPU)
    packed = torch.empty(len(tensors), 6, dtype=torch.float64, device=GPU)
    call = triton.bind(tensors, packed)
    for kernel in (triton._health_scan_chunk_kernel, triton._health_scan_tensor_kernel):
        monkeypatch.setattr(kernel, "_do_compile", None)
    call()
    triton.bind(tensors[::-1], packed)()
    assert_agrees(packed, case("mixed", CPU)[::-1])


if __name__ == "__main__":
    torch.save(
        {"interpret": interpret, "compile_kernels": compile_kernels}[sys.argv[1]](), sys.argv[2]
    )
