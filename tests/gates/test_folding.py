"""Gates are multiplied into weights where that is exact, and nowhere else."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from foreshock import gates
from tests.gates.models import SUBJECTS, WIDTH, Subject, block, decoder, stack, turned

ATOL = 1e-5


def opened(model: nn.Module, layers: Any = "all", dim: int | None = None) -> nn.Module:
    for gate in gates.attach(model, layers, dim=dim, theta_std=0.5, alpha=1.0).values():
        gate.alpha.requires_grad_(False)
    return model


def folded_agrees(model: nn.Module, x: Tensor) -> gates.Folded:
    with torch.no_grad():
        before = model(x)
        ungated = gates.detach(copy.deepcopy(model))(x)
        assert (before - ungated).abs().max() > 1e-2  # the gates do something
        done = gates.fold(model)
        torch.testing.assert_close(model(x), before, rtol=0, atol=ATOL)
    return done


def test_a_plain_stack_takes_them_into_the_weights_in_front() -> None:
    subject = turned(stack())
    done = folded_agrees(subject.model, subject.x)
    assert dict(done.into) == {"1": ("1.2",), "2": ("2.2",)}
    assert not done.constant
    assert not any(n.endswith("rotation_gate") for n, _ in subject.model.named_modules())
    assert not any(m._forward_hooks for m in subject.model.modules())


class Branches(nn.Module):
    """What three linear layers read, and nothing else."""

    def __init__(self, kind: type[nn.Module] = nn.Tanh) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(WIDTH, WIDTH), kind())
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return torch.softmax(self.q(x) * self.k(x), -1) * self.v(x)


def test_linear_layers_behind_take_it_in_if_they_are_all_that_reads_it() -> None:
    model = opened(Branches(), ["first"])
    done = folded_agrees(model, torch.randn(7, WIDTH))
    assert dict(done.into) == {"first": ("q", "k", "v")}


def test_a_gated_linear_layer_takes_its_gate_in_itself() -> None:
    model = opened(Branches(), ["q", "v"])
    done = folded_agrees(model, torch.randn(7, WIDTH))
    assert dict(done.into) == {"q": ("q",), "v": ("v",)}


def test_one_layer_may_take_in_a_gate_from_either_side() -> None:
    model = opened(nn.Sequential(nn.Tanh(), nn.Linear(WIDTH, WIDTH)), ["0", "1"], dim=WIDTH)
    done = folded_agrees(model, torch.randn(7, WIDTH))
    assert dict(done.into) == {"0": ("1",), "1": ("1",)}


class Peeked(Branches):
    """Somebody else reads it too."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.first(x)


class Forks(nn.Module):
    """Puts out what its linear layer does, and something else that is made of it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.inner(x)
        return y, torch.tanh(y)


class Forked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = Forks()

    def forward(self, x: Tensor) -> Tensor:
        y, z = self.first(x)
        return torch.tanh(y) + z


class ReadTwice(nn.Module):
    """The linear layer behind is used once more, elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Tanh(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) + self.second(x)


class Tied(nn.Module):
    """The weight belongs to somebody else too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.first(x)))


class Looking(nn.Module):
    """Cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Tanh(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) if x.sum() < 1e9 else x


class Observed(nn.Module):
    """A hook reads the linear layer's own output."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.first.register_forward_hook(lambda *_: None)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.first(x))


STAY = [
    (Peeked, "first", "the trace comes by it 2 times"),
    (Forked, "first", "it stands between Linear and call_function tanh"),
    (ReadTwice, "first", "it stands between Tanh and Linear"),
    (Tied, "first", "it stands between Linear and call_function"),
    (Looking, "first", "the model cannot be traced"),
    (Observed, "first", "it stands between Linear and"),
    (lambda: nn.Sequential(nn.Tanh(), nn.Tanh()), "0", "between Tanh and Tanh"),
    (lambda: nn.Sequential(nn.Linear(8, WIDTH), nn.Tanh()), "1", "between Linear and the output"),
]


@pytest.mark.parametrize(("make", "name", "why"), STAY, ids=[why for *_, why in STAY])
def test_where_it_is_not_exact_a_gate_stays_as_a_constant(
    make: Callable[[], nn.Module], name: str, why: str
) -> None:
    model = opened(make(), [name], dim=WIDTH)
    x = torch.randn(7, 8 if why.endswith("the output") else WIDTH)
    if why.endswith("the output"):
        why = "between Tanh and the output"
    done = folded_agrees(model, x)
    assert not done.into
    assert why in done.constant[name]
    assert isinstance(model.get_submodule(f"{name}.rotation_gate"), gates.ConstantGate)
    assert not any(n.endswith(("theta", "alpha")) for n in model.state_dict())


@pytest.mark.parametrize("make", SUBJECTS[1:], ids=lambda make: make.__name__)
def test_in_a_residual_stream_they_all_stay(make: Callable[[], Subject]) -> None:
    subject = turned(make())
    subject.model.eval()
    before = subject()
    done = gates.fold(subject.model)
    assert list(done.constant) == list(subject.layers[1:-1])
    torch.testing.assert_close(subject(), before, rtol=0, atol=ATOL)
    before = subject()
    gates.detach(subject.model)
    assert (subject() - before).abs().max() > 1e-3


def test_asked_to_an_inexact_fold_is_an_error_that_names_them_and_changes_nothing() -> None:
    subject = turned(decoder())
    before, state = subject(), {n: v.clone() for n, v in subject.model.state_dict().items()}
    with pytest.raises(ValueError, match=r"'blocks\.1': it stands between .*'blocks\.2': "):
        gates.fold(subject.model, otherwise="error")
    assert torch.equal(subject(), before)
    assert all(torch.equal(v, state[n]) for n, v in subject.model.state_dict().items())
    model = nn.Sequential(block(), block(), block())
    gates.attach(model)
    assert gates.fold(model, otherwise="error").into


def test_a_constant_gate_moves_is_cast_and_is_saved_with_its_model() -> None:
    subject = turned(decoder())
    gates.fold(subject.model)
    name = "blocks.1.rotation_gate.matrix"
    assert subject.model.state_dict()[name].shape == (WIDTH // 8, 8, 8)
    subject.model.bfloat16()
    assert subject.model.state_dict()[name].dtype is torch.bfloat16
    assert subject.model(subject.x.bfloat16()).dtype is torch.bfloat16
    with pytest.raises(ValueError, match="no gates to fold"):
        gates.fold(subject.model)
    with pytest.raises(ValueError, match="gates already"):
        gates.attach(subject.model)


def test_another_word_is_refused() -> None:
    with pytest.raises(ValueError, match="otherwise is 'leave'; accepted: 'constant', 'error'"):
        gates.fold(turned(stack()).model, otherwise="leave")  # type: ignore[arg-type]
