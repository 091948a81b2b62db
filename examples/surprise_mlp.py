"""Which digits does a network not know? Trains, fits, scores, and draws the answer.

python examples/surprise_mlp.py --out-dir runs/surprise_mlp

A small network learns the digits 0 to 4. A probe learns from the same training data what its layers
put out, and its threshold from some data that the network was not trained on. Then it says of
further digits, of the digits 5 to 9 and of noise how surprising they are. Takes some seconds.
Needs scikit-learn and matplotlib: pip install 'foreshock[surprise,plots]'.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from foreshock import surprise

matplotlib.use("Agg")
from matplotlib import pyplot as plt

KNOWN = 5


def load(seed: int) -> tuple[TensorDataset, Tensor, dict[str, Tensor]]:
    """60 % of the digits 0 to 4 to train with, 20 % to calibrate with, and what to ask about."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.from_numpy(labels)
    random = torch.Generator().manual_seed(seed)
    known = (y < KNOWN).nonzero()[:, 0]
    known = known[torch.randperm(len(known), generator=random)]
    fifth = len(known) // 5
    train, calibration, held_out = known.split([len(known) - 2 * fifth, fifth, fifth])
    asked = {
        "digits 0 to 4, held out": x[held_out],
        "digits 5 to 9": x[y >= KNOWN],
        "noise": torch.rand(300, 64, generator=random),
    }
    return TensorDataset(x[train], y[train]), x[calibration], asked


def train(data: TensorDataset, epochs: int, seed: int) -> nn.Module:
    """An ordinary network, trained in the ordinary way."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, KNOWN)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(epochs):
        for x, y in DataLoader(data, batch_size=64, shuffle=True):
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.eval()


def draw(seen: dict[str, surprise.Surprise], threshold: float, path: Path) -> None:
    """Scores by set, and the threshold that was calibrated."""
    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    lowest = min(float(one.score.min()) for one in seen.values())
    # Scores differ by powers of ten; from the lowest they can be drawn on a logarithmic axis.
    bins = torch.logspace(-1, 3, 60).tolist()
    for name, one in seen.items():
        axes.hist((one.score - lowest + 0.1).tolist(), bins, alpha=0.6, label=name)
    axes.axvline(threshold - lowest + 0.1, color="black", linestyle="--", label="threshold")
    axes.set(xscale="log", xlabel="surprise above the least", ylabel="samples")
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out-dir", type=Path, default=Path("runs/surprise_mlp"))
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()

    data, calibration, asked = load(given.seed)
    model = train(data, given.epochs, given.seed)
    loader = DataLoader(data, batch_size=64)
    probe = surprise.fit(model, loader, calibration=[calibration], alpha=0.05, seed=given.seed)
    print("samples that fitted, normalised and calibrated:", *probe.samples.values())

    seen = {name: probe(x) for name, x in asked.items()}
    normal = next(iter(seen.values())).score
    for name, one in seen.items():
        labels = torch.cat([torch.zeros(len(normal)), torch.ones(len(one))])
        auroc = roc_auc_score(labels, torch.cat([normal, one.score]))
        flagged = one.is_ood.float().mean().item()
        print(f"{name:24} median {one.score.median():9.2f}  flagged {flagged:6.1%}  ", end="")
        print(f"AUROC {auroc:.3f}")

    given.out_dir.mkdir(parents=True, exist_ok=True)
    probe.save(given.out_dir / "probe.safetensors")
    again = surprise.SurpriseProbe.load(given.out_dir / "probe.safetensors", model)
    assert again(asked["noise"]).score.equal(seen["noise"].score)
    draw(seen, probe.calibrator.threshold(), given.out_dir / "scores.png")
    print("written:", given.out_dir / "probe.safetensors", given.out_dir / "scores.png")


if __name__ == "__main__":
    main()
