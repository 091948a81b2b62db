"""rolling_zscore: what it accepts, what it refuses and how it says so, and what a call leaves."""

from __future__ import annotations

import math
import tracemalloc
from typing import Any

import pytest
import torch
from torch import Tensor

from foreshock.ops import RollingZScore
from foreshock.ops.rolling_zscore.state import Settings, State
from tests.interpreter import NO_EXTENSION, NO_TRITON, run_python
from tests.ops.rolling_zscore_cases import COMPILED, CPU, IMPLEMENTATIONS, run, troubled, use

PLAIN = Settings.of(2, 0, None, 1e6)


# ---- values


VIEWS = {
    "dense": lambda x: x.clone(),
    "every second": lambda x: x.repeat_interleave(2)[::2],
    "expanded": lambda x: x[:1].expand(len(x)),
    "needs a gradient": lambda x: x.clone().requires_grad_(),
    "a parameter": lambda x: torch.nn.Parameter(x.clone()),
    "a lazy negation": lambda x: torch.complex(x, x).conj().imag,
    "a column": lambda x: x[:, None].expand(-1, 3)[:, 1],
    "offset": lambda x: torch.cat([x[:1], x])[1:],
}


@pytest.mark.parametrize("series", [1, 6])
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_a_view_is_read_as_it_is(implementation: str, view: Any, series: int) -> None:
    zscore, right = RollingZScore(series, 4, min_count=2), RollingZScore(series, 4, min_count=2)
    for _ in range(7):
        x = view(torch.randn(series, dtype=torch.float64))
        before = x.detach().clone()
        expected = right.push([float(v) for v in x.tolist()])
        assert torch.equal(zscore.push(x), expected)
        assert torch.equal(x.detach(), before)
        assert not zscore.push(x).requires_grad
        right.push(before)


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kept", [torch.float64, torch.float32], ids=str)
def test_values_of_any_floating_type_are_converted(
    implementation: str, dtype: torch.dtype, kept: torch.dtype
) -> None:
    zscore, right = (RollingZScore(5, 4, min_count=2, dtype=kept) for _ in range(2))
    for _ in range(7):
        x = torch.randn(5).to(dtype)
        z = zscore.push(x)
        assert z.dtype is kept
        assert torch.equal(z, right.push(x.double()))


def test_numbers_are_taken_as_they_are_written(implementation: str) -> None:
    by_list, by_float, by_scalar, by_number = (RollingZScore(1, 5, min_count=2) for _ in range(4))
    for x in (0.1, 2, -3.5, math.nan, 1e300, 7):
        z = by_list.push([x]).item()
        scalar = torch.tensor(x, dtype=torch.float64)
        others = by_float.push_float(x), by_scalar.push(scalar).item(), by_number.push(x).item()
        for other in others:
            assert other == z or (math.isnan(z) and math.isnan(other))
    states = [s.state_dict() for s in (by_list, by_float, by_number)]
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name])
        assert torch.equal(tensor, states[2][name])


def test_a_single_precision_series_is_rounded_before_anything_else(implementation: str) -> None:
    zscore = RollingZScore(1, 4, min_count=1, dtype=torch.float32)
    zscore.push_float(0.1)
    assert zscore.push_float(0.1) == 0
    assert zscore.push(torch.tensor([0.1], dtype=torch.float64)).item() == 0
    assert zscore.push(torch.tensor([0.1], dtype=torch.float32)).item() == 0
    assert zscore.mean.item() == torch.tensor(0.1).item()
    assert math.isnan(zscore.push_float(1e300))
    assert zscore.nonfinite.item() == 1


def test_no_series_at_all(implementation: str) -> None:
    zscore = RollingZScore(0, 4)
    assert zscore.push(torch.empty(0)).shape == (0,)
    assert zscore.push([]).shape == (0,)
    for what in (zscore.mean, zscore.std, zscore.count, zscore.nonfinite):
        assert what.shape == (0,)
    zscore.load_state_dict(zscore.state_dict())


def test_a_dtensor_is_read_by_its_local_shard(tmp_path: Any) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        zscore, right = RollingZScore(3, 4, min_count=2), RollingZScore(3, 4, min_count=2)
        for _ in range(5):
            x = torch.randn(3)
            assert torch.equal(zscore.push(distribute_tensor(x, mesh, [Shard(0)])), right.push(x))
    finally:
        dist.destroy_process_group()


