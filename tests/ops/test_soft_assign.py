"""soft_assign: every claim about codes, their length and entropy, and the gradients, for every
implementation and instruction set that runs here."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from foreshock.ops import SoftCode, soft_assign
from foreshock.ops._backend import choose
from tests.interpreter import run_python
from tests.ops.soft_assign_cases import SCALARS, direct

HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float64, torch.float32, *HALF)
IDS = [str(dtype).removeprefix("torch.") for dtype in DTYPES]

# Against the definition in float64, |found - expected| / (1 + |expected|), with temperature D.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}


def assert_agrees(code: SoftCode, expected: dict[str, Tensor]) -> None:
    tolerance = TOLERANCE[code.distance.dtype]
    d2 = expected["d2"]
    chosen = d2.gather(-1, code.best_index[..., None])[..., 0]
    least = expected["distance"]
    assert ((chosen - least) <= 1e-6 * least).all()  # equal but where rounding decides
    for name in SCALARS:
        found = getattr(code, name).double()
        torch.testing.assert_close(found, expected[name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("features", [1, 3, 8, 17, 64, 768, 1000])
def test_codes_are_those_of_the_definition(
    implementation: str, features: int, dtype: torch.dtype
) -> None:
    for rows, codes in ((1, 1), (9, 2), (37, 33), (70, 130)):
        x, centers = torch.randn(rows, features).to(dtype), torch.randn(codes, features).to(dtype)
        expected = direct(x, centers, temperature=features)
        code = soft_assign(x, centers, temperature=features, return_probs=True)
        assert_agrees(code, expected)
        assert code.probs is not None
        torch.testing.assert_close(code.probs.double(), expected["probs"], rtol=0, atol=2e-7)
        if dtype == torch.float64:
            assert torch.equal(code.best_index, expected["best_index"])


@pytest.mark.parametrize("temperature", [1e-3, 0.3, 10.0, 1e6])
@pytest.mark.parametrize("eps", [0.0, 1e-30, 1e-12, 1e-4, 0.5])
def test_every_temperature_and_eps(implementation: str, temperature: float, eps: float) -> None:
    for dtype in (torch.float64, torch.float32):
        x, centers = torch.randn(41, 4, dtype=dtype), torch.randn(50, 4, dtype=dtype)
        expected = direct(x, centers, temperature, eps)
        code = soft_assign(x, centers, temperature=temperature, eps=eps)
        # z is as good as the squared distance is, times 1 / temperature.
        slack = 1 + (1e-3 / temperature if dtype == torch.float32 else 1 / temperature) * 10
        for name in SCALARS:
            found = getattr(code, name).double()
            tolerance = TOLERANCE[dtype] * slack
            torch.testing.assert_close(found, expected[name], rtol=tolerance, atol=tolerance)


def test_distances_keep_their_digits_under_an_offset(implementation: str) -> None:
    """Trap 30: an offset of 1000 times the spread, and rows very near a center."""
    for features in (2, 64, 768):
        centers = 1000 + torch.randn(20, features)
        near = centers[torch.arange(30) % 20] + 0.01 * torch.randn(30, features)
        x = torch.cat([1000 + torch.randn(30, features), near])
        expected = direct(x, centers, features)
        code = soft_assign(x, centers, temperature=features, return_probs=True)
        assert torch.equal(code.best_index, expected["best_index"])
        torch.testing.assert_close(code.distance.double(), expected["distance"], rtol=1e-5, atol=0)
        assert code.probs is not None
        torch.testing.assert_close(code.probs.double(), expected["probs"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", HALF, ids=["bfloat16", "float16"])
def test_half_types_are_read_as_they_lie(implementation: str, dtype: torch.dtype) -> None:
    """With the offset that they can hold; what is squared is what is left of it."""
    centers = (100 + torch.randn(20, 64)).to(dtype)
    x = (100 + torch.randn(30, 64)).to(dtype)
    assert_agrees(soft_assign(x, centers, temperature=64), direct(x, centers, 64))


def test_one_enormous_center_does_not_spoil_the_others(implementation: str) -> None:
    x, centers = torch.randn(30, 8), torch.randn(20, 8)
    expected = direct(x, centers, 8)
    for size in (1e12, 1e30):  # whose square overflows
        leaves = x.clone().requires_grad_(), torch.cat([centers, torch.full((1, 8), size)])
        code = soft_assign(*leaves, temperature=8)
        for name in SCALARS:
            found = getattr(code, name).double()
            torch.testing.assert_close(found, expected[name], rtol=2e-6, atol=2e-6, msg=name)
        code.surprise.sum().backward()
        alone = x.clone().requires_grad_()
        direct(alone, centers, 8)["surprise"].sum().backward()
        torch.testing.assert_close(leaves[0].grad, alone.grad, rtol=1e-5, atol=1e-5)


def test_distances_that_overflow_are_infinite_and_alike(implementation: str) -> None:
    x, centers = torch.tensor([[3e38, 3e38], [0, 0]]), torch.tensor([[-3e38, 0], [0, -3e38]])
    code = soft_assign(x, centers)
    assert code.distance.tolist() == [math.inf] * 2
    assert code.best_index.tolist()[1] == 0
    assert code.length[1].item() == pytest.approx(math.log(2))


def test_shapes_strides_and_nothing_at_all(implementation: str) -> None:
    centers = torch.randn(5, 3)
    assert soft_assign(torch.empty(0, 3), centers).length.shape == (0,)
    assert soft_assign(torch.empty(2, 0, 3), centers, return_probs=True).probs.shape == (2, 0, 5)
    one = soft_assign(centers[2], centers)
    assert one.best_index.shape == ()
    assert one.best_index.item() == 2
    assert one.distance.item() == 0
    whole = torch.randn(4, 6, 10)
    for x, c in (
        (whole[::2, :, 1:4], centers),
        (whole.transpose(0, 2)[..., :3], centers.t().contiguous().t()),
        (whole[:1, :1, :3].expand(7, 2, 3), torch.randn(10, 6)[::2, ::2]),
    ):
        code = soft_assign(x, c)
        assert code.length.shape == x.shape[:-1]
        assert_agrees(code, direct(x, c))


def test_a_single_code_is_certain(implementation: str) -> None:
    code = soft_assign(torch.randn(9, 4), torch.randn(1, 4), return_probs=True)
    assert code.best_index.tolist() == [0] * 9
    assert code.length.abs().max() < 1e-6
    assert code.entropy.abs().max() < 1e-6
    assert torch.equal(code.probs, torch.ones(9, 1))


def test_duplicate_centers_share_and_the_first_is_named(implementation: str) -> None:
    centers = torch.randn(6, 8).repeat(4, 1)
    code = soft_assign(centers[:6], centers, temperature=1e-3)
    assert code.best_index.tolist() == list(range(6))
    assert code.length.tolist() == pytest.approx([math.log(4)] * 6, rel=1e-6)
    assert code.entropy.tolist() == pytest.approx([math.log(4)] * 6, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("size", [1e15, 1e30, 1e200])
def test_huge_distances_bring_no_nan(implementation: str, size: float, dtype: torch.dtype) -> None:
    size = min(size, torch.finfo(dtype).max / 4)
    centers = torch.tensor([[size, 0], [-1.0, 2], [3.0, 1]], dtype=dtype)
    x = torch.tensor([[size, 0], [1, 1], [-size, size]], dtype=dtype, requires_grad=True)
    code = soft_assign(x, centers, return_probs=True)
    for part in (code.length, code.entropy, code.probs):
        assert part.isfinite().all()
    assert not code.distance.isnan().any()
    assert code.best_index[:2].tolist() == [0, 2]
    assert code.length[:2].tolist() == pytest.approx(
        direct(x[:2], centers)["length"].tolist(), abs=1e-6
    )
    # Both near centers are alike from there.
    assert code.entropy[2].item() <= math.log(3) + 1e-6
    (code.length + code.entropy).sum().backward()
    assert not x.grad[:2].isnan().any()


@pytest.mark.parametrize("temperature", [1e-300, 1e300])
def test_temperatures_beyond_float32(implementation: str, temperature: float) -> None:
    x, centers = torch.randn(20, 3), torch.randn(9, 3)
    centers[4] = torch.finfo(torch.float32).max
    code = soft_assign(x, centers, temperature=temperature)
    assert torch.equal(code.best_index, direct(x, centers)["best_index"])
    sure = temperature < 1
    for part in (code.length, code.entropy):
        assert part.isfinite().all()
        assert not sure or part.abs().max() < 1e-6


def test_a_nan_is_never_an_answer_that_looks_normal(implementation: str) -> None:
    """Trap 27."""
    x, centers = torch.randn(12, 5), torch.randn(20, 5)
    x[3, 2] = torch.nan
    code = soft_assign(x, centers)
    clean = [i for i in range(12) if i != 3]
    for name in SCALARS:
        part = getattr(code, name)
        assert part[3].isnan()
        assert part[clean].isfinite().all()
    centers[7, 0] = torch.nan
    assert soft_assign(x, centers).length.isnan().all()


def test_the_surprise_weighs_its_parts(implementation: str) -> None:
    x, centers = torch.randn(30, 5), torch.randn(7, 5)
    code = soft_assign(x, centers, beta_length=0.5, beta_entropy=-2, beta_distance=3)
    expected = 0.5 * code.length - 2 * code.entropy + 3 * code.distance.log1p()
    torch.testing.assert_close(code.surprise, expected)
    assert code.probs is None


def test_far_rows_are_surprising_by_their_distance(implementation: str) -> None:
    """Trap 24: length and entropy alone fall with the distance."""
    centers = torch.randn(8, 4)
    x = centers[:1] * torch.tensor([[1.0], [10.0], [100.0]])
    assert (soft_assign(x, centers, beta_distance=1).surprise.diff() > 0).all()


def test_results_do_not_depend_on_threads_or_neighbours(compiled: str) -> None:
    x, centers = torch.randn(1000, 9), torch.randn(40, 9)
    threads = torch.get_num_threads()
    outcomes = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            leaves = x.clone().requires_grad_(), centers.clone().requires_grad_()
            code = soft_assign(*leaves, beta_distance=1)
            outcomes.append((code.surprise, *torch.autograd.grad(code.surprise.sum(), leaves)))
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, *outcomes))
    alone = torch.cat([soft_assign(row[None], centers, beta_distance=1).surprise for row in x[:20]])
    assert torch.equal(alone, outcomes[0][0][:20])


# ---- gradients


def _gradients(
    code: SoftCode, weights: Tensor, leaves: tuple[Tensor, Tensor]
) -> tuple[Tensor, ...]:
    total = sum(
        (w * getattr(code, name).double()).sum() for w, name in zip(weights, SCALARS, strict=True)
    )
    return torch.autograd.grad(total, leaves)


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("eps", [1e-12, 1e-2])
def test_gradients_are_those_of_the_definition(
    implementation: str, eps: float, dtype: torch.dtype
) -> None:
    for rows, codes, features in (
        (1, 1, 1),
        (23, 40, 3),
        (49, 129, 9),
        (67, 260, 130),
        (530, 17, 65),
    ):
        x = torch.randn(rows, features).to(dtype).requires_grad_()
        centers = torch.randn(codes, features).to(dtype).requires_grad_()
        weights = torch.randn(4, rows, dtype=torch.float64)
        code = soft_assign(x, centers, temperature=features, eps=eps)
        found = _gradients(code, weights, (x, centers))
        exact = SoftCode(
            **{k: v for k, v in direct(x, centers, features, eps).items() if k != "d2"}
        )
        expected = _gradients(exact, weights, (x, centers))
        rounding = torch.finfo(dtype).eps if dtype in HALF else 0
        tolerance = rounding + (1e-11 if dtype == torch.float64 else 1e-5)
        for one, other, leaf in zip(found, expected, (x, centers), strict=True):
            assert one.dtype == leaf.dtype
            scale = other.double().abs().max().item()
            torch.testing.assert_close(
                one.double(), other.double(), rtol=tolerance, atol=tolerance * max(1, scale)
            )


def test_gradcheck(implementation: str) -> None:
    x = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    centers = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)

    def parts(x: Tensor, centers: Tensor) -> tuple[Tensor, ...]:
        code = soft_assign(x, centers, temperature=1.7, beta_distance=0.3, return_probs=True)
        assert code.probs is not None
        return code.distance, code.length, code.entropy, code.surprise, code.probs

    assert torch.autograd.gradcheck(parts, (x, centers))


def test_only_the_gradients_that_are_needed(implementation: str) -> None:
    x, centers = torch.randn(20, 3), torch.randn(6, 3)
    both = x.clone().requires_grad_(), centers.clone().requires_grad_()
    expected = torch.autograd.grad(soft_assign(*both).surprise.sum(), both)
    soft_assign(only_x := x.clone().requires_grad_(), centers).surprise.sum().backward()
    soft_assign(x, only_centers := centers.clone().requires_grad_()).surprise.sum().backward()
    torch.testing.assert_close((only_x.grad, only_centers.grad), expected, rtol=1e-6, atol=1e-7)
    assert not soft_assign(x, centers).length.requires_grad
    with torch.no_grad():
        assert not soft_assign(*both).length.requires_grad


def test_gradients_of_views_and_of_repeated_rows(implementation: str) -> None:
    x, centers = torch.randn(6, 4, 9, requires_grad=True), torch.randn(18, 5, requires_grad=True)
    views = x.transpose(0, 2)[:, ::2, 1:6], centers[::2]
    found = torch.autograd.grad(soft_assign(*views, temperature=5).surprise.sum(), (x, centers))
    expected = direct(*views, temperature=5)["surprise"].sum()
    expected = torch.autograd.grad(expected, (x, centers))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_probs_have_the_gradient_of_the_definition() -> None:
    x, centers = torch.randn(40, 7, requires_grad=True), torch.randn(9, 7, requires_grad=True)
    weights = torch.randn(40, 9)
    p = soft_assign(x, centers, temperature=7, return_probs=True).probs
    found = torch.autograd.grad(p, (x, centers), weights)
    expected = torch.autograd.grad(direct(x, centers, 7)["probs"], (x, centers), weights.double())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_no_rows_have_no_gradient(implementation: str) -> None:
    x, centers = torch.empty(0, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    soft_assign(x, centers).surprise.sum().backward()
    assert x.grad.shape == (0, 3)
    assert torch.equal(centers.grad, torch.zeros(4, 3))


def test_a_second_derivative_is_refused() -> None:
    x, centers = torch.randn(4, 3, requires_grad=True), torch.randn(2, 3)
    (gradient,) = torch.autograd.grad(soft_assign(x, centers).length.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="accepted: first derivatives"):
        gradient.sum().backward()
    p = soft_assign(x, centers, return_probs=True).probs
    (gradient,) = torch.autograd.grad(p.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


# ---- the op under torch.compile


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad: bool) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(6, 3, dtype=dtype, requires_grad=requires_grad)
        centers = torch.randn(4, 3, requires_grad=requires_grad)
        torch.library.opcheck(torch.ops.foreshock.soft_assign, (x, centers, 1.0, 1e-12))


def test_the_op_compiles_without_a_break() -> None:
    def loss(x: Tensor, centers: Tensor) -> Tensor:
        return soft_assign(x.sin(), centers, beta_distance=0.5, temperature=2.0).surprise.sum()

    x, centers = torch.randn(7, 2, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of its own
        traced = torch.compile(loss, backend="aot_eager", fullgraph=True)
        found = torch.autograd.grad(traced(x, centers), (x, centers))
    torch.testing.assert_close(found, torch.autograd.grad(loss(x, centers), (x, centers)))


# ---- memory, and what is refused

MEMORY = """
    import resource
    import torch
    from foreshock.ops import soft_assign
    torch.set_num_threads(2)
    x, centers = torch.randn(40_000, 4), torch.randn(4000, 4, requires_grad=True)
    soft_assign(x[:100], centers).surprise.sum().backward()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    soft_assign(x, centers).surprise.sum().backward()
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_no_tensor_of_rows_times_codes() -> None:
    """Which would be 610 MiB here; what is allowed is the scratch, some 6 MiB."""
    done = run_python(MEMORY)
    assert int(done.stdout) < 40, (done.stdout, done.stderr)


