"""What a probe and coding cost: training steps and inference with them and without.

An MLP of six layers of 512 with batches of 256, and a transformer encoder of four layers of width
128. In eval mode the bare encoder runs as PyTorch's one kernel, as it does for everyone. A round
runs one step of each variant.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import rows
from benchmarks.interleave import Timing, time_in_turn
from foreshock.surprise import SurpriseProbe, WrappedModel, fit, wrap
from foreshock.surprise.overhead import estimate

ROUNDS = 41
CODES = {"K64 D32": (64, 32), "K16 D8": (16, 8)}


@dataclasses.dataclass(frozen=True)
class Size:
    """A model and its batch."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]


def mlp() -> nn.Module:
    return nn.Sequential(*[part for _ in range(6) for part in (nn.Linear(512, 512), nn.ReLU())])


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)


SIZES = [
    Size("MLP 6x512, batch 256", mlp, (256, 512)),
    Size("transformer d128 L4, 32 x 32 tokens", encoder, (32, 32, 128)),
]


def coded(model: nn.Module, codes: tuple[int, int], is_trained: bool) -> WrappedModel:
    """A wrapped copy of the model; codes that are not trained need no gradient."""
    wrapped = wrap(copy.deepcopy(model), "all_linear", codes[0], codes[1])
    for parameter in wrapped.coding_parameters():
        parameter.requires_grad_(is_trained)
    return wrapped


def probed(model: nn.Module, size: Size, codes: tuple[int, int]) -> SurpriseProbe:
    """A probe of a copy of the model, fitted to noise: what it knows is of no account here."""
    loader = [torch.randn(size.shape) for _ in range(8)]
    return fit(copy.deepcopy(model), loader, codes=codes[0], dim=codes[1])


def watched(probe: SurpriseProbe, run: Callable[[], object]) -> Callable[[], object]:
    """The same step, and what the probe says of its batch."""

    def step() -> object:
        with probe.watch() as seen:
            run()
        return seen.surprise()

    return step


def train_step(model: nn.Module, x: Tensor, has_loss: bool = False) -> Callable[[], None]:
    wanted = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(wanted, lr=1e-5, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        if has_loss:
            assert isinstance(model, WrappedModel)
            loss = loss + model.coding_loss()
        loss.backward()
        optimizer.step()

    return step


def inference(model: nn.Module, x: Tensor) -> Callable[[], object]:
    model.eval()
    return lambda: torch.no_grad()(model)(x)


def saved_bytes(model: nn.Module, x: Tensor, has_loss: bool = False) -> int:
    """Bytes of the distinct storages that backward holds, beside the parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(x).square().mean()
        if has_loss:
            assert isinstance(model, WrappedModel)
            loss = loss + model.coding_loss()
    assert loss.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values())


def counted_percent(model: WrappedModel, x: Tensor) -> float:
    """Multiply-adds of coding, in percent of those of the layers that code."""
    model(x)
    found = estimate(model)
    return 100 * sum(layer.coding for layer in found) / sum(layer.own for layer in found)


def row(timing: Timing, base: Timing, **more: float) -> dict[str, Any]:
    return {**timing.row(), "percent": 100 * (timing.over(base) - 1), **more}


@pytest.mark.parametrize("size", SIZES, ids=lambda size: size.name)
def test_training_overhead(benchmark: Any, size: Size) -> None:
    torch.manual_seed(0)
    model, x = size.build(), torch.randn(size.shape)
    bare = saved_bytes(model, x)
    variants: dict[str, Callable[[], object]] = {"bare": train_step(copy.deepcopy(model), x)}
    extra: dict[str, dict[str, float]] = {}
    for name, codes in CODES.items():
        for kind, is_trained in (("coded", False), ("coding loss", True)):
            wrapped = coded(model, codes, is_trained)
            assert torch.equal(wrapped(x), model(x))
            extra[f"{kind}, {name}"] = {
                "saved_percent": 100 * (saved_bytes(wrapped, x, is_trained) / bare - 1)
            }
            variants[f"{kind}, {name}"] = train_step(wrapped, x, is_trained)
        probe = probed(model, size, codes)
        variants[f"probe watching, {name}"] = watched(probe, train_step(probe.model, x))
    timings = time_in_turn(benchmark, variants, ROUNDS)
    found = {n: row(t, timings["bare"], **extra.get(n, {})) for n, t in timings.items()}
    rows.store("surprise", f"{size.name}, training", "cpu", found)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: size.name)
def test_inference_overhead(benchmark: Any, size: Size) -> None:
    torch.manual_seed(0)
    model, x = size.build(), torch.randn(size.shape)
    variants: dict[str, Callable[[], object]] = {"bare": inference(copy.deepcopy(model), x)}
    extra: dict[str, dict[str, float]] = {}
    for name, codes in CODES.items():
        wrapped = coded(model, codes, False)
        assert torch.equal(wrapped(x), model(x))
        extra[f"coded, {name}"] = {"counted_percent": counted_percent(wrapped, x)}
        variants[f"coded, {name}"] = inference(wrapped, x)
        probe = probed(model, size, codes)
        variants[f"probe watching, {name}"] = watched(probe, inference(probe.model, x))
    timings = time_in_turn(benchmark, variants, ROUNDS)
    found = {n: row(t, timings["bare"], **extra.get(n, {})) for n, t in timings.items()}
    rows.store("surprise", f"{size.name}, inference", "cpu", found)
