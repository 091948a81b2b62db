"""A GPT with rotation gates: do they open as planned, stay rotations, and fold?

python examples/rotation_gates.py --out-dir runs/rotation_gates

A small GPT learns the text of CPython's documentation with a gate behind each of its intermediate
layers, which a schedule opens over the warm-up, while the monitor looks at every gate in every
step. Then the gates are folded. In a residual stream that is exact nowhere: there they stay, as
constant matrices without an exponential. In a plain stack of layers it is, and they are gone.
Half a minute on two cores. Needs matplotlib: pip install 'foreshock[plots]'.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch import Tensor, nn

import foreshock as fs
from foreshock.drill.gpt import GPT, GPTConfig, next_token_loss
from foreshock.drill.text import TextBatches, Vocabulary, load_corpus

matplotlib.use("Agg")
from matplotlib import pyplot as plt

CONFIG = GPTConfig(num_blocks=6)


def train(model: GPT, out_dir: Path, steps: int, warmup: int) -> None:
    """Through the warm-up and beyond, with a look at gates and logits in every step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, fused=True)
    schedule = fs.gates.AlphaSchedule(model, warmup, target=0.1, optimizer=optimizer)
    batches = TextBatches(Vocabulary().encode(load_corpus()), 16, CONFIG.context, length=steps)
    looks = {"gate_interval": 1, "gate_schedule": schedule, "logit_interval": 1}
    with fs.Monitor(model, optimizer, out_dir, **looks) as monitor:
        for _, (x, y) in monitor.loop(batches):
            optimizer.zero_grad()
            logits = model(x)
            loss = next_token_loss(logits, y)
            loss.backward()
            monitor.clip_grad_norm_(1.0)
            if not monitor.step(loss, logits=logits):
                break
            optimizer.step()


def draw(out_dir: Path) -> Path:
    """Orthogonality, opening and logits over the steps."""
    gates, logits = (
        np.load(out_dir / "monitoring" / f"{name}.npz") for name in ("gates", "logits")
    )
    figure, (above, middle, below) = plt.subplots(3, figsize=(7, 8), layout="constrained")
    for i, name in enumerate(gates["mix.labels"]):
        above.plot(gates["step"], gates["orthogonality_max"][:, i], label=name)
        middle.plot(gates["step"], gates["mix"][:, i], label=name)
    above.axhline(1e-6, color="black", linestyle="--", label="1e-6")
    above.set(yscale="log", ylabel="|R^T R - I|, worst block")
    middle.set(ylabel="sigmoid(alpha)")
    for name in ("mean", "std", "max", "min"):
        below.plot(logits["step"], logits[name], label=name)
    below.set(xlabel="step", ylabel="logits")
    for axes in (above, middle, below):
        axes.legend(fontsize=8)
    path = out_dir / "rotation_gates.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


@torch.no_grad()
def fold(name: str, model: nn.Module, x: Tensor) -> None:
    """Folds the gates of a model, and compares what it puts out with what it did."""
    model.eval()
    before = model(x)
    done = fs.gates.fold(model)
    error = (model(x) - before).abs().max() / before.abs().max()
    print(f"{name}: {len(done.into)} gates are gone, {len(done.constant)} are constant; ", end="")
    print(f"outputs differ by {error:.1e} of the largest")


def stack(width: int = 64) -> nn.Sequential:
    """Layers one behind the other, and nothing beside them."""
    return nn.Sequential(
        *(
            nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
            for _ in range(6)
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out-dir", type=Path, default=Path("runs/rotation_gates"))
    parser.add_argument("--steps", type=int, default=150)
    given = parser.parse_args()

    torch.manual_seed(0)
    model = GPT(CONFIG)
    attached = fs.gates.attach(model)
    print("gates behind:", ", ".join(attached))
    warmup = 2 * given.steps // 3
    train(model, given.out_dir, given.steps, warmup)

    seen = fs.records.read_series(given.out_dir / "monitoring" / "gates.jsonl").rows
    worst = max(max(row["orthogonality_max"].values()) for row in seen)
    first, opened = ([*seen[i]["mix"].values()] for i in (0, warmup))
    print(f"worst |R^T R - I| in {len(seen)} looks: {worst:.1e}")
    print(f"sigmoid(alpha): {first[0]:.4f} at first, {opened[0]:.4f} after {warmup} steps")

    fold("GPT", model, next(iter(TextBatches(Vocabulary().encode(load_corpus()), 4, 64)))[0])
    plain = stack()
    fs.gates.attach(plain, "all", alpha=0.0, theta_std=0.5)
    fold("plain stack", plain, torch.randn(32, 64))
    print("written:", draw(given.out_dir), given.out_dir / "monitoring")


if __name__ == "__main__":
    main()
