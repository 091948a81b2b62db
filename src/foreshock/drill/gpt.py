"""A small GPT and its training run, to be read from top to bottom.

A decoder-only transformer with layer norm before each half of a block. Its parameters have names
meant to be read by people (`blocks.3.attention.qkv.weight`), and each has one role: the embedding
and the head are not tied, so that a name points to one place in the model.

Shapes: B rows of a batch, T tokens of a row, C channels (the width of the model), H attention
heads, D channels per head (C = H * D), V tokens in the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from foreshock.drill.text import TextBatches, Vocabulary, load_corpus, split


@dataclass(frozen=True)
class GPTConfig:
    """The shape of the model.

    Args:
        vocabulary_size: V, the number of tokens; the default is that of `Vocabulary()`.
        context: the most tokens the model can look back on, at least 1.
        width: C, a multiple of `num_heads`.
        num_blocks: attention + MLP pairs, at least 1.
        num_heads: H, at least 1.
        dropout: probability of zeroing an activation in training, at least 0 and below 1.

    Raises:
        ValueError: if a field is outside what is accepted.
    """

    vocabulary_size: int = len(Vocabulary())
    context: int = 64
    width: int = 160
    num_blocks: int = 4
    num_heads: int = 4
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("vocabulary_size", "context", "width", "num_blocks", "num_heads"):
            given = getattr(self, name)
            if not isinstance(given, int) or given < 1:
                _reject(name, given, "a whole number, at least 1")
        if self.width % self.num_heads != 0:
            _reject("width", self.width, f"a multiple of num_heads, which is {self.num_heads}")
        if not 0.0 <= self.dropout < 1.0:
            _reject("dropout", self.dropout, "at least 0 and below 1")


class CausalSelfAttention(nn.Module):
    """Every token gathers from itself and the tokens before it: softmax(q k^T / sqrt(D)) v."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.dropout = config.dropout
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x_BTC: Tensor) -> Tensor:
        qkv_BT3HD = self.qkv(x_BTC).unflatten(-1, (3, self.num_heads, -1))
        q_BHTD, k_BHTD, v_BHTD = (part.transpose(1, 2) for part in qkv_BT3HD.unbind(2))
        gathered_BHTD = F.scaled_dot_product_attention(
            q_BHTD,
            k_BHTD,
            v_BHTD,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=True,
        )
        gathered_BTC = gathered_BHTD.transpose(1, 2).flatten(2)
        out_BTC: Tensor = self.out(gathered_BTC)
        return out_BTC


class MLP(nn.Module):
    """Every token is transformed by itself, through a layer four times as wide."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.width, 4 * config.width, bias=False)
        self.down = nn.Linear(4 * config.width, config.width, bias=False)

    def forward(self, x_BTC: Tensor) -> Tensor:
        out_BTC: Tensor = self.down(F.gelu(self.up(x_BTC)))
        return out_BTC


class Block(nn.Module):
    """Attention, then the MLP; each reads a normalised copy of the stream and adds to it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width)
        self.attention = CausalSelfAttention(config)
        self.mlp_norm = nn.LayerNorm(config.width)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, h_BTC: Tensor) -> Tensor:
        h_BTC = h_BTC + self.dropout(self.attention(self.attention_norm(h_BTC)))
        out_BTC: Tensor = h_BTC + self.dropout(self.mlp(self.mlp_norm(h_BTC)))
        return out_BTC


class GPT(nn.Module):
    """Predicts, at every token of a row, which token comes next.

    The initial weights come from torch's global generator: seed it first.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocabulary_size, config.width)
        self.position_embedding = nn.Embedding(config.context, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_blocks))
        self.final_norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary_size, bias=False)
        self._initialise()

    def _initialise(self) -> None:
        # GPT-2's 0.02 suits a width of about 1024. A matrix multiplies the size of its input by
        # std * sqrt(width): keeping that product lets a narrow model learn as soon as a wide one.
        std = 0.02 * math.sqrt(1024 / self.config.width)
        # Every block adds twice to the stream. Scaling what is added keeps the variance of the
        # stream, and so the size of the first gradients, independent of the depth (as in GPT-2).
        residual_std = std / math.sqrt(2 * self.config.num_blocks)
        for name, parameter in self.named_parameters():
            if name.endswith(("attention.out.weight", "mlp.down.weight")):
                nn.init.normal_(parameter, std=residual_std)
            elif parameter.ndim == 2:
                nn.init.normal_(parameter, std=std)

    def forward(self, x_BT: Tensor) -> Tensor:
        """Return the logits of the next token at every position.

        Args:
            x_BT: int64 tokens, shape (B, T) with T <= config.context.

        Returns:
            logits_BTV: unnormalised log-probabilities, shape (B, T, V).

        Raises:
            ValueError: if `x_BT` is not of that shape.
        """
        if x_BT.ndim != 2 or x_BT.shape[1] > self.config.context:
            _reject("x_BT", tuple(x_BT.shape), f"of shape (B, T) with T <= {self.config.context}")
        positions_T = torch.arange(x_BT.shape[1], device=x_BT.device)
        h_BTC = self.token_embedding(x_BT) + self.position_embedding(positions_T)
        h_BTC = self.dropout(h_BTC)
        for block in self.blocks:
            h_BTC = block(h_BTC)
        logits_BTV: Tensor = self.head(self.final_norm(h_BTC))
        return logits_BTV


def next_token_loss(logits_BTV: Tensor, y_BT: Tensor) -> Tensor:
    """Return the mean cross-entropy, in nats per token, of the tokens that did come next.

    Args:
        logits_BTV: logits, shape (B, T, V).
        y_BT: int64 tokens, shape (B, T).

    Returns:
        A scalar; log(V) for a model that knows nothing, 4.57 for the 97 tokens of `Vocabulary()`.
    """
    return F.cross_entropy(logits_BTV.flatten(0, 1), y_BT.flatten())


@torch.no_grad()
def generate(
    model: GPT,
    prompt_T: Tensor,
    length: int,
    temperature: float = 0.8,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue a prompt, one sampled token at a time, without dropout.

    Args:
        model: the model; whether it was in training mode is restored.
        prompt_T: int64 tokens, shape (T,) with T >= 1; only the last `context` of them are read.
        length: the number of tokens to add, at least 0.
        temperature: above 0; 1 samples as predicted, less is more conservative.
        generator: where the randomness comes from, on the model's device; None for torch's global
            one, which a training run that has to be reproducible would notice.

    Returns:
        The prompt and what follows it: int64, shape (T + length,).

    Raises:
        ValueError: if an argument is outside what is accepted.
        RuntimeError: from torch, if a prediction of the model is not finite.

    Cost: one forward pass over up to `context` tokens for every token added.
    """
    if prompt_T.ndim != 1 or len(prompt_T) == 0:
        _reject("prompt_T", tuple(prompt_T.shape), "of shape (T,) with T >= 1")
    if length < 0:
        _reject("length", length, "at least 0")
    if not 0.0 < temperature < math.inf:
        _reject("temperature", temperature, "above 0 and finite")
    was_training = model.training
    model.eval()
    try:
        text_T = prompt_T
        for _ in range(length):
            logits_V = model(text_T[None, -model.config.context :])[0, -1]
            probabilities_V = torch.softmax(logits_V / temperature, dim=-1)
            next_token = torch.multinomial(probabilities_V, 1, generator=generator)
            text_T = torch.cat([text_T, next_token])
        return text_T
    finally:
        model.train(was_training)


