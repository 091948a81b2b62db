"""A small CNN learns the digits 0 to 4, gets codes, and is then shown 5 to 9 and noise.

    python examples/surprise_cnn.py [FOLDER]

Trains the network, then for a while both it and its codebooks, calibrates on held-out digits,
scores, and draws FOLDER/surprise.png from FOLDER/surprise.npz. Needs foreshock[surprise,plots].
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from foreshock import surprise

BATCH = 64


def build() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 64),
        nn.ReLU(inplace=True),
        nn.Linear(64, 5),
    )


def digits() -> tuple[dict[str, Tensor], Tensor]:
    """Images (N, 1, 8, 8) of known digits, three ways apart, and of strange ones; and labels."""
    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 16
    labels = torch.from_numpy(data.target).long()
    known = (labels < 5).nonzero()[:, 0]
    known = known[torch.randperm(len(known))]
    train, calibration, test = known.split([500, 200, len(known) - 700])
    parts = {
        "train": images[train],
        "calibration": images[calibration],
        "0 to 4": images[test],
        "5 to 9": images[labels >= 5],
        "noise": torch.rand(200, 1, 8, 8),
    }
    return parts, labels[train]


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> None:
    """Trains the network, and its codes where it has some."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(BATCH):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images[rows]), labels[rows])
            if isinstance(model, surprise.WrappedModel):
                loss = loss + model.coding_loss()
            loss.backward()
            optimizer.step()
    print(f"after {epochs} epochs: loss {loss.item():.3f}")


def main(folder: Path) -> None:
    torch.manual_seed(0)
    parts, labels = digits()
    model = build()
    train(model, parts["train"], labels, epochs=12)
    wrapped = surprise.wrap(model, ["all_conv", "all_linear"], codes=32, coding_dim=8)
    wrapped.initialise_codes([parts["train"]])
    train(wrapped, parts["train"], labels, epochs=3)
    for found in surprise.diagnose(wrapped, [parts["train"]]):
        print(f"layer {found.layer}: {found.utilisation:.0%} of {found.codes} codes in use")

    wrapped.calibrate([parts["calibration"]]).eval()
    names = ["0 to 4", "5 to 9", "noise"]
    with torch.no_grad():
        wrapped(torch.cat([parts[name] for name in names]))
    verdict = wrapped.surprise()
    groups = [name for name in names for _ in parts[name]]
    normal = torch.tensor([group == names[0] for group in groups])
    for name in names:
        rows = torch.tensor([group == name for group in groups])
        print(f"{name}: {verdict.is_ood[rows].double().mean():.0%} flagged")
        if name != names[0]:
            both = normal | rows
            area = roc_auc_score(rows[both], verdict.score[both])
            print(f"{name} against {names[0]}: AUROC {area:.3f}")
    surprise.save_layerwise(folder / "surprise.npz", verdict.per_layer, groups)
    surprise.plot_layerwise(folder / "surprise.npz", folder / "surprise.png")
    print(f"picture in {folder / 'surprise.png'}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
