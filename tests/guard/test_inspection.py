"""Health scans by name: what was found, and who was first."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from foreshock.guard import Offender, inspect_gradients, inspect_weights, named_parameters


def parameters_with_gradients(n: int = 4) -> dict[str, Any]:
    parameters = {}
    for i in range(n):
        parameters[f"layer.{i}"] = p = nn.Parameter(torch.ones(3, 2))
        p.grad = torch.full((3, 2), 0.5)
    return parameters


def weights_of(model: nn.Module) -> Any:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return inspect_weights(model, named_parameters(model, optimizer))


def test_clean_tensors_have_a_norm_and_no_offender() -> None:
    inspector = inspect_gradients(parameters_with_gradients())
    finding = inspector.inspect()
    assert not finding.has_nonfinite
    assert finding.norm == finding.finite_norm == pytest.approx(math.sqrt(24 * 0.25))
    assert inspector.find_offender() is None


def test_the_first_bad_tensor_is_named_with_exact_counts() -> None:
    parameters = parameters_with_gradients()
    parameters["layer.2"].grad[0, 0] = math.nan
    parameters["layer.1"].grad[1] = torch.tensor([math.nan, -math.inf])
    parameters["layer.1"].grad[2, 1] = math.nan
    inspector = inspect_gradients(parameters)
    assert inspector.inspect()[:2] == (3, 1)
    offender = inspector.find_offender()
    assert offender == Offender("gradient", "layer.1", nan=2, inf=1, numel=6)
    assert str(offender) == "gradient layer.1: 2 NaN and 1 Inf of 6 values"


@pytest.mark.parametrize(
    ("values", "norm"),
    [([math.inf], math.inf), ([math.nan], math.nan), ([math.inf, math.nan], math.nan)],
)
def test_norm_of_bad_gradients_is_what_a_plain_sum_of_squares_gives(
    values: list[float], norm: float
) -> None:
    parameters = parameters_with_gradients(1)
    parameters["layer.0"].grad[0, : len(values)] = torch.tensor(values)
    finding = inspect_gradients(parameters).inspect()
    assert finding.norm == pytest.approx(norm, nan_ok=True)
    assert finding.finite_norm == pytest.approx(math.sqrt(0.25 * (6 - len(values))))


def test_gradients_may_come_go_and_move_between_inspections() -> None:
    parameters = parameters_with_gradients(2)
    first, second = parameters.values()
    inspector = inspect_gradients(parameters)
    for one, other, norm in (
        (None, None, 0.0),
        (torch.ones(3, 2), None, math.sqrt(6)),
        (torch.ones(3, 2), torch.ones(2, 3).t(), math.sqrt(12)),
        (None, torch.ones(3, 2), math.sqrt(6)),
    ):
        first.grad, second.grad = one, other
        assert inspector.inspect().norm == pytest.approx(norm)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("is_dense_first", [True, False])
def test_sparse_gradients_are_read_with_repeated_rows_summed(is_dense_first: bool) -> None:
    embedding = nn.Embedding(5, 2, sparse=True)
    parameters = {"embedding": embedding.weight}
    inspector = inspect_gradients(parameters)
    if is_dense_first:
        embedding.weight.grad = torch.ones(5, 2)
        assert inspector.inspect().norm == pytest.approx(math.sqrt(10))
        embedding.weight.grad = None
    embedding(torch.tensor([3, 3, 0])).sum().backward()
    assert not embedding.weight.grad.is_coalesced()
    assert inspector.inspect().norm == pytest.approx(math.sqrt(4 + 4 + 1 + 1))
    embedding.weight.grad._values()[0, 1] = math.nan
    inspector.inspect()
    offender = inspector.find_offender()
    assert offender is not None
    assert (offender.name, offender.nan) == ("embedding", 1)


def test_complex_parameters_are_read_as_pairs() -> None:
    p = nn.Parameter(torch.tensor([3 + 4j, 0j]))
    p.grad = torch.tensor([3 + 4j, 0j])
    inspector = inspect_gradients({"p": p})
    assert inspector.inspect().norm == pytest.approx(5.0)
    p.grad[1] = complex(0, math.inf)
    assert inspector.inspect().has_nonfinite
    assert inspector.find_offender() == Offender("gradient", "p", nan=0, inf=1, numel=4)


class Net(nn.Module):
    """Parameters and buffers of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.norm = nn.BatchNorm1d(2)
        self.register_buffer("mask", torch.full((2, 2), -math.inf).triu(1))
        self.register_buffer("average", torch.zeros(2))
        self.quantized = nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("linear.weight", "parameter"),
        ("norm.bias", "parameter"),
        ("norm.running_var", "buffer"),
        ("average", "buffer"),
    ],
)
def test_bad_parameters_and_buffers_are_told_apart(name: str, kind: str) -> None:
    model = Net()
    inspector, _ = weights_of(model)
    assert not inspector.inspect().has_nonfinite
    tensor = dict([*model.named_parameters(), *model.named_buffers()])[name]
    tensor.data.view(-1)[1] = math.nan
    assert inspector.inspect().has_nonfinite
    assert inspector.find_offender() == Offender(kind, name, 1, 0, tensor.numel())


def test_a_mask_of_infinities_is_left_alone_and_told_of() -> None:
    inspector, left_alone = weights_of(Net())
    assert left_alone == ["mask"]
    assert not inspector.inspect().has_nonfinite


def test_a_buffer_is_followed_when_the_module_assigns_a_new_tensor() -> None:
    model = Net()
    inspector, _ = weights_of(model)
    model.average = torch.tensor([0.0, math.nan])
    inspector.inspect()
    assert inspector.find_offender() == Offender("buffer", "average", 1, 0, 2)
    model.average = torch.zeros(7)
    assert not inspector.inspect().has_nonfinite
    model.average = None
    assert not inspector.inspect().has_nonfinite


def test_an_assignment_to_data_is_followed() -> None:
    model = nn.Linear(2, 2)
    inspector, _ = weights_of(model)
    model.weight.data = torch.full((2, 2), math.nan)
    assert inspector.inspect()[:2] == (4, 0)


def test_tied_weights_count_once() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    nn.init.ones_(model[0].weight)
    inspector, _ = weights_of(model)
    assert inspector.inspect().norm == pytest.approx(2.0)


def test_nothing_to_look_at_is_nothing_wrong() -> None:
    assert inspect_gradients({}).inspect() == (0, 0, 0.0, 0.0)


@pytest.mark.gpu
def test_tensors_on_several_devices_are_inspected_together() -> None:
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, device="cuda"))
    c = nn.Parameter(torch.ones(2))
    b.grad = torch.full((2,), 2.0, device="cuda")
    inspector = inspect_gradients({"a": a, "b": b, "c": c})
    assert inspector.inspect().norm == pytest.approx(math.sqrt(8))
    a.grad, c.grad = torch.ones(2), torch.tensor([math.nan, 1.0])
    assert inspector.inspect().has_nonfinite
    assert inspector.find_offender() == Offender("gradient", "c", 1, 0, 2)
