"""health_scan: every claim, for every implementation and instruction set that runs here."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import foreshock as fs
from foreshock.ops import HealthScanner, HealthStats, health_scan
from foreshock.ops._tensors import FLOATING_DTYPES
from tests.ops.conftest import CPU_SCANS, Scan

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATING_DTYPES}
HAS_INF = [dtype for dtype in FLOATING_DTYPES if dtype is not torch.float8_e4m3fn]

# Of the sum of the magnitudes of what is added. In float64 only the order differs: measured 3e-15
# on 1e7 elements. Elements of up to 16 bits are first added in float32 by fours: three roundings of
# 6e-8.
SUM_TOLERANCE = {dtype: 1e-12 if dtype.itemsize > 2 else 1.8e-7 for dtype in FLOATING_DTYPES}

# Around the widths at which the kernels change their way: a vector, a step, a block, a chunk.
SIZES = [0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 1000, 4095, 4097, 8193, 70001]


def random_tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype)


def assert_same(
    found: HealthStats, expected: HealthStats, tensors: Sequence[Tensor | None]
) -> None:
    for name in ("numel", "nan", "inf", "absmax"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), (name, tensors)
    for i, tensor in enumerate(tensors):
        if tensor is None:
            continue
        x = (tensor.float() if tensor.dtype.itemsize == 1 else tensor).double()
        magnitudes = x[x.isfinite()].abs()
        tolerance = SUM_TOLERANCE[tensor.dtype]
        for name, scale in (("sum", magnitudes.sum()), ("sumsq", magnitudes.square().sum())):
            torch.testing.assert_close(
                getattr(found, name)[i],
                getattr(expected, name)[i],
                rtol=0 if scale.isfinite() else 1e-6,
                atol=float(tolerance * scale) if scale.isfinite() else 0,
                msg=lambda m, name=name, i=i: f"{name} of {tensors[i]}: {m}",
            )


def assert_agrees(scan: Scan, tensors: list[Tensor | None]) -> None:
    assert_same(scan(tensors), CPU_SCANS["reference"](tensors), tensors)


def test_the_reference_counts_and_sums_as_plain_python_does() -> None:
    values = [1.5, -2.0, math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-40, 3.25]
    stats = CPU_SCANS["reference"]([torch.tensor(values, dtype=torch.float64)])
    finite = [v for v in values if math.isfinite(v)]
    row = (len(values), 1, 2, 3.25, math.fsum(finite), math.fsum(v * v for v in finite))
    assert tuple(stats.packed.view(torch.int64)[0, :3].tolist()) == row[:3]
    assert stats.packed[0, 3:].tolist() == pytest.approx(row[3:], rel=1e-15)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_agrees_with_the_reference_at_odd_sizes(compiled_scan: Scan, dtype: torch.dtype) -> None:
    assert_agrees(compiled_scan, [random_tensor(n, dtype=dtype) for n in SIZES])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_agrees_on_every_bit_pattern(compiled_scan: Scan, dtype: torch.dtype) -> None:
    if dtype.itemsize <= 2:
        kind = {1: torch.uint8, 2: torch.int16}[dtype.itemsize]
        every = torch.arange(2 ** (8 * dtype.itemsize)).to(kind).view(dtype)
    else:
        kind = {4: torch.int32, 8: torch.int64}[dtype.itemsize]
        limits = torch.iinfo(kind)
        every = torch.randint(limits.min, limits.max, (100_003,), dtype=torch.int64)
        every = every.to(kind).view(dtype)
    found, expected = compiled_scan([every]), CPU_SCANS["reference"]([every])
    for name in ("numel", "nan", "inf", "absmax"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    singles = [every[i : i + 1] for i in range(0, len(every), max(1, len(every) // 500))]
    assert_agrees(compiled_scan, singles)


VIEWS = {
    "offset": lambda x: x.flatten()[1:],
    "transposed": lambda x: x.transpose(0, 2),
    "every third column": lambda x: x[:, :, ::3],
    "every second row": lambda x: x[::2],
    "inner block": lambda x: x[2:9, 3:11, 5:23],
    "one column": lambda x: x[:, 4, 7],
    "expanded": lambda x: x[:, :1, :].expand(-1, 6, -1),
    "expanded scalar": lambda x: x[0, 0, 0].expand(5, 7),
    "flipped by index": lambda x: x.permute(2, 0, 1)[1:, ::2],
    "empty inside": lambda x: x[:, 3:3],
    "overlapping windows": lambda x: x.flatten().unfold(0, 5, 2),
    "zero dims": lambda x: x[1, 2, 3],
    "seven dims": lambda x: x.reshape(11, 13, 1, 3, 1, 3, 3)[::2, 1:, :, ::2, :, 1:, ::2],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2], ids=str)
def test_agrees_on_views(compiled_scan: Scan, dtype: torch.dtype, view: Any) -> None:
    x = random_tensor(11, 13, 27, dtype=dtype)
    x[5, 6, 9] = math.nan
    assert_agrees(compiled_scan, [view(x), view(x)])


def test_a_strided_tensor_of_many_chunks_agrees(compiled_scan: Scan) -> None:
    x = torch.randn(3000, 1001)
    x[2999, 999] = math.inf
    assert_agrees(compiled_scan, [x[:, :1000], x[:, ::2], x.t()[:, ::3]])


@st.composite
def strided_tensors(draw: st.DrawFn) -> Tensor:
    sizes = draw(st.lists(st.integers(0, 5), max_size=4))
    strides = [draw(st.integers(0, 7)) for _ in sizes]
    offset = draw(st.integers(0, 3))
    dtype = draw(st.sampled_from(FLOATING_DTYPES))
    room = offset + sum((n - 1) * s for n, s in zip(sizes, strides, strict=True) if n) + 1
    base = random_tensor(max(room, 1) + 40, dtype=dtype)
    if draw(st.booleans()):
        base[draw(st.integers(0, len(base) - 1))] = math.nan
    return base.as_strided(sizes, strides, offset)


@settings(max_examples=150, deadline=None)
@given(tensors=st.lists(st.none() | strided_tensors(), max_size=5))
def test_any_strided_list_agrees(tensors: list[Tensor | None]) -> None:
    for name, scan in CPU_SCANS.items():
        if name != "reference":
            assert_agrees(scan, tensors)


def plant(dtype: torch.dtype, rng: random.Random) -> tuple[list[Tensor], int]:
    """Tensors with one NaN or infinity somewhere, and the index of the tensor that it is in."""
    tensors = [random_tensor(rng.choice((1, 5, 64, 1000, 3000)), dtype=dtype) for _ in range(4)]
    which = rng.randrange(len(tensors))
    bad = [math.nan, math.inf, -math.inf] if dtype in HAS_INF else [math.nan]
    tensors[which][rng.randrange(tensors[which].numel())] = rng.choice(bad)
    return tensors, which


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_each_of_10000_planted_values_is_found_in_its_tensor(
    scan: Scan, dtype: torch.dtype
) -> None:
    rng = random.Random(str(dtype))
    # Implementations x types x plantings: over 10 000 in all, whatever runs here.
    for _ in range(math.ceil(10_000 / (len(CPU_SCANS) * len(DTYPES)))):
        tensors, which = plant(dtype, rng)
        stats = scan(list(tensors))
        assert stats.first_nonfinite == which
        assert stats.nonfinite.sum() == 1


def harmless_values(dtype: torch.dtype) -> list[float]:
    limits = torch.finfo(dtype)
    return [limits.max, limits.min, limits.smallest_normal, limits.tiny / 4, -0.0, 0.0]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_no_false_report_on_10000_clean_lists(scan: Scan, dtype: torch.dtype) -> None:
    rng = random.Random(1)
    harmless = torch.tensor(harmless_values(dtype), dtype=torch.float64).to(dtype)
    for _ in range(math.ceil(10_000 / (len(CPU_SCANS) * len(DTYPES)))):
        x = random_tensor(rng.choice((1, 6, 100, 700)), dtype=dtype)
        places = torch.randint(len(x), (min(len(x), 6),))
        x[places] = harmless[: len(places)]
        stats = scan([x, None, x[:0]])
        assert stats.nonfinite.sum() == 0
        assert stats.first_nonfinite == -1


@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1e-6, 1.0, 1e18, 1e30])
@pytest.mark.parametrize("draw", [torch.rand, torch.randn], ids=["one sign", "both signs"])
def test_sums_of_bfloat16_are_right_to_1e6_at_every_scale(
    compiled_scan: Scan, draw: Any, scale: float
) -> None:
    x = (draw(3_000_019) * scale).bfloat16()
    stats = compiled_scan([x])
    assert stats.sum.item() == pytest.approx(x.double().sum().item(), rel=1e-6)
    assert stats.sumsq.item() == pytest.approx(x.double().square().sum().item(), rel=1e-6)


def test_magnitudes_far_apart_in_one_block_lose_nothing(compiled_scan: Scan) -> None:
    exponents = torch.linspace(-120, 120, 4096)
    assert_agrees(compiled_scan, [torch.exp2(exponents).bfloat16(), torch.exp2(exponents - 60)])


def test_a_norm_that_overflows_float32_is_no_alarm(scan: Scan) -> None:
    """Trap 5: the L2 norm, or a sum, is not a test of finiteness."""
    x = torch.full((1000,), 1e20)
    stats = scan([x])
    assert torch.isinf(x.norm() ** 2)
    assert stats.nonfinite.item() == 0
    assert stats.sumsq.item() == pytest.approx(1e40 * 1000, rel=1e-6)
    alternating = torch.tensor([3e38, 3e38, -3e38, -3e38])
    assert scan([alternating]).nonfinite.item() == 0


def test_denormals_count_in_the_sums(scan: Scan) -> None:
    x = torch.full((100,), 1e-40)
    stats = scan([x])
    assert stats.sum.item() == pytest.approx(x.double().sum().item(), rel=1e-12)
    assert stats.absmax.item() > 0


def test_a_tensor_without_finite_elements_sums_to_nothing(scan: Scan) -> None:
    stats = scan([torch.full((70,), math.nan), torch.tensor([math.inf, -math.inf])])
    for name in ("absmax", "sum", "sumsq", "mean", "rms", "norm"):
        assert getattr(stats, name).tolist() == [0.0, 0.0], name
    assert stats.nan.tolist() == [70, 0]
    assert stats.inf.tolist() == [0, 2]


def test_the_result_does_not_depend_on_the_number_of_threads(compiled_scan: Scan) -> None:
    tensors: list[Tensor | None] = [torch.randn(3_000_001), torch.randn(17), torch.randn(2_000_000)]
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(compiled_scan(tensors).packed.view(torch.int64))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_nothing_is_written_to_the_inputs(scan: Scan) -> None:
    x = torch.randn(1001)
    x[3] = math.nan
    before = x.view(torch.int32).clone()
    scan([x])
    assert torch.equal(x.view(torch.int32), before)


# ---- the public function and its result


def test_derived_values_follow_from_the_fields() -> None:
    stats = health_scan([torch.tensor([3.0, -4.0]), torch.tensor([math.nan, 12.0, math.inf])])
    assert stats.nonfinite.tolist() == [0, 2]
    assert stats.norm.tolist() == [5.0, 12.0]
    assert stats.mean.tolist() == [-0.5, 12.0]
    assert stats.rms.tolist() == [math.sqrt(12.5), 12.0]
    assert stats.total_norm.item() == 13.0
    assert stats.first_nonfinite.item() == 1


def test_no_tensors_at_all() -> None:
    stats = health_scan([])
    assert stats.numel.shape == (0,)
    assert stats.first_nonfinite.item() == -1
    assert stats.total_norm.item() == 0.0


def test_one_tensor_is_a_list_of_one() -> None:
    x = torch.randn(9)
    assert torch.equal(health_scan(x).packed, health_scan([x]).packed)


def test_a_generator_and_gradients_are_accepted() -> None:
    model = torch.nn.Linear(3, 2)
    model(torch.ones(1, 3)).sum().backward()
    stats = health_scan(p.grad for p in model.parameters())
    assert stats.numel.tolist() == [6, 2]
    assert not stats.packed.requires_grad


def test_the_result_is_frozen() -> None:
    with pytest.raises(AttributeError):
        health_scan([torch.ones(1)]).nan = torch.ones(1)  # type: ignore[misc]


class Wrapper(torch.Tensor):
    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        raise AssertionError("must not be called")


BAD_INPUT = {
    "integers": (lambda: [torch.ones(2), torch.ones(3, dtype=torch.int64)], r"tensors\[1\].*int64"),
    "complex": (lambda: [torch.ones(1, dtype=torch.complex64)], r"tensors\[0\].*complex64"),
    "a number": (lambda: [torch.ones(1), 3.0], r"tensors\[1\] is a float"),
    "not a list": (lambda: 7, r"tensors is a int"),
    "mixed devices": (lambda: [torch.ones(1), torch.ones(1, device="meta")], r"tensors\[1\].*meta"),
    "sparse": (lambda: [torch.eye(3).to_sparse()], r"tensors\[0\].*layout"),
    "lazy negation": (lambda: [torch._neg_view(torch.ones(2))], r"tensors\[0\].*negation"),
    "wrapper": (
        lambda: [torch.Tensor._make_wrapper_subclass(Wrapper, (2,))],
        r"tensors\[0\] is a Wrapper",
    ),
}


@pytest.mark.parametrize(("make", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
@pytest.mark.parametrize("call", [health_scan, HealthScanner], ids=["function", "scanner"])
def test_bad_input_is_named(call: Any, make: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call(make())


# ---- the bound scanner


def test_the_scanner_sees_the_tensors_as_they_are_now() -> None:
    x = torch.zeros(5)
    scanner = HealthScanner([x])
    assert scanner().sum.item() == 0
    x.fill_(2)
    assert scanner().sum.item() == 10


def moves() -> dict[str, Any]:
    return {
        "another tensor in its data": lambda p: setattr(p, "data", torch.full((9,), 3.0)),
        "another type": lambda p: setattr(p, "data", torch.full((4,), 3.0, dtype=torch.float64)),
        "resized": lambda p: p.data.resize_(2).fill_(3.0),
        "set to other memory": lambda p: p.data.set_(torch.full((6,), 3.0)),
        "transposed in place": lambda p: p.data.set_(torch.full((2, 3), 3.0).t()),
        "restrided in place": lambda p: p.data.as_strided_((2,), (2,)).fill_(3.0),
    }


@pytest.mark.parametrize("move", moves().values(), ids=moves())
@pytest.mark.parametrize("is_parameter", [False, True], ids=["tensor", "parameter"])
def test_the_scanner_follows_memory_that_moves(move: Any, is_parameter: bool) -> None:
    x = torch.zeros(4)
    tensor = torch.nn.Parameter(x) if is_parameter else x
    scanner = HealthScanner([torch.ones(3), tensor])
    scanner()
    move(tensor)
    expected = [torch.ones(3), tensor.detach()]
    assert_same(scanner(), CPU_SCANS["reference"](expected), expected)


def test_the_scanner_takes_gradients_that_come_and_go() -> None:
    p = torch.nn.Parameter(torch.ones(4))
    scanner = HealthScanner([p.grad])
    assert scanner([p.grad]).numel.item() == 0
    for value in (1.0, 2.0):
        p.grad = None
        (p * value).sum().backward()
        assert scanner([p.grad]).sum.item() == 4 * value
    p.grad = None
    assert scanner([p.grad]).numel.item() == 0


@pytest.mark.parametrize("values", [[2.0, 3.0], [2.0, None]], ids=["moved", "gone"])
def test_tensors_that_have_only_moved_need_no_new_table(values: list[float | None]) -> None:
    scanner = HealthScanner([torch.ones(5), torch.ones(2)])
    bound = scanner._scan
    moved = [
        None if v is None else torch.full((n,), v) for v, n in zip(values, (5, 2), strict=True)
    ]
    assert scanner(moved).sum.tolist() == [10, 2 * (values[1] or 0)]
    assert scanner().sum.tolist() == [10, 2 * (values[1] or 0)]
    assert (scanner._scan is bound) == (None not in values)


def test_without_the_recheck_the_memory_bound_first_is_read_and_kept_alive() -> None:
    p = torch.nn.Parameter(torch.ones(1000))
    scanner = HealthScanner([p], recheck=False)
    p.data = torch.full((1000,), 5.0)
    torch.randn(100, 1000)  # would fall upon freed memory
    assert scanner().sum.item() == 1000


def test_a_clone_outlives_the_next_scan() -> None:
    x = torch.ones(3)
    scanner = HealthScanner([x])
    kept, live = scanner().clone(), scanner()
    x.fill_(4)
    scanner()
    assert kept.sum.item() == 3
    assert live.sum.item() == 12


def test_a_scanner_takes_another_number_of_tensors() -> None:
    scanner = HealthScanner([torch.ones(3)])
    assert scanner([torch.ones(2), None, torch.ones(1)]).numel.tolist() == [2, 0, 1]


def test_a_bad_tensor_given_later_is_named() -> None:
    scanner = HealthScanner([torch.ones(3)])
    with pytest.raises(TypeError, match=r"tensors\[0\] has layout"):
        scanner([torch.eye(2).to_sparse()])


def test_a_dtensor_is_read_by_its_local_shard(tmp_path: Any) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        full = torch.arange(12.0).reshape(4, 3)
        shard = distribute_tensor(full.clone(), mesh, [Shard(0)])
        scanner = HealthScanner([shard, full])
        assert scanner().sum.tolist() == [66.0, 66.0]
        shard.to_local().fill_(1)
        assert scanner().sum.tolist() == [12.0, 66.0]
        assert health_scan([shard]).sum.item() == 12.0
    finally:
        dist.destroy_process_group()


# ---- under torch.compile


def test_opcheck() -> None:
    samples = [
        [torch.randn(5, requires_grad=True), torch.randn(2, 3)],
        [torch.randn(4, dtype=torch.bfloat16)],
        [torch.randn(6, 4).t()[::2]],
    ]
    for tensors in samples:
        torch.library.opcheck(torch.ops.foreshock.health_scan.default, (tensors,))


def test_compiles_as_a_full_graph() -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def first_bad(tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
        stats = fs.ops.health_scan([*tensors, None])
        return stats.first_nonfinite, stats.total_norm

    where, norm = first_bad([torch.full((4,), 2.0), torch.tensor([1.0, math.nan])])
    assert (where.item(), norm.item()) == (1, math.sqrt(17))


def test_gradients_do_not_flow_through_it() -> None:
    x = torch.ones(3, requires_grad=True)
    packed = torch.ops.foreshock.health_scan([x])
    assert not packed.requires_grad


def test_every_combination_of_dtypes_in_one_list(compiled_scan: Scan) -> None:
    for pair in itertools.combinations(FLOATING_DTYPES, 2):
        assert_agrees(compiled_scan, [random_tensor(50, dtype=dtype) for dtype in pair])
