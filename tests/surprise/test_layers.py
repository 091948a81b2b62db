"""What a selection of layers means, and how a wrong one is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from foreshock.surprise.layers import select


class Residual(nn.Module):
    """A residual network's outline: a stem, four stages and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3)
        for i in range(1, 5):
            setattr(self, f"layer{i}", nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1)))
        self.fc = nn.Linear(4, 2)


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.again = self.first


@pytest.mark.parametrize(
    ("layers", "names"),
    [
        ("all_linear", ["fc"]),
        ("first_linear", ["fc"]),
        ("last_linear", ["fc"]),
        ("first_conv", ["conv1"]),
        ("last_conv", ["layer4.1"]),
        ("last_block", ["layer4.0", "layer4.1"]),
        ("last_two_blocks", ["layer3.0", "layer3.1", "layer4.0", "layer4.1"]),
        ("all_blocks", [f"layer{i}.{j}" for i in range(1, 5) for j in range(2)]),
        ("layer2.1", ["layer2.1"]),
        (["fc", "conv1"], ["conv1", "fc"]),
        (("last_conv", "last_linear"), ["layer4.1", "fc"]),
    ],
    ids=str,
)
def test_a_selection_means_these_layers(layers: str | list[str], names: list[str]) -> None:
    model = Residual()
    found = select(model, layers)
    assert list(found) == names
    assert all(layer is model.get_submodule(name) for name, layer in found.items())


def test_all_conv_leaves_linear_layers_out() -> None:
    assert all(isinstance(layer, nn.Conv2d) for layer in select(Residual(), "all_conv").values())
    assert len(select(Residual(), "all_conv")) == 9


@pytest.mark.parametrize(
    "layers", ["al_linear", "layer5.0", "", ["fc", "fd"], [], "layer4"], ids=repr
)
def test_a_misspelt_or_empty_selection_is_refused_with_the_candidates(
    layers: str | list[str],
) -> None:
    """Trap 29."""
    with pytest.raises(ValueError, match=r"accepted: 'all_linear'.*'conv1', 'layer1\.0'.*'fc'"):
        select(Residual(), layers)


@pytest.mark.parametrize("layers", ["all_conv", "last_block"])
def test_a_shortcut_that_matches_nothing_is_refused(layers: str) -> None:
    with pytest.raises(ValueError, match=rf"{layers}.*selects no layer.*names of layers: '0', '1'"):
        select(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), layers)


@pytest.mark.parametrize("layers", [None, 3, [1]], ids=repr)
def test_what_is_no_name_is_a_type_error(layers: object) -> None:
    with pytest.raises(TypeError, match="layers is"):
        select(Residual(), layers)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model is a int"):
        select(3, "all_linear")  # type: ignore[arg-type]


def test_only_layers_of_the_kinds_are_selected() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    assert list(select(model, "1", kinds=(nn.LayerNorm,))) == ["1"]
    with pytest.raises(ValueError, match="selects no layer"):
        select(model, "all_linear", kinds=(nn.LayerNorm,))


def test_a_shared_layer_is_selected_once_by_either_name() -> None:
    assert list(select(Shared(), "all_linear")) == ["first"]
    assert list(select(Shared(), "again")) == ["first"]


def test_attention_s_own_projection_is_no_layer_since_it_never_runs() -> None:
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    assert list(select(encoder, "all_linear")) == ["linear1", "linear2"]
    with pytest.raises(ValueError, match="selects no layer"):
        select(encoder, "self_attn.out_proj")


def test_the_blocks_of_a_transformer_are_stages() -> None:
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 3, enable_nested_tensor=False
    )
    assert list(select(encoder, "last_block")) == ["layers.2.linear1", "layers.2.linear2"]


def test_the_model_itself_may_be_the_layer() -> None:
    assert list(select(nn.Linear(2, 2), "all_linear")) == [""]
    assert torch.is_tensor(select(nn.Linear(2, 2), "all_linear")[""].weight)
