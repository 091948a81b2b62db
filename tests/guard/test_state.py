"""The parts of the state: copied out of the live run, and put back where they were."""

from __future__ import annotations

import copy
import math
import random
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adagrad, Adam, AdamW

from foreshock.guard import (
    GradientState,
    NamedTensors,
    OptimizerState,
    RandomState,
    StatefulPart,
    named_parameters,
)
from foreshock.guard.containers import copy_out, leaves_in, tensors_in
from foreshock.guard.state import make_part
from tests.monitor.training import same

# ---- containers


class Pair(NamedTuple):
    x: Tensor
    y: int


def test_trap_13_a_copy_shares_no_memory_with_the_original() -> None:
    x = torch.zeros(3)
    original = {"a": [x, (x,)], "b": OrderedDict(c=x), "d": Pair(x, 1), "e": np.zeros(2)}
    copied = copy_out(original)
    x.fill_(7.0)
    original["e"][0] = 7.0
    assert copied["a"][0].sum() == copied["a"][1][0].sum() == copied["b"]["c"].sum() == 0
    assert copied["d"].x.sum() == 0
    assert copied["e"].sum() == 0


def test_a_copy_is_of_the_same_kind_as_schedulers_need_it() -> None:
    """MultiStepLR's milestones have elements(), which a plain dictionary has not."""
    copied = copy_out({"milestones": Counter([5, 5, 9]), "order": OrderedDict(b=1)})
    assert list(copied["milestones"].elements()) == [5, 5, 9]
    assert type(copied["order"]) is OrderedDict


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.zeros(1, 4).expand(3, 4),
        torch.arange(12.0).reshape(3, 4).t(),
        torch.zeros(0, 3),
        torch.tensor(2.5, requires_grad=True),
        torch.tensor([1 + 2j]),
        torch.tensor([True, False]),
    ],
)
def test_a_copy_has_the_same_values_whatever_the_layout(tensor: Tensor) -> None:
    copied = copy_out(tensor)
    assert not copied.requires_grad
    assert same(copied, tensor)


def test_leaves_are_found_with_dotted_paths() -> None:
    x = torch.zeros(1)
    assert [path for path, _ in leaves_in({"a": [x, {3: x}], "b": 5})] == ["a.0", "a.1.3", "b"]
    assert [path for path, _ in tensors_in({"a": [x, {3: x}], "b": 5})] == ["a.0", "a.1.3"]


# ---- parameters and buffers


