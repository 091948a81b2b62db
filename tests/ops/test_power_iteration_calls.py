"""power_iteration: its functions, its bound form and its state, memory and torch.compile."""

from __future__ import annotations

import math
import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from foreshock.ops import PowerIterator, PowerState, kappa, power_iteration
from foreshock.ops.power_iteration import lanczos
from foreshock.ops.power_iteration.matrices import Layout, as_matrix, layout_of
from tests.ops.power_iteration_cases import (
    error_of,
    random_vectors,
    with_spectrum,
)

# ---- memory


def peak_growth_of(code: str) -> int:
    """By how many bytes the second half of a program lifts the highest water mark of the first."""
    program = """
        import sys, torch
        def mark():
            lines = open("/proc/self/status").read().splitlines()
            return int(next(l.split()[1] for l in lines if l.startswith("VmHWM"))) * 1024
        from foreshock.ops import PowerIterator, power_iteration
        torch.set_num_threads(2)
        PowerIterator([torch.randn(600, 700).bfloat16(), torch.randn(600, 700)])()
    """
    program = textwrap.dedent(program) + textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("view", ["W", "W.t()"], ids=["rows", "transposed"])
def test_no_copy_is_made_of_a_half_precision_weight(view: str) -> None:
    """A bound of 4 % of the weight, for 0.4 % of vectors; a float32 copy would be 200 %."""
    growth = peak_growth_of(f"""
        W = torch.empty(8192, 8192, dtype=torch.bfloat16).uniform_(-1, 1)
        W = {view}
        iterator = PowerIterator([W], recheck=True)
        before = mark()
        iterator(); iterator()
        print(mark() - before)
    """)
    assert growth <= 0.04 * 8192 * 8192 * 2


class NothingDispatched(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} was called")


def test_a_warm_call_of_a_bound_iterator_calls_nothing_of_torch(compiled: str) -> None:
    iterator = PowerIterator([torch.randn(8, 9), torch.randn(4), torch.randn(3, 2, 2)])
    iterator()
    with NothingDispatched():
        iterator()
    with pytest.raises(AssertionError, match="was called"), NothingDispatched():
        iterator(iters=6)


# ---- the public function and its result


def test_vectors_are_skipped_and_listed(implementation: str) -> None:
    weights = [torch.ones(3), torch.randn(4, 5), None, torch.ones(()), torch.randn(2, 3, 4)]
    stats, state = power_iteration(weights)
    assert stats.index.tolist() == [1, 4]
    assert stats.index.dtype == torch.int64
    assert stats.skipped == (0, 2, 3)
    assert [layout.columns for layout in state.layouts] == [5, 12]
    alone, _ = power_iteration(weights[1])
    assert alone.sigma_max.item() == pytest.approx(stats.sigma_max[0].item(), rel=1e-2)


def test_derived_values_follow_from_the_fields(implementation: str) -> None:
    weights = [torch.randn(30, 8), torch.randn(4, 2, 3, 3).double()]
    stats, _ = power_iteration(weights)
    for m, rank_bound in enumerate((8, 4)):
        sigma, frobenius = stats.sigma_max[m].item(), stats.frobenius[m].item()
        proxy = frobenius / (10 * math.sqrt(rank_bound))
        assert frobenius == pytest.approx(weights[m].double().norm().item(), rel=1e-6)
        assert stats.kappa_tilde[m].item() == pytest.approx(sigma / (proxy + 1e-8), rel=1e-12)
        assert stats.stable_rank[m].item() == pytest.approx((frobenius / sigma) ** 2, rel=1e-12)
    for name in ("sigma_max", "frobenius", "kappa_tilde", "stable_rank", "growth", "residual"):
        assert getattr(stats, name).dtype == torch.float64
        assert getattr(stats, name).shape == (2,)


def test_the_result_is_frozen() -> None:
    with pytest.raises(AttributeError):
        power_iteration([torch.ones(2, 2)])[0].sigma_max = torch.ones(1)  # type: ignore[misc]


def test_a_state_that_is_passed_in_is_not_changed(implementation: str) -> None:
    W = torch.randn(20, 10)
    _, state = power_iteration([W])
    before, was_warm = state.vectors.clone(), state.is_warm
    _, later = power_iteration([W], state)
    assert torch.equal(state.vectors, before)
    assert state.is_warm == was_warm
    assert not torch.equal(later.vectors, before)


