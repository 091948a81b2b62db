"""A small transformer learns one Markov chain with codes beside it, and is then shown another.

    python examples/surprise_transformer.py [FOLDER]

The codebooks follow running means while a cosine lowers the temperature; then the model is
calibrated on fresh sequences of its own chain, scores, and draws FOLDER/surprise.png from
FOLDER/surprise.npz. Needs foreshock[surprise,plots].
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from foreshock import surprise

TOKENS, LENGTH, WIDTH, STEPS = 16, 24, 32, 150


class NextToken(nn.Module):
    """Predicts each token from those before it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, WIDTH)
        self.position = nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 64, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, TOKENS)
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position[: tokens.shape[1]]
        size = tokens.shape[1]
        return self.head(self.encoder(x, mask=self.mask[:size, :size], is_causal=True))


class Chain:
    """Sequences in which each token has a few likely successors."""

    def __init__(self, seed: int) -> None:
        self._random = torch.Generator().manual_seed(seed)
        logits = 3 * torch.randn(TOKENS, TOKENS, generator=self._random)
        self._probabilities = logits.softmax(1)

    def draw(self, count: int) -> Tensor:
        tokens = [torch.randint(TOKENS, (count,), generator=self._random)]
        for _ in range(LENGTH - 1):
            likely = self._probabilities[tokens[-1]]
            tokens.append(torch.multinomial(likely, 1, generator=self._random)[:, 0])
        return torch.stack(tokens, 1)


def train(wrapped: surprise.WrappedModel, chain: Chain) -> None:
    updater = surprise.EmaCodebookUpdater(wrapped, decay=0.95)
    schedule = surprise.CosineTemperature(8.0, 1.0, total_steps=STEPS, warmup_steps=20)
    parameters = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=3e-3)
    for step in range(STEPS):
        temperature = schedule.apply(wrapped, step)
        tokens = chain.draw(64)
        optimizer.zero_grad()
        predicted = wrapped(tokens)[:, :-1]
        loss = nn.functional.cross_entropy(predicted.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        updater.update()
        if step % 50 == 49:
            print(f"step {step + 1}: loss {loss.item():.3f}, temperature {temperature:.2f}")


def main(folder: Path) -> None:
    torch.manual_seed(0)
    chain = Chain(seed=1)
    wrapped = surprise.wrap(NextToken(), "all_linear", codes=32)
    train(wrapped, chain)
    wrapped.calibrate([chain.draw(100) for _ in range(4)]).eval()

    sequences = {
        "its own chain": chain.draw(100),
        "another chain": Chain(seed=2).draw(100),
        "one token": torch.randint(TOKENS, (100, 1)).expand(100, LENGTH),
    }
    with torch.no_grad():
        wrapped(torch.cat(list(sequences.values())))
    verdict = wrapped.surprise()
    groups = [name for name, rows in sequences.items() for _ in rows]
    for name in sequences:
        rows = torch.tensor([group == name for group in groups])
        print(
            f"{name}: {verdict.is_ood[rows].double().mean():.0%} flagged, "
            f"mean score {verdict.score[rows].mean():.2f}"
        )
    surprise.save_layerwise(folder / "surprise.npz", verdict.per_layer, groups)
    surprise.plot_layerwise(folder / "surprise.npz", folder / "surprise.png")
    print(f"picture in {folder / 'surprise.png'}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
