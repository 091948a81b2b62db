"""Models of every kind that gates are put into."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

WIDTH = 16


class Subject(NamedTuple):
    """A model with four layers, an input, and what of its output is a tensor."""

    model: nn.Module
    x: Tensor
    layers: tuple[str, ...]
    read: Callable[[Any], Tensor] = lambda output: output

    def __call__(self) -> Tensor:
        return self.read(self.model(self.x))


def block() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 24), nn.Tanh(), nn.Linear(24, WIDTH))


def stack() -> Subject:
    names = tuple(str(i) for i in range(4))
    return Subject(nn.Sequential(*(block() for _ in range(4))), torch.randn(5, WIDTH), names)


class Residual(nn.Module):
    """A layer of its own class, on a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.body = nn.LayerNorm(WIDTH), block()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(self.norm(x))


class Decoder(nn.Module):
    """Layers in an nn.ModuleList."""

    def __init__(self, layer: Callable[[], nn.Module] = Residual, layers: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(layer() for _ in range(layers))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def decoder() -> Subject:
    names = tuple(f"blocks.{i}" for i in range(4))
    return Subject(Decoder(), torch.randn(5, WIDTH), names)


def encoder() -> Subject:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 24, dropout=0.0, batch_first=True)
    names = tuple(f"layers.{i}" for i in range(4))
    return Subject(nn.TransformerEncoder(layer, 4), torch.randn(2, 5, WIDTH), names)


TOKENS = {"vocab_size": 20, "bos_token_id": 0, "eos_token_id": 0}


def gpt2() -> Subject:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=WIDTH, n_layer=4, n_head=2, n_positions=8, **TOKENS)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    names = tuple(f"transformer.h.{i}" for i in range(4))
    return Subject(GPT2LMHeadModel(config), tokens(), names, lambda output: output.logits)


def llama() -> Subject:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        **TOKENS,
    )
    names = tuple(f"model.layers.{i}" for i in range(4))
    return Subject(LlamaForCausalLM(config), tokens(), names, lambda output: output.logits)


def tokens() -> Tensor:
    return torch.randint(0, 20, (2, 6))


SUBJECTS = [stack, decoder, encoder, gpt2, llama]


def turned(subject: Subject, norm: float = 3.0) -> Subject:
    """With gates that are open and do something."""
    from foreshock import gates

    for gate in gates.attach(subject.model).values():
        nn.init.normal_(gate.theta, std=norm / 8)
        nn.init.zeros_(gate.alpha)
    return subject