def test_functions_and_iterator_agree(implementation: str) -> None:
    weights = [torch.randn(20, 10), torch.randn(5, 7)]
    iterator = PowerIterator(weights, seed=2)
    state = None
    for iters in (None, None, 3, None):
        stats, state = power_iteration(weights, state, iters=iters, seed=2)
        assert torch.equal(iterator(iters=iters).packed, stats.packed)
    assert torch.equal(iterator.state.vectors, state.vectors)


class Wrapper(torch.Tensor):
    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        raise AssertionError("must not be called")


BAD_WEIGHTS = {
    "integers": (lambda: [torch.ones(2, 2), torch.ones(3, 3).long()], r"weights\[1\].*int64"),
    "float8": (lambda: [torch.ones(2, 2).to(torch.float8_e5m2)], r"weights\[0\].*float8_e5m2"),
    "complex": (lambda: [torch.ones(2, 2, dtype=torch.complex64)], r"weights\[0\].*complex64"),
    "a number": (lambda: [torch.ones(2, 2), 3.0], r"weights\[1\] is a float"),
    "not a list": (lambda: 7, r"weights is a int"),
    "two devices": (lambda: [torch.ones(1, 1), torch.ones(1, 1, device="meta")], r"weights\[1\]"),
    "sparse": (lambda: [torch.eye(3).to_sparse()], r"weights\[0\].*layout"),
    "wrapper": (lambda: [torch.Tensor._make_wrapper_subclass(Wrapper, (2, 2))], r"weights\[0\]"),
}