PROBS_MEMORY = """
    import resource
    import torch
    from foreshock.ops import soft_assign
    x, centers = torch.randn(30_000, 4), torch.randn(1000, 4, requires_grad=True)
    grad = torch.rand(30_000, 1000)
    p = soft_assign(x[:3000], centers, return_probs=True).probs
    torch.autograd.grad(p, centers, grad[:3000])
    del p
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    p = soft_assign(x, centers, return_probs=True).probs
    torch.autograd.grad(p, centers, grad)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_probs_are_held_once() -> None:
    """114 MiB; float64 tensors of that shape, as plain autograd keeps, would be 229 each."""
    done = run_python(PROBS_MEMORY)
    assert int(done.stdout) < 114 + 50, (done.stdout, done.stderr)


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"x": [1.0]}, TypeError, "x is a list; accepted"),
        ({"x": None}, TypeError, "x is None; accepted: a tensor"),
        ({"x": torch.zeros(3).int()}, TypeError, "x has dtype int32; accepted: float64"),
        ({"x": torch.zeros(())}, ValueError, r"x has shape \(\); accepted: \(..., D\)"),
        ({"x": torch.zeros(2, 0)}, ValueError, r"x has shape \(2, 0\)"),
        ({"centers": torch.zeros(4, 2)}, ValueError, r"centers has shape \(4, 2\); accepted"),
        ({"centers": torch.zeros(0, 3)}, ValueError, r"centers has shape \(0, 3\); accepted"),
        ({"centers": torch.zeros(3)}, ValueError, r"centers has shape \(3,\); accepted"),
        ({"centers": torch.zeros(2, 3, device="meta")}, ValueError, "centers is on the meta"),
        ({"temperature": 0.0}, ValueError, "temperature is 0.0; accepted: a finite number above"),
        ({"temperature": math.nan}, ValueError, "temperature is nan"),
        ({"eps": -1e-9}, ValueError, "eps is -1e-09; accepted: a finite number from 0 up"),
        ({"beta_length": math.inf}, ValueError, "beta_length is inf; accepted: a finite"),
        ({"beta_distance": math.nan}, ValueError, "beta_distance is nan"),
    ],
)
def test_bad_input_is_named(arguments: dict[str, Any], error: type[Exception], said: str) -> None:
    given = {"x": torch.zeros(5, 3), "centers": torch.zeros(2, 3), **arguments}
    with pytest.raises(error, match=said):
        soft_assign(**given)


def test_the_compiled_kernel_serves_the_cpu() -> None:
    assert choose("soft_assign", "cpu").backend == "cpu"