@dataclass(frozen=True)
class Recipe:
    """Everything a training run is built from, but for its seed.

    The defaults are for a run of a few hundred steps on two CPU cores, about 0.12 s each.

    Args:
        model: the shape of the model; rows of a batch are `model.context` tokens long.
        batch_size: rows per batch, at least 1.
        learning_rate: the highest one, reached after the warm-up, above 0.
        warmup_steps: steps over which the learning rate grows linearly, at least 0.
        betas: AdamW's decay rates of the two moments, each at least 0 and below 1.
        weight_decay: AdamW's, for matrices only, at least 0.
        max_norm: the gradient norm to clip to in the training loop, above 0.

    Raises:
        ValueError: if a field is outside what is accepted.
    """

    model: GPTConfig = field(default_factory=GPTConfig)
    batch_size: int = 32
    learning_rate: float = 3e-3
    warmup_steps: int = 20
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    max_norm: float = 1.0

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            _reject("batch_size", self.batch_size, "at least 1")
        if not 0.0 < self.learning_rate < math.inf:
            _reject("learning_rate", self.learning_rate, "above 0 and finite")
        if self.warmup_steps < 0:
            _reject("warmup_steps", self.warmup_steps, "at least 0")
        if len(self.betas) != 2 or not all(0.0 <= beta < 1.0 for beta in self.betas):
            _reject("betas", self.betas, "two numbers, each at least 0 and below 1")
        if not 0.0 <= self.weight_decay < math.inf:
            _reject("weight_decay", self.weight_decay, "at least 0 and finite")
        if not self.max_norm > 0.0:
            _reject("max_norm", self.max_norm, "above 0")


class Run(NamedTuple):
    """The parts of a training run; a snapshot of all four is a snapshot of the run."""

    model: GPT
    optimizer: AdamW
    scheduler: LambdaLR
    batches: TextBatches


def build(seed: int = 0, recipe: Recipe | None = None) -> Run:
    """Build a training run on the documentation's text; the same seed gives the same losses.

    Seeds torch's global generator, from which the initial weights and then dropout are drawn.

    Args:
        seed: of the initial weights, of dropout and of the batches.
        recipe: None for `Recipe()`.

    Returns:
        The run, before its first step. Its batches never end, and leave out what
        `split(Vocabulary().encode(load_corpus()))` holds out.

    Raises:
        ValueError: if the model's vocabulary is smaller than that of the text.
    """
    if recipe is None:
        recipe = Recipe()
    vocabulary = Vocabulary()
    if recipe.model.vocabulary_size < len(vocabulary):
        _reject("vocabulary_size", recipe.model.vocabulary_size, f"at least {len(vocabulary)}")
    training_tokens, _ = split(vocabulary.encode(load_corpus()))
    batches = TextBatches(training_tokens, recipe.batch_size, recipe.model.context, seed)
    torch.manual_seed(seed)
    model = GPT(recipe.model)
    optimizer = _optimizer_for(model, recipe)
    scheduler = LambdaLR(optimizer, warmup(recipe.warmup_steps))
    return Run(model, optimizer, scheduler, batches)


def _optimizer_for(model: GPT, recipe: Recipe) -> AdamW:
    # Decay holds back matrices; a gain or a bias pulled towards 0 would only be biased.
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas, fused=True)


def warmup(num_steps: int) -> Callable[[int], float]:
    # Constant after the warm-up: a run then has no planned end, and its healthy loss and gradient
    # norm drift slowly, which is what a fault has to be told from.
    def factor(step: int) -> float:
        return min(1.0, (step + 1) / (num_steps + 1))

    return factor


def _reject(name: str, given: object, accepted: str) -> NoReturn:
    raise ValueError(f"{name} must be {accepted}; got {given!r}")