@pytest.mark.parametrize(("make", "message"), BAD_WEIGHTS.values(), ids=BAD_WEIGHTS)
@pytest.mark.parametrize("call", [power_iteration, PowerIterator], ids=["function", "iterator"])
def test_bad_weights_are_named(call: Any, make: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call(make())


@pytest.mark.parametrize("iters", [0, -1, 1.0, True, "2"], ids=repr)
def test_bad_iters_are_named(iters: Any) -> None:
    for call in (
        lambda: power_iteration([torch.ones(2, 2)], iters=iters),
        lambda: PowerIterator([torch.ones(2, 2)])(iters=iters),
    ):
        with pytest.raises((TypeError, ValueError), match=r"iters is .*accepted"):
            call()


def test_a_state_of_other_weights_is_named() -> None:
    _, state = power_iteration([torch.ones(2, 3), torch.ones(4), torch.ones(5, 6)])
    with pytest.raises(ValueError, match=r"weights\[2\] has shape \(5, 7\).*\(5, 6\)"):
        power_iteration([torch.ones(2, 3), torch.ones(4), torch.ones(5, 7)], state)
    with pytest.raises(ValueError, match="state is for 2 matrices, weights has 1"):
        power_iteration([torch.ones(2, 3)], state)
    iterator = PowerIterator([torch.ones(2, 3)])
    with pytest.raises(ValueError, match=r"weights\[0\] has shape \(3, 3\)"):
        iterator([torch.ones(3, 3)])


def test_kappa_of_one_matrix() -> None:
    W = with_spectrum(20, 12, torch.linspace(5, 0.5, 12).double())
    assert kappa(W).item() == pytest.approx(10, rel=1e-9)
    assert kappa(W.t().float()).item() == pytest.approx(10, rel=1e-4)
    tilde = power_iteration([W])[0].kappa_tilde.item()
    assert kappa(W, exact=False).item() == pytest.approx(tilde, rel=1e-12)
    assert kappa(torch.randn(4, 2, 3, 3)).isfinite()
    assert kappa(torch.zeros(3, 3)).item() == math.inf
    assert kappa(torch.full((3, 3), math.nan)).isnan()
    assert kappa(torch.zeros(3, 3), exact=False).item() == 0
    for bad in (torch.ones(3), torch.ones(0, 3), 4.0, torch.ones(2, 2, dtype=torch.int32)):
        with pytest.raises((TypeError, ValueError), match="W"):
            kappa(bad)  # type: ignore[arg-type]


# ---- the bound iterator and its state


def test_the_iterator_sees_the_weights_as_they_are_now(implementation: str) -> None:
    W = torch.randn(20, 30)
    iterator = PowerIterator([W])
    before = iterator().clone()
    W *= 2
    after = iterator()
    assert after.frobenius.item() == pytest.approx(2 * before.frobenius.item(), rel=1e-6)
    assert after.sigma_max.item() == pytest.approx(2 * before.sigma_max.item(), rel=1e-2)


@pytest.mark.parametrize("is_parameter", [False, True], ids=["tensor", "parameter"])
def test_the_iterator_follows_weights_that_move_and_stays_warm(is_parameter: bool) -> None:
    W = torch.randn(20, 30)
    weight = torch.nn.Parameter(W) if is_parameter else W
    iterator = PowerIterator([torch.ones(3), weight])
    iterator()
    v = iterator.state.vectors.clone()
    weight.data = (2 * weight.detach()).double()
    stats = iterator()
    assert iterator.state.is_all_warm
    assert max(error_of(stats, [weight.detach()])) <= 0.01
    assert not torch.equal(iterator.state.vectors, v)
    other = 3 * weight.detach()
    assert iterator([torch.ones(3), other]).frobenius.item() == pytest.approx(other.norm().item())


def test_a_weight_in_another_memory_order_starts_cold(implementation: str) -> None:
    weights = [torch.randn(20, 30), torch.randn(9, 9)]
    iterator = PowerIterator(weights)
    iterator()
    kept = iterator.state.vectors[:, 30:].clone()
    turned = [weights[0].t().contiguous().t(), weights[1]]
    state = iterator.state.fitted(PowerIterator(turned).state, [0, 1])
    assert state.is_warm == (False, True)
    assert torch.equal(state.vectors[:, 20:], kept)
    assert max(error_of(iterator(turned), turned)) <= 0.01
    assert iterator.state.is_all_warm


def test_without_the_recheck_the_memory_bound_first_is_read_and_kept_alive() -> None:
    p = torch.nn.Parameter(torch.ones(100, 50))
    iterator = PowerIterator([p], recheck=False)
    iterator()
    p.data = torch.full((100, 50), 5.0)
    torch.randn(100, 5000)  # would fall upon freed memory
    assert iterator().frobenius.item() == pytest.approx(math.sqrt(5000))


def test_a_clone_outlives_the_next_call() -> None:
    W = torch.ones(3, 3)
    iterator = PowerIterator([W])
    kept, live = iterator().clone(), iterator()
    W *= 4
    iterator()
    assert kept.sigma_max.item() == pytest.approx(3)
    assert live.sigma_max.item() == pytest.approx(12)


def test_a_rollback_of_the_state_gives_the_same_numbers_again(implementation: str) -> None:
    weights = [torch.randn(20, 30), torch.zeros(4, 4), torch.randn(8, 2, 3, 3)]
    iterator = PowerIterator(weights)
    iterator()
    saved = iterator.state.state_dict()
    first = [iterator().packed.clone() for _ in range(3)]
    iterator.state.load_state_dict(saved)
    assert iterator.state.is_warm == (True, False, True)
    again = [iterator().packed.clone() for _ in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_state_survives_a_checkpoint(tmp_path: Any) -> None:
    weights = [torch.randn(20, 30), torch.randn(8, 2, 3, 3)]
    _, state = power_iteration(weights)
    torch.save(state.state_dict(), tmp_path / "state.pt")
    fresh = PowerIterator(weights)
    fresh.state.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(fresh.state.vectors, state.vectors)
    assert fresh.state.is_all_warm
    assert torch.equal(fresh().packed, power_iteration(weights, state)[0].packed)


def test_a_saved_state_of_other_weights_is_named() -> None:
    saved = PowerIterator([torch.ones(2, 3)]).state.state_dict()
    with pytest.raises(ValueError, match=r"\(2, 3\).* as matrix 0; accepted here: \(3, 3\)"):
        PowerIterator([torch.ones(3, 3)]).state.load_state_dict(saved)
    with pytest.raises(ValueError, match="of 1 matrices; accepted here: of 0"):
        PowerIterator([]).state.load_state_dict(saved)
    del saved["vectors"]
    with pytest.raises(ValueError, match="state has no vectors"):
        PowerIterator([torch.ones(2, 3)]).state.load_state_dict(saved)


def test_a_dtensor_is_read_by_its_local_shard(tmp_path: Any) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        full = torch.randn(4, 3)
        shard = distribute_tensor(full.clone(), mesh, [Shard(0)])
        iterator = PowerIterator([shard, full])
        first = iterator().frobenius.tolist()
        assert first[0] == first[1]
        shard.to_local().mul_(2)
        assert iterator().frobenius[0].item() == pytest.approx(2 * first[0])
    finally:
        dist.destroy_process_group()


def test_layouts() -> None:
    assert layout_of(torch.empty(4, 5)) == Layout((4, 5), (0, 1))
    assert layout_of(torch.empty(4, 5).t()) == Layout((5, 4), (1, 0))
    assert layout_of(torch.empty(4, 1)) == Layout((4, 1), (1, 0))
    assert layout_of(torch.empty(1, 4)) == Layout((1, 4), (0, 1))
    channels_last = torch.empty(4, 5, 2, 3).to(memory_format=torch.channels_last)
    assert layout_of(channels_last) == Layout((4, 5, 2, 3), (0, 2, 3, 1))
    assert layout_of(torch.empty(4, 1, 1)).columns == 4
    for weight in (channels_last, torch.empty(4, 5).t(), torch.empty(4, 1, 1)):
        assert as_matrix(weight, layout_of(weight)).data_ptr() == weight.data_ptr()


# ---- under torch.compile


def test_opcheck() -> None:
    samples = [
        [torch.randn(5, 4, requires_grad=True), torch.randn(2, 3, 2)],
        [torch.randn(4, 6, dtype=torch.bfloat16)],
        [torch.randn(6, 4).t()[::2]],
    ]
    for weights in samples:
        vectors = random_vectors(weights)
        torch.library.opcheck(torch.ops.foreshock.power_iteration.default, (weights, vectors))


def test_a_warm_pass_compiles_as_a_full_graph() -> None:
    weights = [torch.randn(20, 10), torch.ones(3), torch.randn(6, 2, 2)]
    _, state = power_iteration(weights)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def watch(weights: list[Tensor], state: PowerState) -> tuple[Tensor, Tensor, Tensor]:
        stats, state = power_iteration(weights, state)
        return stats.kappa_tilde, stats.index, state.vectors

    stats, later = power_iteration(weights, state)
    kappa_tilde, index, vectors = watch(weights, state)
    assert torch.equal(kappa_tilde, stats.kappa_tilde)
    assert torch.equal(index, stats.index)
    assert torch.equal(vectors, later.vectors)


def test_under_compile_a_cold_state_is_an_error() -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def watch(weights: list[Tensor]) -> Tensor:
        return power_iteration(weights)[0].sigma_max

    with pytest.raises(Exception, match="one pass with a warm state"):
        watch([torch.randn(4, 4)])


def test_gradients_do_not_flow_through_it() -> None:
    weights = [torch.randn(4, 4, requires_grad=True)]
    packed, vectors = torch.ops.foreshock.power_iteration(weights, random_vectors(weights))
    assert not packed.requires_grad
    assert not vectors.requires_grad


def test_the_op_accepts_matrices_only() -> None:
    with pytest.raises(ValueError, match="two or more dimensions"):
        torch.ops.foreshock.power_iteration([torch.ones(3)], torch.ones(2, 3).double())


def test_the_lanczos_run_survives_what_it_cannot_use() -> None:
    """Breakdown: an invariant space is reached before the passes are used up."""
    zero = torch.zeros(3, 3, 3, dtype=torch.float64)
    assert torch.equal(lanczos._top_eigenvectors(zero), torch.zeros(3, 3).double())
    T = torch.diag_embed(torch.tensor([[1.0, 3.0, 2.0], [2.0, 2.0, 0.0]], dtype=torch.float64))
    found = lanczos._top_eigenvectors(T)
    assert found[0].abs().tolist() == [0, 1, 0]
    assert (T[1] @ found[1] - 2 * found[1]).norm() < 1e-12