class Tied(nn.Module):
    """Tied weights, a frozen parameter, and buffers of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 3)
        self.head = nn.Linear(3, 4, bias=False)
        self.head.weight = self.embed.weight
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("hidden", torch.zeros(2), persistent=False)


def named(model: nn.Module) -> NamedTensors:
    return NamedTensors(lambda: {**dict(model.named_parameters()), **dict(model.named_buffers())})


def test_everything_comes_back_where_it_was() -> None:
    model = Tied()
    before, pointers = copy.deepcopy(model), [p.data_ptr() for p in model.parameters()]
    part = named(model)
    saved = part.capture()
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.add_(1)
    part.restore(saved)
    for one, other in (
        (model.named_parameters(), before.named_parameters()),
        (model.named_buffers(), before.named_buffers()),
    ):
        assert all(same(a, b) for (_, a), (_, b) in zip(one, other, strict=True))
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert model.head.weight is model.embed.weight
    assert not model.frozen.requires_grad


def test_a_capture_can_be_restored_more_than_once() -> None:
    model = nn.Linear(2, 2)
    part = named(model)
    saved, before = part.capture(), copy.deepcopy(model.weight)
    for _ in range(2):
        nn.init.constant_(model.weight, math.nan)
        part.restore(saved)
        assert same(model.weight, before)


def test_a_buffer_that_was_replaced_or_has_grown_is_restored_too() -> None:
    model = Tied()
    part = named(model)
    saved = part.capture()
    model.hidden = torch.full((2,), 9.0)
    model.count = torch.arange(5)
    part.restore(saved)
    assert same(model.hidden, torch.zeros(2))
    assert same(model.count, torch.tensor(0))


def test_what_came_or_went_since_then_is_left_alone() -> None:
    model = Tied()
    part = named(model)
    saved = part.capture()
    model.register_buffer("late", torch.ones(1))
    del model.hidden
    part.restore(saved)
    assert same(model.late, torch.ones(1))


def test_parameters_that_only_the_optimizer_knows_are_named_by_their_place() -> None:
    model, other = nn.Linear(2, 2), nn.Parameter(torch.ones(3))
    optimizer = SGD([{"params": [model.weight]}, {"params": [model.bias, other]}], lr=0.1)
    assert list(named_parameters(model, optimizer)) == ["weight", "bias", "param_groups.1.1"]
    assert named_parameters(model, optimizer)["param_groups.1.1"] is other


# ---- the optimizer


def trained(make: Callable[[Any], torch.optim.Optimizer], steps: int = 3) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    optimizer = make(model.parameters())
    train_more(model, optimizer, steps)
    return model, optimizer


def train_more(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    x = torch.linspace(-1, 1, 12).reshape(4, 3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)


def state_of(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    return dict(leaves_in({"groups": groups, "state": list(optimizer.state.values())}))


@pytest.mark.parametrize(
    "make",
    [
        lambda ps: AdamW(ps, lr=0.01, fused=True),
        lambda ps: Adam(ps, lr=torch.tensor(0.01), amsgrad=True),
        lambda ps: SGD(ps, lr=0.01, momentum=0.9),
        lambda ps: Adagrad(ps, lr=0.01),
        lambda ps: LBFGS(ps, history_size=3, max_iter=3),
    ],
    ids=["adamw-fused", "adam-amsgrad", "sgd", "adagrad", "lbfgs"],
)
def test_an_optimizer_goes_on_from_a_restored_state_as_if_nothing_had_happened(make: Any) -> None:
    (model, optimizer), (twin, twin_optimizer) = trained(make), trained(make)
    weights, state = named(model), OptimizerState(optimizer)
    saved = weights.capture(), state.capture()
    train_more(model, optimizer, 4)
    weights.restore(saved[0])
    state.restore(saved[1])
    for each in ((model, optimizer), (twin, twin_optimizer)):
        train_more(*each, 2)
    assert all(same(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    one, other = state_of(optimizer), state_of(twin_optimizer)
    assert one.keys() == other.keys()
    assert all(same(one[path], other[path]) for path in one)


def test_trap_13_load_state_dict_would_have_moved_the_moments() -> None:
    _, optimizer = trained(lambda ps: AdamW(ps, lr=0.01))
    pointers = {k: v.data_ptr() for k, v in tensors_in(state_of(optimizer))}
    state = OptimizerState(optimizer)
    state.restore(state.capture())
    assert {k: v.data_ptr() for k, v in tensors_in(state_of(optimizer))} == pointers
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert {k: v.data_ptr() for k, v in tensors_in(state_of(optimizer))} != pointers


def test_state_made_since_the_capture_is_dropped_and_state_lost_is_made_anew() -> None:
    model, optimizer = trained(lambda ps: AdamW(ps, lr=0.01), steps=0)
    state = OptimizerState(optimizer)
    empty = state.capture()
    train_more(model, optimizer)
    full, before = state.capture(), copy.deepcopy(state_of(optimizer))
    state.restore(empty)
    assert not optimizer.state
    state.restore(full)
    assert all(same(state_of(optimizer)[path], value) for path, value in before.items())


def test_hyperparameters_come_back_and_what_was_added_stays() -> None:
    model, optimizer = trained(lambda ps: SGD(ps, lr=0.1, momentum=0.9))
    state = OptimizerState(optimizer)
    saved = state.capture()
    optimizer.param_groups[0].update(lr=5.0, momentum=0.0, swa_lr=0.2)  # as SWALR does
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": 3.0})
    state.restore(saved)
    first, second = optimizer.param_groups
    assert (first["lr"], first["momentum"], first["swa_lr"]) == (0.1, 0.9, 0.2)
    assert second["lr"] == 3.0
    assert len(first["params"]) == len(list(model.parameters()))


# ---- gradients


def gradients(*values: float | None) -> tuple[dict[str, Tensor], GradientState]:
    parameters: dict[str, Tensor] = {}
    for i, value in enumerate(values):
        parameters[f"p{i}"] = p = nn.Parameter(torch.ones(2))
        p.grad = None if value is None else torch.full((2,), value)
    return parameters, GradientState(parameters)


def test_within_an_accumulation_the_sums_come_back_where_they_were() -> None:
    parameters, state = gradients(None, 0.0, 2.5)
    state.carries_values = True
    saved = state.capture()
    pointers = [p.grad.data_ptr() for p in parameters.values() if p.grad is not None]
    parameters["p0"].grad = torch.ones(2)
    parameters["p1"].grad.fill_(math.nan)
    parameters["p2"].grad.fill_(math.nan)
    state.restore(saved)
    assert parameters["p0"].grad is None
    assert same(parameters["p1"].grad, torch.zeros(2))
    assert same(parameters["p2"].grad, torch.full((2,), 2.5))
    assert [p.grad.data_ptr() for p in parameters.values() if p.grad is not None] == pointers
    parameters["p1"].grad = parameters["p2"].grad = None
    state.restore(saved)
    assert same(parameters["p1"].grad, torch.zeros(2))
    assert same(parameters["p2"].grad, torch.full((2,), 2.5))


def test_leftovers_of_an_update_are_not_worth_a_copy() -> None:
    parameters, state = gradients(2.5)
    saved = state.capture()
    assert sum(t.nbytes for _, t in tensors_in(saved)) == 1
    parameters["p0"].grad.fill_(3.0)
    state.restore(saved)
    assert same(parameters["p0"].grad, torch.full((2,), 3.0))


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_sparse_sums_come_back_too() -> None:
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1, 1, 3])).sum().backward()
    state = GradientState(dict(embedding.named_parameters()))
    state.carries_values = True
    saved, before = state.capture(), embedding.weight.grad.to_dense()
    embedding.weight.grad = None
    state.restore(saved)
    assert same(embedding.weight.grad.to_dense(), before)


# ---- the rest


def test_random_generators_repeat_themselves() -> None:
    def draw() -> tuple[float, float, list[float]]:
        return random.random(), float(np.random.random()), torch.rand(3).tolist()

    state = RandomState()
    draw()
    saved = state.capture()
    first = draw()
    state.restore(saved)
    assert draw() == first
    state.restore(saved)
    assert draw() == first


class Hoarder:
    """Keeps what it is given, and changes it later."""

    def __init__(self) -> None:
        self.kept: dict[str, Any] = {"t": torch.zeros(2), "n": [1, 2]}

    def state_dict(self) -> dict[str, Any]:
        return self.kept

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.kept = state


def test_what_an_owner_does_with_its_state_does_not_reach_the_snapshot() -> None:
    owner = Hoarder()
    part = StatefulPart(owner)
    saved = part.capture()
    for _ in range(2):
        owner.kept["t"].fill_(5.0)
        owner.kept["n"].append(3)
        part.restore(saved)
        assert owner.kept["n"] == [1, 2]
        assert owner.kept["t"].sum() == 0


def test_a_registered_module_or_optimizer_is_restored_in_place() -> None:
    model, optimizer = trained(lambda ps: AdamW(ps, lr=0.01))
    pointers = [p.data_ptr() for p in model.parameters()]
    moments = {k: v.data_ptr() for k, v in tensors_in(state_of(optimizer))}
    for owner in (model, optimizer):
        part = make_part(owner)
        part.restore(part.capture())
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert {k: v.data_ptr() for k, v in tensors_in(state_of(optimizer))} == moments
    assert isinstance(make_part(Hoarder()), StatefulPart)
