"""Gates are put behind the layers of models of many kinds, and taken out again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from foreshock import gates
from tests.gates.models import SUBJECTS, WIDTH, Decoder, Residual, Subject, block, decoder, turned

ATOL = 2e-6
every_model = pytest.mark.parametrize("make", SUBJECTS, ids=lambda make: make.__name__)


@every_model
def test_they_stand_behind_all_layers_but_the_first_and_the_last(
    make: Callable[[], Subject],
) -> None:
    subject = make()
    attached = gates.attach(subject.model)
    assert list(attached) == list(subject.layers[1:-1])
    assert {gate.dim for gate in attached.values()} == {WIDTH}
    assert gates.gates_of(subject.model) == attached
    named = dict(subject.model.named_parameters())
    assert {f"{n}.rotation_gate.{p}" for n in attached for p in ("theta", "alpha")} <= set(named)


@every_model
def test_they_change_no_bit_at_first_and_turn_what_the_layer_puts_out(
    make: Callable[[], Subject],
) -> None:
    subject = make()
    subject.model.eval()
    before = subject()
    attached = gates.attach(subject.model, subject.layers[1])
    assert torch.equal(subject(), before)
    (gate,) = attached.values()
    nn.init.normal_(gate.theta)
    with torch.no_grad():
        gate.alpha.fill_(float("inf"))
    seen: list[torch.Tensor] = []
    layer = subject.model.get_submodule(subject.layers[2])
    layer.register_forward_pre_hook(lambda _, args, kwargs: seen.append(args[0]), with_kwargs=True)
    out = subject()
    gates.detach(subject.model)
    subject()
    with_gate, without = seen
    expected = without.unflatten(-1, (-1, 8)).unsqueeze(-2) @ gate.rotation()
    torch.testing.assert_close(with_gate, expected.flatten(-3), rtol=0, atol=ATOL)
    assert (out - before).abs().max() > 1e-3


@every_model
def test_taken_out_they_leave_nothing(make: Callable[[], Subject]) -> None:
    subject = make()
    subject.model.eval()
    before, names = subject(), [n for n, _ in subject.model.named_modules()]
    hooks = [len(m._forward_hooks) for m in subject.model.modules()]
    turned(subject)
    assert not torch.equal(subject(), before)
    assert gates.detach(subject.model) is subject.model
    assert [n for n, _ in subject.model.named_modules()] == names
    assert [len(m._forward_hooks) for m in subject.model.modules()] == hooks
    assert torch.equal(subject(), before)
    gates.attach(subject.model)


@every_model
def test_a_state_dict_brings_them_back(make: Callable[[], Subject]) -> None:
    subject = turned(make())
    subject.model.eval()
    other = subject._replace(model=make().model.eval())
    gates.attach(other.model)
    other.model.load_state_dict(subject.model.state_dict())
    assert torch.equal(other(), subject())


@every_model
def test_a_bfloat16_model_trains_with_them(make: Callable[[], Subject]) -> None:
    subject = turned(make())
    subject.model.to(torch.bfloat16)
    x = subject.x.bfloat16() if subject.x.is_floating_point() else subject.x
    subject = subject._replace(x=x)
    out = subject()
    assert out.dtype is torch.bfloat16
    out.float().square().mean().backward()
    for gate in gates.gates_of(subject.model).values():
        assert gate.theta.dtype is torch.float32
        assert gate.theta.grad is not None
        assert gate.theta.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("all", [0, 1, 2, 3]),
        (2, [2]),
        ([0, -1], [0, 3]),
        ("blocks.1", [1]),
        (["blocks.3", 0], [3, 0]),
    ],
    ids=str,
)
def test_layers_are_chosen_by_word_index_and_name(layers: Any, expected: list[int]) -> None:
    assert list(gates.attach(decoder().model, layers)) == [f"blocks.{i}" for i in expected]


def test_a_name_may_be_that_of_any_module_and_widths_may_differ() -> None:
    attached = gates.attach(decoder().model, ["blocks.0.body.0", "blocks.0.norm", "blocks.1.body"])
    assert [gate.dim for gate in attached.values()] == [24, WIDTH, WIDTH]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_padded_batch_goes_through_an_encoder_in_eval_mode() -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 24, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 4).eval()
    x, padding = torch.randn(2, 5, WIDTH), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        before = model(x, src_key_padding_mask=padding)
        gates.attach(model)
        now = model(x, src_key_padding_mask=padding)
        torch.testing.assert_close(now[~padding], before[~padding], rtol=0, atol=ATOL)
        gates.detach(model)
        assert torch.equal(model(x, src_key_padding_mask=padding), before)


class ListOfStages(nn.Module):
    """Two lists of the same length."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.ModuleList(block() for _ in range(3))
        self.right = nn.ModuleList(block() for _ in range(3))