def test_without_the_extension_the_reference_runs() -> None:
    done = run_python(
        """
        import foreshock as fs
        from foreshock.ops._backend import choose
        zscore = fs.ops.RollingZScore(1, 4, min_count=2)
        z = [zscore.push_float(x) for x in (1.0, 3.0, 4.0)]
        assert z == [0, 0, 2] and zscore.push([2.0]).shape == (1,), z
        print(choose("rolling_zscore", "cpu").backend)
        """,
        NO_EXTENSION,
        NO_TRITON,
    )
    assert done.stdout.strip() == "reference", done.stderr


# ---- what is refused


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        (torch.zeros(4), ValueError, r"values has shape \(4,\); accepted: \(3,\)"),
        (torch.zeros(3, 1), ValueError, r"values has shape \(3, 1\); accepted: \(3,\)"),
        (torch.zeros(()), ValueError, r"values has shape \(\); accepted: \(3,\)"),
        (1.0, ValueError, r"values has shape \(\); accepted: \(3,\)"),
        ([1.0, 2.0], ValueError, r"values has shape \(2,\); accepted: \(3,\)"),
        (torch.zeros(3, dtype=torch.int64), TypeError, "values has dtype torch.int64; accepted"),
        (torch.zeros(3, dtype=torch.complex64), TypeError, "values has dtype torch.complex64"),
        (torch.zeros(3, device="meta"), ValueError, "values is on meta; accepted: cpu"),
        ("abc", TypeError, "values is a str; accepted: a floating-point tensor or 3 numbers"),
        (None, TypeError, "values is a NoneType; accepted"),
        ([1.0, None, 2.0], TypeError, "values is a list; accepted"),
        (torch.eye(3)[0].to_sparse(), TypeError, "values has layout torch.sparse_coo"),
    ],
)
def test_values_that_are_no_values_are_named(values: Any, error: Any, message: str) -> None:
    zscore = RollingZScore(3, 4)
    with pytest.raises(error, match=message):
        zscore.push(values)
    assert zscore.count.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_series": -1}, ValueError, "num_series is -1; accepted: 0 or more"),
        ({"num_series": 1.0}, TypeError, "num_series is a float; accepted: an int"),
        ({"num_series": True}, TypeError, "num_series is a bool; accepted: an int"),
        ({"window": 0}, ValueError, "window is 0; accepted: 1 or more"),
        ({"min_count": 0}, ValueError, "min_count is 0; accepted: 1 or more"),
        ({"min_count": 9}, ValueError, "min_count is 9; accepted: .* not more than window, 8"),
        ({"ddof": 8}, ValueError, "min_count is 8; accepted: more than ddof, 8"),
        ({"ddof": -1}, ValueError, "ddof is -1; accepted: 0 or more"),
        ({"window": 1, "ddof": 1}, ValueError, "min_count is 1; accepted: more than ddof, 1"),
        ({"clip": 0}, ValueError, "clip is 0; accepted: a finite number above 0"),
        ({"clip": math.nan}, ValueError, "clip is nan; accepted: a finite number above 0"),
        ({"clip": "3"}, TypeError, "clip is a str; accepted: a number"),
        ({"z_cap": math.inf}, ValueError, "z_cap is inf; accepted: a finite number above 0"),
        ({"z_cap": None}, TypeError, "z_cap is a NoneType; accepted: a number"),
        ({"dtype": torch.float16}, ValueError, "dtype is torch.float16; accepted: torch.float64"),
    ],
)
def test_arguments_that_make_no_sense_are_named(
    arguments: dict[str, Any], error: Any, message: str
) -> None:
    with pytest.raises(error, match=message):
        RollingZScore(**({"num_series": 2, "window": 8} | arguments))


def test_push_float_is_for_one_series() -> None:
    with pytest.raises(ValueError, match="there are 2 series on cpu; accepted: one on the CPU"):
        RollingZScore(2, 8).push_float(1.0)
    with pytest.raises(TypeError):
        RollingZScore(1, 8).push_float("1")  # type: ignore[arg-type]


# ---- what a call leaves


