"""Rotations are computed once a step, whatever a step is made of, and never stale."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from foreshock import gates
from foreshock.gates import rotation as rotation_module
from tests.gates.models import WIDTH, Decoder, Residual, decoder, stack, turned

ATOL = 1e-6  # of float32 gradients of order 1; measured 2e-7


@pytest.fixture
def exponentials(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of blocks of each exponential that is computed."""
    counted: list[int] = []
    exp = torch.linalg.matrix_exp

    def count(blocks: Tensor) -> Tensor:
        counted.append(len(blocks))
        return exp(blocks)

    monkeypatch.setattr(torch.linalg, "matrix_exp", count)
    return counted


def open_model() -> nn.Module:
    return turned(decoder()).model


def batches(count: int) -> Iterator[Tensor]:
    for seed in range(count):
        yield torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(seed))


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    found = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    return found


def alone(model: nn.Module) -> nn.Module:
    """A copy whose gates compute their own, by torch's autograd."""
    other = copy.deepcopy(model)
    for gate in gates.gates_of(other).values():
        gate.rotation = lambda gate=gate: rotation_module.rotation_of(gate.theta)  # type: ignore[method-assign]
    return other


def assert_same(model: nn.Module, run: Any) -> None:
    """A run leaves the gradients that it leaves without sharing."""
    other = alone(model)
    run(model)
    run(other)
    ours, theirs = gradients(model), gradients(other)
    assert any(name.endswith("alpha") and grad is not None for name, grad in ours.items())
    for name, grad in theirs.items():
        if grad is None:
            assert ours[name] is None, name
        else:
            torch.testing.assert_close(ours[name], grad, rtol=0, atol=ATOL, msg=name)


def test_a_step_and_a_look_take_one_exponential(
    exponentials: list[int],
) -> None:
    model = open_model()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    monitor = gates.GateMonitor(model)
    for step, x in enumerate(batches(3)):
        model(x).square().mean().backward()
        monitor.look(step)
        optimizer.step()
        assert exponentials == [2 * WIDTH // 8]
        exponentials.clear()


def test_evaluation_takes_one_for_all_its_batches(exponentials: list[int]) -> None:
    model = open_model().eval()
    with torch.no_grad():
        for x in batches(5):
            model(x)
    assert len(exponentials) == 1


def one_after_another(model: nn.Module) -> None:
    for x in batches(3):
        model(x).square().mean().backward()


def all_forwards_first(model: nn.Module) -> None:
    for loss in [model(x).square().mean() for x in batches(3)]:
        loss.backward()


def kept_graph(model: nn.Module) -> None:
    (x,) = batches(1)
    loss = model(x).square().mean()
    loss.backward(retain_graph=True)
    loss.backward()


def an_evaluation_between(model: nn.Module) -> None:
    x, y = batches(2)
    loss = model(x).square().mean()
    with torch.no_grad():
        model(y)
    loss.backward()
    with torch.inference_mode():
        model(y)
    model(y).square().mean().backward()


def a_part_only(model: nn.Module) -> None:
    (x,) = batches(1)
    model.get_submodule("blocks.1")(x).square().mean().backward()


def a_frozen_gate(model: nn.Module) -> None:
    gates.gates_of(model)["blocks.1"].theta.requires_grad_(False)
    one_after_another(model)


def a_gate_that_thaws(model: nn.Module) -> None:
    a_frozen_gate(model)
    gates.gates_of(model)["blocks.1"].theta.requires_grad_(True)
    (x,) = batches(1)
    model(x).square().mean().backward()


def a_gate_that_thaws_before_any_backward(model: nn.Module) -> None:
    gate = gates.gates_of(model)["blocks.1"]
    gate.theta.requires_grad_(False)
    x, y = batches(2)
    model(x)
    gate.theta.requires_grad_(True)
    model(y).square().mean().backward()


RUNS = [
    one_after_another,
    all_forwards_first,
    kept_graph,
    an_evaluation_between,
    a_part_only,
    a_frozen_gate,
    a_gate_that_thaws,
    a_gate_that_thaws_before_any_backward,
]


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__name__)
def test_gradients_are_those_of_gates_that_share_nothing(run: Any) -> None:
    assert_same(open_model(), run)


def test_what_inference_mode_has_made_stays_in_it() -> None:
    gate = gates.SO8RotationGate(WIDTH, theta_std=1.0).requires_grad_(False)
    weight = torch.randn_like(gate.theta).requires_grad_()
    with torch.inference_mode():
        gate.rotation()
    (gate.rotation() * weight).sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, gate.rotation())


class Checkpointed(nn.Module):
    """A layer that runs twice, so as to keep nothing."""

    is_reentrant = False

    def __init__(self) -> None:
        super().__init__()
        self.inner = Residual()

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=self.is_reentrant)


@pytest.mark.parametrize("is_reentrant", [False, True], ids=["new", "reentrant"])
def test_gradient_checkpointing_makes_no_difference(
    is_reentrant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpointed, "is_reentrant", is_reentrant)
    model = Decoder(Checkpointed)
    gates.attach(model, [f"blocks.{i}.inner" for i in range(4)], theta_std=0.5, alpha=0.0)

    def run(model: nn.Module) -> None:
        for x in batches(2):
            model(x.requires_grad_()).square().mean().backward()

    assert_same(model, run)


