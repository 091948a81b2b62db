"""SoftAssigner: what it says is what soft_assign says of mapped rows, for every implementation and
instruction set that runs here, and for the one composed of torch's own."""

from __future__ import annotations

import copy
import gc
import math
import pickle
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from foreshock.ops import Assignment, SoftAssigner, soft_assign
from foreshock.ops.soft_assign import cpu
from tests.ops import soft_assign_cases
from tests.ops.soft_assign_cases import COMPILED, IMPLEMENTATIONS, direct

COMPOSED = SimpleNamespace(forward=cpu.forward, backward=cpu.backward)
BINDINGS = [*IMPLEMENTATIONS, "composed"]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
IDS = [str(dtype).removeprefix("torch.") for dtype in DTYPES]

# |found - expected| / (1 + |expected|) of D with rows and a basis of unit spread, as measured: of
# float32 some 4e-6 for 1000 inputs.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}


@pytest.fixture(params=BINDINGS, autouse=True)
def binding(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(soft_assign_cases.IMPLEMENTATIONS, "composed", COMPOSED)
    soft_assign_cases.use(request.param, monkeypatch)
    return str(request.param)


def mapping(
    inputs: int, features: int, codes: int, dtype: Any = torch.float32
) -> dict[str, Tensor]:
    return {
        "centers": torch.randn(codes, features, dtype=dtype),
        "offset": torch.randn(inputs, dtype=dtype),
        "basis": torch.randn(inputs, features, dtype=dtype) / math.sqrt(inputs),
    }


def expected_of(x: Tensor, given: dict[str, Tensor], temperature: float) -> dict[str, Tensor]:
    z = (x.double() - given["offset"].double()) @ given["basis"].double()
    return {**direct(z, given["centers"], temperature), "mapped": z}


def assert_agrees(code: Assignment, expected: dict[str, Tensor], tolerance: float) -> None:
    d2 = expected["d2"]
    chosen = d2.gather(-1, code.best_index[..., None])[..., 0]
    assert ((chosen - expected["distance"]) <= tolerance * (1 + chosen)).all()
    for name in ("distance", "length", "entropy", "mapped"):
        found = getattr(code, name).double()
        torch.testing.assert_close(
            found, expected[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("computed", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_codes_are_those_of_the_mapped_rows(computed: torch.dtype, dtype: torch.dtype) -> None:
    for rows, inputs, features, codes in (
        (1, 1, 1, 1),
        (13, 3, 2, 5),
        (49, 64, 8, 17),
        (70, 65, 33, 64),
        (97, 130, 70, 33),
        (5, 1000, 32, 64),
    ):
        given, x = mapping(inputs, features, codes, computed), torch.randn(rows, inputs).to(dtype)
        assigner = SoftAssigner(**given, temperature=features)
        code = assigner(x, return_mapped=True)
        assert code.distance.dtype == code.mapped.dtype == computed
        assert_agrees(code, expected_of(x, given, features), TOLERANCE[computed])
        assert assigner.distance(x).equal(code.distance)
        assert assigner(x).mapped is None


def test_without_a_basis_it_is_soft_assign_bit_for_bit() -> None:
    x, centers = torch.randn(70, 9), torch.randn(33, 9)
    code, known = (
        SoftAssigner(centers, temperature=3.0)(x),
        soft_assign(x, centers, temperature=3.0),
    )
    for name in ("best_index", "distance", "length", "entropy"):
        assert getattr(code, name).equal(getattr(known, name))
    moved = SoftAssigner(centers, offset=torch.full((9,), 0.5)).distance(x)
    torch.testing.assert_close(moved, soft_assign(x - 0.5, centers).distance)


def test_a_writer_writes_what_distance_returns_and_leaves_alone_what_it_cannot_read(
    binding: str,
) -> None:
    given = mapping(10, 4, 6)
    assigner, whole = SoftAssigner(**given), torch.randn(8, 6, 20)
    out = torch.full((8, 6), 7.0)
    write = assigner.writer(out)
    if binding not in COMPILED:
        assert write is None
        return
    assert write is not None
    for x in (whole[..., :10], whole[..., 10:].double(), whole[..., 5:15].bfloat16()):
        assert write(x)
        assert torch.equal(out, assigner.distance(x))
    before = out.clone()
    parameter = torch.nn.Parameter(whole[..., :10].clone())
    for x in (whole, whole[0, :, :10], whole[..., ::2], whole[:, :5, :10], parameter, None, 3):
        assert not write(x)
    assert not write(whole[..., :10].reshape(48, 10))  # as many rows, of another shape
    assert torch.equal(out, before)


def test_a_writer_outlives_the_assigner(binding: str) -> None:
    if binding not in COMPILED:
        return
    given, out, x = mapping(10, 4, 6), torch.empty(5), torch.randn(5, 10)
    expected = SoftAssigner(**given).distance(x)
    write = SoftAssigner(**given).writer(out)
    gc.collect()
    assert write is not None
    assert write(x)
    assert torch.equal(out, expected)


@pytest.mark.parametrize(
    "out",
    [torch.empty(5).double(), torch.empty(10)[::2], torch.empty(5, device="meta")],
    ids=["dtype", "strides", "device"],
)
def test_a_place_that_no_distance_fits_is_refused(out: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"out is .*accepted: torch\.float32 on cpu, contiguous"):
        SoftAssigner(**mapping(10, 4, 6)).writer(out)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_an_offset_of_a_thousand_spreads_takes_no_digits(dtype: torch.dtype) -> None:
    """Trap 30: where it is taken off after the product, some 1e-4 is all that is left."""
    given = mapping(512, 32, 20)
    given["offset"] = 1000 + torch.randn(512)
    x = given["offset"].to(dtype) + torch.randn(60, 512, dtype=dtype)
    code = SoftAssigner(**given, temperature=32)(x, return_mapped=True)
    assert_agrees(code, expected_of(x, given, 32), 1e-5)


def test_views_are_read_as_they_lie_and_nothing_at_all_has_no_codes() -> None:
    given = mapping(10, 4, 6)
    assigner, whole = SoftAssigner(**given), torch.randn(8, 6, 20)
    for x in (
        whole[..., :10],
        whole[::2, :, 5:15],
        whole[:, 1, :10],
        whole[:, :, ::2],
        whole.transpose(0, 1)[..., :10],
        whole[0, :1, :10].expand(5, 10),
        torch.randn(10, 7).t(),
        torch.randn(2, 3, 4, 10),
        torch.randn(10),
        torch.nn.Parameter(torch.randn(3, 10)),
        torch.randn(3, 10, requires_grad=True) * 1,
    ):
        code = assigner(x, return_mapped=True)
        assert code.distance.shape == code.best_index.shape == x.shape[:-1]
        assert code.mapped.shape == (*x.shape[:-1], 4)
        assert not code.distance.requires_grad
        assert_agrees(code, expected_of(x.detach(), given, 1.0), 2e-5)
        assert assigner.distance(x).equal(code.distance)
    for shape in ((0, 10), (3, 0, 10)):
        assert assigner(torch.empty(shape)).length.shape == shape[:-1]
        assert assigner.distance(torch.empty(shape)).shape == shape[:-1]
    single = SoftAssigner(torch.randn(3, 1))
    assert single.distance(torch.randn(4, 2)[:, :1]).shape == (4,)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38])
def test_what_is_not_finite_stays_in_its_row_and_never_looks_near(bad: float) -> None:
    given, x = mapping(70, 5, 20), torch.randn(60, 70)
    assigner = SoftAssigner(**given)
    clean = assigner.distance(x)
    x[17, 66] = bad
    code, distance = assigner(x), assigner.distance(x)
    others = torch.arange(60) != 17
    assert distance[others].equal(clean[others])
    assert not distance[17] < 1e30
    assert torch.equal(distance.isnan(), code.distance.isnan())
    assert code.length[17].isnan() or code.distance[17] == math.inf or bad == 3e38


def test_a_nan_among_the_centers_is_a_nan_for_all() -> None:
    for codes, place in ((20, 7), (64, 63), (5, 0)):
        given = mapping(6, 5, codes)
        given["centers"][place, 2] = math.nan
        assert SoftAssigner(**given).distance(torch.randn(9, 6)).isnan().all()


def test_infinite_distances_and_denormals() -> None:
    far = SoftAssigner(torch.tensor([[-3e38, 0.0], [0.0, -3e38]]))
    x = torch.tensor([[3e38, 3e38], [1.0, 1.0]])
    assert far.distance(x).tolist() == far(x).distance.tolist() == [math.inf, math.inf]
    tiny = torch.full((3, 4), 1e-40)
    code = SoftAssigner(torch.zeros(2, 3), basis=torch.full((4, 3), 0.5))(tiny, return_mapped=True)
    torch.testing.assert_close(code.mapped, torch.full((3, 3), 2e-40), rtol=1e-4, atol=0)
    assert code.distance.tolist() == [0, 0, 0]


def test_rows_are_judged_alike_in_every_batch_and_by_any_number_of_threads() -> None:
    given, x = mapping(130, 32, 64), torch.randn(1000, 130)
    assigner, threads = SoftAssigner(**given), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = assigner(x, return_mapped=True)
        torch.set_num_threads(3)
        assert all(map(torch.equal, whole, assigner(x, return_mapped=True)))
    finally:
        torch.set_num_threads(threads)
    if isinstance(assigner._bound, cpu.Assigner):  # a matrix product of torch may differ
        for size in (1, 7, 64):
            parts = [assigner.distance(part) for part in x[:100].split(size)]
            assert torch.cat(parts).equal(whole.distance[:100])


def test_calls_of_several_threads_do_not_meet() -> None:
    assigners = [SoftAssigner(**mapping(64, 8, n)) for n in (5, 300)]
    batches = [torch.randn(n, 64) for n in (3, 200, 700)] * 8
    jobs = [(one, x) for one in assigners for x in batches]
    expected = [one.distance(x) for one, x in jobs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda job: job[0].distance(job[1]), jobs))
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_changes_in_place_are_taken_over_by_refresh(dtype: torch.dtype) -> None:
    given, x = mapping(6, 3, 4, dtype), torch.randn(20, 6)
    assigner = SoftAssigner(**given)
    before = assigner.distance(x)
    given["centers"].data.mul_(2)
    given["basis"].data.add_(1)
    assigner.refresh()
    assert not assigner.distance(x).equal(before)
    assert assigner.distance(x).equal(SoftAssigner(**given).distance(x))


def test_copies_are_bound_to_memory_of_their_own() -> None:
    given, x = mapping(6, 3, 4), torch.randn(20, 6)
    assigner = SoftAssigner(**given, temperature=0.7)
    expected = assigner(x).length
    twins = [copy.deepcopy(assigner), pickle.loads(pickle.dumps(assigner))]
    given["centers"].zero_()
    assigner.refresh()
    for twin in twins:
        twin.refresh()
        assert twin(x).length.equal(expected)


def test_inputs_are_not_written_to_and_autocast_does_not_reach_the_codes() -> None:
    given, x = mapping(64, 8, 9), torch.randn(50, 64)
    kept = {name: tensor.clone() for name, tensor in given.items()}, x.clone()
    assigner = SoftAssigner(**given)
    expected = assigner.distance(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert assigner.distance(x).equal(expected)
    assert all(given[name].equal(tensor) for name, tensor in kept[0].items())
    assert x.equal(kept[1])


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"centers": None}, TypeError, "centers is None; accepted: a tensor"),
        ({"centers": torch.zeros(2, 3).int()}, TypeError, "centers has dtype int32; accepted"),
        ({"centers": torch.zeros(0, 3)}, ValueError, r"centers has shape \(0, 3\); accepted"),
        ({"basis": torch.zeros(5, 4)}, ValueError, r"basis has shape \(5, 4\); accepted: \(D, 3\)"),
        ({"offset": torch.zeros(3)}, ValueError, r"offset has shape \(3,\); accepted: \(5,\)"),
        ({"offset": [0.0]}, TypeError, "offset is a list"),
        ({"basis": torch.zeros(5, 3, device="meta")}, ValueError, "basis is on the meta device"),
        ({"temperature": 0.0}, ValueError, "temperature is 0.0; accepted: a finite number above"),
        ({"eps": math.nan}, ValueError, "eps is nan; accepted: a finite number from 0 up"),
    ],
)
def test_bad_frames_are_named(arguments: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        SoftAssigner(**{"centers": torch.zeros(2, 3), "basis": torch.zeros(5, 3), **arguments})


@pytest.mark.parametrize(
    ("x", "error", "said"),
    [
        ([1.0], TypeError, "x is a list; accepted"),
        (torch.zeros(2, 5).int(), TypeError, "x has dtype int32; accepted: float64"),
        (torch.zeros(2, 5).to(torch.float8_e5m2), TypeError, "x has dtype float8_e5m2"),
        (
            torch.zeros(2, 4),
            ValueError,
            r"x has shape \(2, 4\) on cpu; accepted: \(..., 5\)",
        ),
        (torch.randn(2, 5).cfloat().conj().imag, TypeError, "x is a lazy negation; accepted"),
        (torch.zeros(()), ValueError, r"x has shape \(\)"),
        (torch.zeros(2, 5, device="meta"), ValueError, "x is on the meta device"),
    ],
)
def test_bad_rows_are_named(x: Any, error: type[Exception], said: str) -> None:
    assigner = SoftAssigner(torch.zeros(2, 3), basis=torch.zeros(5, 3))
    for call in (assigner, assigner.distance):
        with pytest.raises(error, match=said):
            call(x)


def test_the_compiled_kernel_serves_the_cpu(binding: str) -> None:
    is_compiled = binding in COMPILED
    assert isinstance(SoftAssigner(torch.zeros(2, 3))._bound, cpu.Assigner) == is_compiled