def test_pushing_allocates_nothing(implementation: str) -> None:
    """Trap 21; and the memory is what the docstring says."""
    zscore = RollingZScore(64, 128)
    x = torch.randn(64, dtype=torch.float64)
    z = zscore.push(x)
    addresses = [t.data_ptr() for t in (*zscore._state, z)]
    assert sum(t.nbytes for t in (*zscore._state, z)) == 8 * (128 + 8) * 64
    tracemalloc.start()
    try:
        for tick in range(400):
            if tick == 200:
                before = tracemalloc.get_traced_memory()[0]
            assert zscore.push(x) is z
        # Less than one object a push; torch and the interpreter keep something now and then.
        assert tracemalloc.get_traced_memory()[0] - before < 200 * 32
    finally:
        tracemalloc.stop()
    assert [t.data_ptr() for t in (*zscore._state, z)] == addresses


def test_a_vector_in_place_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in COMPILED:
        use(name, monkeypatch)
        zscore = RollingZScore(6, 4)
        monkeypatch.setattr(zscore, "_push_any", None)
        zscore.push(torch.randn(6, dtype=torch.float64))
        with pytest.raises(TypeError):
            zscore.push(torch.randn(6))


def test_the_properties_share_no_memory(implementation: str) -> None:
    zscore = RollingZScore(2, 4)
    zscore.push([1.0, math.nan])
    found = [zscore.mean, zscore.std, zscore.count, zscore.nonfinite, *zscore.state_dict().values()]
    kept = [f.clone() for f in found]
    for _ in range(9):
        zscore.push([5.0, math.inf])
    for was, now in zip(kept, found, strict=True):
        assert torch.equal(was.nan_to_num(7), now.nan_to_num(7))


def test_an_object_outlives_what_it_was_made_from() -> None:
    """The kernels hold addresses; what they point to must be held as well."""
    pushes = [RollingZScore(1, 64).push_float for _ in range(20)]
    others = [torch.full((64,), math.nan) for _ in range(200)]
    for push in pushes:
        assert [push(float(x)) for x in range(40)][:32] == [0.0] * 32
    assert len(others) == 200


# ---- under torch.compile


def arguments(series: int, window: int, clip: float | None) -> tuple[Any, ...]:
    values = troubled(3 * window, series)
    _, state = run(IMPLEMENTATIONS["reference"].bind, values, window, PLAIN, torch.float64)
    return (*state, 2, 0, clip, 1e6)


def test_opcheck() -> None:
    for series, window, clip in ((5, 3, None), (1, 1, 2.0), (0, 4, None)):
        for x in (torch.randn(series), torch.randn(2 * series).double()[::2]):
            torch.library.opcheck(
                torch.ops.foreshock.rolling_zscore.default, (x, *arguments(series, window, clip))
            )


def test_the_op_is_a_push(implementation: str) -> None:
    *state, _, _, clip, z_cap = arguments(7, 5, 3.0)
    mine = [t.clone() for t in state]
    z = torch.empty(7, dtype=torch.float64)
    for _ in range(8):
        x = torch.randn(7)
        found = torch.ops.foreshock.rolling_zscore(x, *mine, 3, 1, clip, z_cap)
        IMPLEMENTATIONS[implementation].bind(State(*state), Settings(3, 1, 3.0, 1e6))(x, z)
        assert torch.equal(found, z)
    assert all(map(torch.equal, state, mine))


def test_a_push_compiles_as_a_full_graph() -> None:
    zscore, right = RollingZScore(4, 6, min_count=2), RollingZScore(4, 6, min_count=2)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def watch(x: Tensor) -> Tensor:
        return zscore.push(x.sin()) + 1

    for _ in range(9):
        x = torch.randn(4, dtype=torch.float64)
        assert torch.equal(watch(x), right.push(x.sin()) + 1)
    for name, tensor in right.state_dict().items():
        assert torch.equal(zscore.state_dict()[name], tensor)


def test_gradients_do_not_flow_through_it() -> None:
    x = torch.randn(4, requires_grad=True)
    state = State.empty(4, 3, torch.float64, CPU)
    assert not torch.ops.foreshock.rolling_zscore(x, *state, 1, 0, None, 1e6).requires_grad
    assert not RollingZScore(4, 3).push(x).requires_grad
