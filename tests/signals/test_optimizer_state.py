"""RMS_t, against what is computed by hand from the gradients alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from foreshock.signals import (
    SecondMomentRms,
    muon_ratio,
    second_moment_rms,
    weight_decays,
)
from foreshock.signals import optimizer_state as room
from tests.signals.optimizers import KNOWN, Make, make_parameters, set_gradients

# float32 sums against a float64 hand computation: measured 9e-8 on 1e5 elements.
RTOL = 2e-6


class ByHand:
    """RMS_t written out element by element in double precision, from the gradients alone."""

    def __init__(self, parameters: list[Tensor], optimizer: torch.optim.Optimizer) -> None:
        self.parameters, self.group = parameters, optimizer.param_groups[0]
        self.v = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
        self.largest = [v.clone() for v in self.v]
        self.t = 0

    def __call__(self) -> tuple[list[float], float]:
        self.t += 1
        group, beta2 = self.group, self.group["betas"][1]
        ratios = []
        for p, v, largest in zip(self.parameters, self.v, self.largest, strict=True):
            g = p.grad * (-1 if group["maximize"] else 1)
            if not group["decoupled_weight_decay"]:  # in float32, as the two may nearly cancel
                g = torch.add(g, p.detach(), alpha=group["weight_decay"])
            g = g.double()
            v.copy_(beta2 * v + (1 - beta2) * g**2)
            torch.maximum(largest, v, out=largest)
            corrected = (largest if group.get("amsgrad") else v) / (1 - beta2**self.t)
            ratios.append(g**2 / corrected.clamp(min=group["eps"] ** 2))
        together = torch.cat([ratio.flatten() for ratio in ratios])
        return [float(r.mean().sqrt()) for r in ratios], float(together.mean().sqrt())


def assert_is(found: SecondMomentRms, expected: tuple[list[float], float]) -> None:
    assert found.rms.tolist() == pytest.approx(expected[0], rel=RTOL)
    assert float(found.total) == pytest.approx(expected[1], rel=RTOL)


@pytest.mark.parametrize("make", KNOWN.values(), ids=KNOWN)
def test_rms_is_what_is_computed_by_hand_before_and_after_each_of_many_steps(make: Make) -> None:
    parameters = make_parameters()
    optimizer = make(parameters)
    by_hand = ByHand(parameters, optimizer)
    for step in range(30):
        set_gradients(parameters, size=100.0 if step == 20 else 1.0)
        expected = by_hand()
        before = second_moment_rms(optimizer, parameters, is_stepped=False)
        optimizer.step()
        after = second_moment_rms(optimizer, parameters, is_stepped=True)
        assert_is(after, expected)
        if step:  # in the first step there are no moments to read yet
            assert_is(before, expected)
        else:
            assert before.index == ()
            assert float(before.total) == 0.0


def test_rms_is_about_one_in_a_steady_state_and_leaps_when_gradients_do() -> None:
    parameters = make_parameters()
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    for _ in range(300):
        set_gradients(parameters)
        optimizer.step()
    assert 0.8 < float(second_moment_rms(optimizer, parameters, is_stepped=True).total) < 1.2
    set_gradients(parameters, size=30.0)
    assert float(second_moment_rms(optimizer, parameters, is_stepped=False).total) > 10


def test_reading_changes_neither_gradients_nor_moments_nor_weights() -> None:
    parameters = make_parameters()
    optimizer = torch.optim.Adam(parameters, weight_decay=0.1, amsgrad=True)
    set_gradients(parameters)
    optimizer.step()

    def everything() -> list[Tensor]:
        kept = [t for p in parameters for t in optimizer.state[p].values()]
        return [t.detach().clone() for t in (*kept, *parameters, *(p.grad for p in parameters))]

    before = everything()
    for is_stepped in (False, True):
        second_moment_rms(
            optimizer, parameters, is_stepped=is_stepped, grad_scale=torch.tensor(2.0)
        )
    assert all(torch.equal(one, other) for one, other in zip(before, everything(), strict=True))


def test_parameters_without_a_gradient_a_group_or_moments_are_left_out() -> None:
    parameters = make_parameters()
    stranger = torch.zeros(4, requires_grad=True)
    stranger.grad = torch.ones(4)
    late = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.AdamW([*parameters, late], lr=1e-2)
    set_gradients(parameters)
    optimizer.step()
    by_hand = [float(x) for x in second_moment_rms(optimizer, parameters, is_stepped=True).rms]
    late.grad = torch.ones(2)
    parameters[1].grad = None
    asked = [parameters[3], stranger, parameters[1], late, parameters[0]]
    found = second_moment_rms(optimizer, asked, is_stepped=True)
    assert found.index == (0, 4)
    assert found.numel == (60, 85)
    assert found.rms.tolist() == pytest.approx([by_hand[3], by_hand[0]])


def test_every_parameter_is_read_at_its_own_age() -> None:
    old, young = torch.zeros(9, requires_grad=True), torch.zeros(5, requires_grad=True)
    optimizer = torch.optim.AdamW([old, young], eps=0.5, betas=(0.9, 0.99))
    by_hand = [ByHand([p], optimizer) for p in (old, young)]
    for step in range(6):
        old.grad = torch.randn(9)
        young.grad = torch.randn(5) if step > 3 else None
        expected = [hand()[0][0] for hand in by_hand[: 1 + (step > 3)]]
        optimizer.step()
        found = second_moment_rms(optimizer, [old, young], is_stepped=True)
        assert found.rms.tolist() == pytest.approx(expected, rel=RTOL)


def test_every_parameter_is_read_with_the_settings_of_its_own_group() -> None:
    one, two = make_parameters(), make_parameters(seed=1)
    groups = [{"params": two, "betas": (0.9, 0.5), "eps": 0.3}, {"params": one}]
    together = torch.optim.AdamW(groups, lr=1e-2)
    apart = [torch.optim.AdamW([group], lr=1e-2) for group in groups]
    for _ in range(5):
        set_gradients([*one, *two])
        found = second_moment_rms(together, [*one, *two], is_stepped=False)
        expected = [second_moment_rms(o, [*one, *two], is_stepped=False) for o in apart[::-1]]
        assert torch.equal(found.rms, torch.cat([e.rms for e in expected]))
        assert found.index == tuple(i for e in expected for i in e.index)
        for optimizer in (*apart, together):
            optimizer.step()
        for p in (*one, *two):  # the same moments in both, at the price of a step too many
            together.state[p]["exp_avg_sq"].copy_(
                next(o for o in apart if p in o.state).state[p]["exp_avg_sq"]
            )


def test_the_scale_that_a_fused_optimizer_takes_out_is_taken_out() -> None:
    parameters = make_parameters()
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, fused=True)
    for step in range(3):
        set_gradients(parameters)
        plain = second_moment_rms(optimizer, parameters, is_stepped=False)
        for p in parameters:
            p.grad *= 8.0
        scale = torch.tensor(8.0)
        scaled = second_moment_rms(optimizer, parameters, is_stepped=False, grad_scale=scale)
        if step:
            torch.testing.assert_close(scaled.rms, plain.rms)
        optimizer.grad_scale, optimizer.found_inf = scale, torch.tensor(0.0)
        optimizer.step()
        # The step has written the quotients into the gradients.
        after = second_moment_rms(optimizer, parameters, is_stepped=True)
        if step:
            torch.testing.assert_close(after.rms, plain.rms)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_in_single(dtype: torch.dtype) -> None:
    p = torch.zeros(1000, dtype=dtype, requires_grad=True)
    optimizer = torch.optim.AdamW([p], lr=1e-3, eps=1e-8)  # eps^2 is 0 in float16
    p.grad = torch.randn(1000).to(dtype)
    optimizer.step()
    v = optimizer.state[p]["exp_avg_sq"].double() / (1 - 0.999)
    expected = (p.grad.double() ** 2 / v.clamp(min=1e-16)).mean().sqrt()
    found = second_moment_rms(optimizer, [p], is_stepped=True)
    assert float(found.rms[0]) == pytest.approx(float(expected), rel=RTOL)


def test_elements_that_never_had_a_gradient_count_as_zero() -> None:
    p = torch.zeros(8, requires_grad=True)
    optimizer = torch.optim.AdamW([p], eps=1e-30)  # whose square is 0 in float32
    p.grad = torch.tensor([1.0] * 2 + [0.0] * 6)
    for is_stepped in (True, False):
        optimizer.step()
        found = second_moment_rms(optimizer, [p], is_stepped=is_stepped)
        assert float(found.total) == pytest.approx(0.5)


def test_complex_and_empty_parameters_are_read() -> None:
    z = torch.zeros(6, dtype=torch.complex64, requires_grad=True)
    empty = torch.zeros(0, requires_grad=True)
    optimizer = torch.optim.AdamW([z, empty], lr=1e-3)
    z.grad, empty.grad = torch.randn(6, dtype=torch.complex64), torch.zeros(0)
    optimizer.step()
    found = second_moment_rms(optimizer, [z, empty], is_stepped=True)
    assert found.numel == (12, 0)
    assert found.rms.tolist() == pytest.approx([1.0, 0.0])


def test_memory_that_is_not_in_order_is_read_as_well() -> None:
    p = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last).requires_grad_()
    optimizer = torch.optim.Adam([p], lr=0.0, weight_decay=0.1)
    by_hand = ByHand([p], optimizer)
    for step in range(3):
        p.grad = torch.randn(5, 5, 3, 4).permute(3, 2, 1, 0)
        expected = by_hand()
        if step:
            assert_is(second_moment_rms(optimizer, [p], is_stepped=False), expected)
        optimizer.step()
        assert_is(second_moment_rms(optimizer, [p], is_stepped=True), expected)


def test_an_update_that_was_withheld_leaves_no_moments_and_no_nan() -> None:
    parameters = make_parameters()
    optimizer = torch.optim.AdamW(parameters, fused=True)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(1.0)
    set_gradients(parameters)
    optimizer.step()
    assert second_moment_rms(optimizer, parameters, is_stepped=True).rms.tolist() == [0.0] * 4
    found = second_moment_rms(optimizer, parameters, is_stepped=False)
    assert found.rms.tolist() == pytest.approx([1.0] * 4)


def test_a_gradient_that_is_not_finite_is_seen_in_its_own_parameter_only() -> None:
    parameters = make_parameters()
    optimizer = torch.optim.AdamW(parameters)
    set_gradients(parameters)
    optimizer.step()
    parameters[1].grad[0] = math.nan
    rms = second_moment_rms(optimizer, parameters, is_stepped=False).rms
    assert rms.isnan().tolist() == [False, True, False, False]


def test_large_models_are_read_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = make_parameters()
    optimizer = torch.optim.AdamW(parameters)
    set_gradients(parameters)
    optimizer.step()
    set_gradients(parameters)
    whole = second_moment_rms(optimizer, parameters, is_stepped=False)
    monkeypatch.setattr(room, "_CPU_ELEMENTS", 20)
    (_, batch), *_ = room._batches(optimizer, parameters)
    turns = list(room._in_turns(batch))
    assert max(sum(piece.end - piece.start for piece in turn) for turn in turns) < 2 * 20
    read = [0] * len(parameters)
    for piece in (piece for turn in turns for piece in turn):
        assert piece.start == read[piece.owner]
        read[piece.owner] = piece.end
    assert read == [p.numel() for p in parameters]
    in_parts = second_moment_rms(optimizer, parameters, is_stepped=False)
    torch.testing.assert_close(in_parts.sumsq, whole.sumsq, rtol=RTOL, atol=0.0)
    assert in_parts.index == whole.index


def test_ten_million_elements_lose_no_digits() -> None:
    p = torch.zeros(10_000_000, requires_grad=True)
    optimizer = torch.optim.AdamW([p])
    p.grad = torch.ones_like(p)
    optimizer.step()
    found = second_moment_rms(optimizer, [p], is_stepped=True)
    assert float(found.total) == pytest.approx(1.0, rel=RTOL)


@pytest.fixture
def one_process() -> Iterator[None]:
    distributed = torch.distributed
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_of_a_distributed_parameter_the_shard_is_read() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    plain = [torch.randn(6, 4).requires_grad_()]
    sharded = [distribute_tensor(plain[0].detach(), mesh, [Shard(0)]).requires_grad_()]
    optimizers = [torch.optim.AdamW(plain), torch.optim.AdamW(sharded)]
    set_gradients(plain)
    sharded[0].grad = distribute_tensor(plain[0].grad, mesh, [Shard(0)])
    for optimizer in optimizers:
        optimizer.step()
    expected = second_moment_rms(optimizers[0], plain, is_stepped=True)
    found = second_moment_rms(optimizers[1], sharded, is_stepped=True)
    assert not isinstance(found.sumsq, DTensor)
    assert torch.equal(found.sumsq, expected.sumsq)
    assert found.numel == expected.numel


class _HostReads(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._opname in ("_local_scalar_dense", "nonzero", "is_nonzero"):
            self.seen.append(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["Adam-coupled-decay", "AdamW", "AdamW-amsgrad", "AdamW-fused"])
def test_no_value_is_read_on_the_host(name: str) -> None:
    parameters = make_parameters()
    optimizer = KNOWN[name](parameters)
    set_gradients(parameters)
    optimizer.step()
    with _HostReads() as reads:
        for is_stepped in (True, False):
            found = second_moment_rms(optimizer, parameters, is_stepped=is_stepped)
            ratio = muon_ratio(torch.ones(4), weight_decays(optimizer, parameters))
            assert found.rms.shape == ratio.shape
            assert found.total.shape == ()
        assert not reads.seen
        float(found.total)
        assert reads.seen  # the counter counts


@pytest.mark.gpu
@pytest.mark.parametrize("is_fused", [False, True])
def test_on_a_gpu_nothing_waits_and_the_numbers_are_the_same(is_fused: bool) -> None:
    host = make_parameters()
    device = [p.detach().cuda().requires_grad_() for p in host]
    optimizers = [
        torch.optim.AdamW(host, lr=1e-2),
        torch.optim.AdamW(device, lr=1e-2, fused=is_fused),
    ]
    for _ in range(3):
        set_gradients(host)
        for p, q in zip(host, device, strict=True):
            q.grad = p.grad.cuda()
        for optimizer in optimizers:
            optimizer.step()
    expected = second_moment_rms(optimizers[0], host, is_stepped=True)
    sigma = torch.ones(4, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = second_moment_rms(optimizers[1], device, is_stepped=True)
        rms, total = found.rms, found.total
        ratio = muon_ratio(sigma, weight_decays(optimizers[1], device))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert {t.device.type for t in (rms, total, ratio)} == {"cuda"}
    torch.testing.assert_close(rms.cpu(), expected.rms, rtol=1e-4, atol=0.0)