def write_past_torch(model: nn.Module) -> None:
    """As optimizers do that are kernels of their own."""
    for gate in gates.gates_of(model).values():
        gate.theta.data.mul_(2)


def in_place(model: nn.Module) -> None:
    with torch.no_grad():
        for gate in gates.gates_of(model).values():
            gate.theta.mul_(2)


def replaced(model: nn.Module) -> None:
    for gate in gates.gates_of(model).values():
        gate.theta.data = gate.theta.data * 2


def loaded(model: nn.Module) -> None:
    state = {n: 2 * v if n.endswith("theta") else v for n, v in model.state_dict().items()}
    model.load_state_dict(state)


def averaged(model: nn.Module) -> None:
    """Evaluated, then evaluated with other weights."""
    model.eval()
    (x,) = batches(1)
    with torch.no_grad():
        model(x)
    write_past_torch(model)
    model.eval()


def train(model: nn.Module, x: Tensor) -> None:
    model(x).square().mean().backward()


@torch.no_grad()
def evaluate(model: nn.Module, x: Tensor) -> None:
    model(x)


SEEN = [in_place, replaced, loaded]
CHANGES = [
    *((train, change) for change in [*SEEN, write_past_torch, averaged]),
    *((evaluate, change) for change in [*SEEN, averaged]),
]


@pytest.mark.parametrize("with_grad", [True, False], ids=["grad", "no-grad"])
@pytest.mark.parametrize(
    ("run", "change"), CHANGES, ids=[f"{run.__name__}-{c.__name__}" for run, c in CHANGES]
)
def test_no_rotation_is_used_that_is_not_of_its_theta(
    run: Any, change: Any, with_grad: bool
) -> None:
    model = open_model()
    (x,) = batches(1)
    before = model(x).detach()
    run(model, x)
    change(model)
    with torch.set_grad_enabled(with_grad):
        now, expected = model(x), alone(model)(x)
    torch.testing.assert_close(now, expected, rtol=0, atol=ATOL)
    assert (now - before).abs().max() > 0.01


def test_what_is_hidden_from_torch_and_from_us_needs_a_word() -> None:
    model = open_model().eval()
    (x,) = batches(1)
    with torch.no_grad():
        model(x)
        write_past_torch(model)
        gates.renew(model)
        torch.testing.assert_close(model(x), alone(model)(x), rtol=0, atol=ATOL)


def test_a_look_sees_what_the_forward_has_used(exponentials: list[int]) -> None:
    model = open_model()
    monitor = gates.GateMonitor(model)
    (x,) = batches(1)
    model(x).square().mean().backward()
    seen = monitor.look(0)
    assert len(exponentials) == 1
    in_place(model)
    assert monitor.look(1) != seen
    assert len(exponentials) == 2


def test_a_copied_model_shares_among_its_own(exponentials: list[int]) -> None:
    model = open_model()
    other = copy.deepcopy(model)
    (x,) = batches(1)
    with torch.no_grad():
        other(x)
        exponentials.clear()
        in_place(other)
        assert not torch.equal(other(x), model(x))
    assert len(exponentials) == 2


def test_functional_calls_use_the_thetas_that_they_are_given() -> None:
    model = open_model()
    (x,) = batches(1)
    given = {n: 2 * p.detach() for n, p in model.named_parameters()}
    out = torch.func.functional_call(model, given, (x,))
    other = copy.deepcopy(model)
    other.load_state_dict(given)
    torch.testing.assert_close(out, other(x), rtol=0, atol=ATOL)

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, parameters, (x,)).square().mean()

    found = torch.func.grad(loss)({n: p.detach() for n, p in model.named_parameters()})
    model(x).square().mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=0, atol=ATOL)


def test_gradients_of_gradients_are_refused() -> None:
    model = open_model()
    (x,) = batches(1)
    theta = gates.gates_of(model)["blocks.1"].theta
    (grad,) = torch.autograd.grad(model(x).square().mean(), theta, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_distributed_data_parallel_sees_every_gradient(tmp_path: Any) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        model = open_model()
        parallel = nn.parallel.DistributedDataParallel(model)
        expected = alone(model)
        for x in batches(2):
            parallel(x).square().mean().backward()
            expected(x).square().mean().backward()
        ours, theirs = gradients(model), gradients(expected)
        for name, grad in theirs.items():
            torch.testing.assert_close(ours[name], grad, rtol=0, atol=ATOL)
    finally:
        torch.distributed.destroy_process_group()


def test_gates_that_are_gone_are_not_kept_or_computed(exponentials: list[int]) -> None:
    subject = turned(stack())
    first, second = gates.gates_of(subject.model).values()
    gates.detach(subject.model)
    del second
    first(torch.randn(3, WIDTH))
    assert exponentials == [WIDTH // 8]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_it_is_one_graph_and_gives_the_same() -> None:
    subject = turned(stack())
    compiled = torch.compile(subject.model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(subject.x), subject(), rtol=0, atol=ATOL)
        compiled(subject.x).square().mean().backward()
        found = gradients(subject.model)
        subject().square().mean().backward()
        for name, grad in gradients(subject.model).items():
            torch.testing.assert_close(found[name], grad, rtol=0, atol=ATOL)
        in_place(subject.model)