class Bare(nn.Module):
    """No layers at all."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, WIDTH)


class Opaque(nn.Module):
    """Says nowhere how wide it is."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Any) -> Any:
        return {"x": x * self.gain}


REFUSED = [
    (lambda: Decoder(layers=2), {}, "2 layers .*none of which is between a first and a last"),
    (Bare, {}, "not found. Looked for: one nn.ModuleList.*longer than any.*children 'project'"),
    (ListOfStages, {}, "Found: left of 3, right of 3"),
    (Decoder, {"layers": "blocks.9"}, "'blocks.9' names no module; did you mean 'blocks"),
    (Decoder, {"layers": 4}, "no layer 4; the model has 4 layers"),
    (Decoder, {"layers": [-5]}, "no layer -5"),
    (Decoder, {"layers": []}, "layers is empty"),
    (lambda: Decoder(Opaque), {}, "width of layer 'blocks.1' was not found. Looked for: config"),
    (Decoder, {"dim": 12}, "dim of layer 'blocks.1' is 12, not divisible by 8"),
]


@pytest.mark.parametrize(("make", "given", "what"), REFUSED, ids=range(len(REFUSED)))
def test_what_cannot_be_is_refused_with_what_was_looked_for(
    make: Callable[[], nn.Module], given: dict[str, Any], what: str
) -> None:
    model = make()
    names = [n for n, _ in model.named_modules()]
    with pytest.raises(ValueError, match=what):
        gates.attach(model, **given)
    assert [n for n, _ in model.named_modules()] == names


@pytest.mark.parametrize("layers", [True, 1.5, None, {"blocks.0": 1}, [[0]]], ids=str)
def test_layers_of_another_type_are_refused(layers: Any) -> None:
    with pytest.raises(TypeError, match="accepted: 'intermediate', 'all', indices, or dotted"):
        gates.attach(Decoder(), layers)
    with pytest.raises(TypeError, match="model is a int"):
        gates.attach(3)  # type: ignore[arg-type]


def test_attached_twice_or_detached_twice_is_an_error() -> None:
    model = decoder().model
    gates.attach(model)
    with pytest.raises(ValueError, match=r"gates already .*blocks\.1"):
        gates.attach(model, "blocks.0")
    gates.detach(model)
    with pytest.raises(ValueError, match="model has no gates"):
        gates.detach(model)


def test_a_layer_whose_output_is_no_tensor_is_named() -> None:
    model = Decoder(Opaque)
    gates.attach(model, dim=WIDTH)
    with pytest.raises(TypeError, match="a Opaque with a gate has put out a dict"):
        model.get_submodule("blocks.1")(torch.randn(2, WIDTH))


def test_a_wrong_width_is_said_at_the_first_forward() -> None:
    subject = decoder()
    gates.attach(subject.model, dim=24)
    with pytest.raises(ValueError, match=r"shape \(5, 16\); accepted: \(\.\.\., 24\)"):
        subject()


class WithHeads(Residual):
    """A list in every layer, longer than the list of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(WIDTH, 8) for _ in range(9))


def test_lists_inside_layers_are_not_taken_for_the_layers() -> None:
    assert list(gates.attach(Decoder(WithHeads))) == ["blocks.1", "blocks.2"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("is_saved", [False, True], ids=["gates-last", "modules-to-save"])
def test_a_model_with_lora_learns_with_them(is_saved: bool) -> None:
    peft = pytest.importorskip("peft")
    subject = SUBJECTS[-1]()
    subject.model.eval()
    before = subject()
    if is_saved:
        gates.attach(subject.model)
    config = peft.LoraConfig(
        target_modules=["q_proj"], modules_to_save=["rotation_gate"] if is_saved else None
    )
    model = peft.get_peft_model(subject.model, config)
    if not is_saved:
        gates.attach(model)
    assert torch.equal(model(subject.x).logits, before)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    thetas = [n for n in trained if n.endswith("theta")]
    assert len(thetas) == 2
    assert any("lora_" in name for name in trained)
    optimizer = torch.optim.AdamW(trained.values(), lr=0.1)
    model(subject.x).logits.square().mean().backward()
    optimizer.step()
    assert all(trained[name].abs().max() > 0 for name in thetas)
    assert not torch.equal(model(subject.x).logits, before)
