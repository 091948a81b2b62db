"""Surprise on CIFAR-10: `python -m benchmarks.ood.cifar --cifar10 DIR --cifar100 DIR --svhn DIR
--dtd DIR --preset demo`. CIFAR-100 is near, SVHN and DTD are far. See docs/ood.md.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import safetensors.torch
import torch
import typer
from torch import Tensor

from benchmarks import rows as stored
from benchmarks.ood import images, report
from benchmarks.ood.resnet import Recipe, ResNet18, looked_at, trained
from benchmarks.ood.trial import HEAD_INPUT, Outputs, ProbeOptions, Row, Trial, judge

SETS = ("CIFAR-100", "SVHN", "DTD")


@dataclasses.dataclass(frozen=True)
class Preset:
    """How much is trained and scored; None is all there is."""

    recipe: Recipe
    num_seeds: int
    num_train: int | None
    num_scored: int | None
    """Of every set, the normal one included."""
    least_accuracy: float
    """A model below it is not scored: what is far from a model that has not learned?"""
    probe: ProbeOptions


class Size(str, enum.Enum):
    """The presets by name."""

    demo = "demo"
    full = "full"


ALL_BLOCKS = ProbeOptions(layers="all_blocks")
PRESETS = {
    Size.demo: Preset(Recipe(width=16, epochs=10), 1, 10_000, 2_000, 0.50, ALL_BLOCKS),
    Size.full: Preset(Recipe(width=64, epochs=100), 3, None, None, 0.93, ALL_BLOCKS),
}


class Folders(NamedTuple):
    """Where the data sets lie."""

    cifar10: Path
    cifar100: Path
    svhn: Path
    dtd: Path


class Data(NamedTuple):
    """What is trained on, and what is scored."""

    train: images.Images
    normal: images.Images
    ood: dict[str, Tensor]


class InaccurateModelError(RuntimeError):
    """The model has not learned enough to be worth scoring."""


def compare(
    folders: Folders, preset: Preset, out: Path, device: str = "cpu", is_gated: bool = True
) -> list[Row]:
    """The rows of every seed; models are kept in `out` and taken from there if they are the same.

    Raises:
        FileNotFoundError, ValueError: a data set or a kept model is not what is expected.
        InaccurateModelError: a model is below the preset's accuracy, and `is_gated`.
    """
    data = load(folders, preset)
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for seed in range(preset.num_seeds):
        model = kept_model(data.train, preset.recipe, seed, torch.device(device), out)
        one = trial(model, data, seed)
        note(out, seed, {"accuracy": one.accuracy, **stored.circumstances(device)})
        if is_gated and one.accuracy < preset.least_accuracy:
            raise InaccurateModelError(
                f"seed {seed} has an accuracy of {one.accuracy:.4f}; accepted: at least "
                f"{preset.least_accuracy}, or --no-gate"
            )
        rows += judge(one, preset.probe)
    return rows


def load(folders: Folders, preset: Preset) -> Data:
    """The same inputs for every seed, drawn without order from each set."""
    ood = {
        "CIFAR-100": images.cifar100(folders.cifar100, "test"),
        "SVHN": images.svhn(folders.svhn, "test"),
        "DTD": images.dtd(folders.dtd),
    }
    return Data(
        drawn(images.cifar10(folders.cifar10, "train"), preset.num_train),
        drawn(images.cifar10(folders.cifar10, "test"), preset.num_scored),
        {name: drawn(found, preset.num_scored).pixels for name, found in ood.items()},
    )


def drawn(found: images.Images, count: int | None) -> images.Images:
    """So many of them, or all."""
    if count is None or count >= len(found.labels):
        return found
    chosen = torch.randperm(len(found.labels), generator=torch.Generator().manual_seed(0))[:count]
    return images.Images(found.pixels[chosen], found.labels[chosen])


def trial(model: ResNet18, data: Data, seed: int) -> Trial:
    """What `judge` takes."""

    def look(pixels: Tensor) -> Outputs:
        features, logits = looked_at(model, pixels)
        return Outputs({HEAD_INPUT: features}, logits)

    hits = look(data.normal.pixels).logits.argmax(1) == data.normal.labels
    return Trial(
        seed=seed,
        model=model,
        weight=model.head.weight.cpu(),
        bias=model.head.bias.cpu(),
        look=look,
        train=data.train.pixels,
        labels=data.train.labels,
        normal=data.normal.pixels,
        accuracy=float(hits.double().mean()),
        ood=data.ood,
    )


def kept_model(
    train: images.Images, recipe: Recipe, seed: int, device: torch.device, out: Path
) -> ResNet18:
    """The model of this seed from `out`, or a new one, which is then kept there.

    Raises:
        ValueError: the kept one was made in another way, or its file is not what was written.
    """
    path = out / f"resnet18-{seed}.safetensors"
    made_by = {"recipe": dataclasses.asdict(recipe), "num_train": len(train.labels)}
    known = meta(out).get(str(seed), {})
    if path.exists():
        if known.get("sha256") != sha256(path):
            raise ValueError(f"{path} is not the file whose SHA-256 is in {out / 'meta.json'}")
        if known.get("made_by") != made_by:
            raise ValueError(
                f"{path} was made by {known.get('made_by')}; accepted: {made_by}, or another --out"
            )
        model = ResNet18(int(train.labels.max()) + 1, recipe.width)
        model.load_state_dict(safetensors.torch.load_file(path))
        return model.to(device).eval()
    model = trained(train.pixels, train.labels, recipe, seed, device)
    safetensors.torch.save_file({k: v.cpu() for k, v in model.state_dict().items()}, path)
    note(out, seed, {"checkpoint": path.name, "sha256": sha256(path), "made_by": made_by})
    return model


def meta(out: Path) -> dict[str, Any]:
    """By seed, what is known of its model."""
    path = out / "meta.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def note(out: Path, seed: int, what: dict[str, Any]) -> None:
    """Adds to what is known of a seed's model."""
    known = meta(out)
    known.setdefault(str(seed), {}).update(what)
    (out / "meta.json").write_text(json.dumps(known, indent=2) + "\n")


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main(
    cifar10: Annotated[Path, typer.Option(help="Binary version, unpacked.")],
    cifar100: Annotated[Path, typer.Option(help="Binary version, unpacked.")],
    svhn: Annotated[Path, typer.Option(help="Where test_32x32.mat lies.")],
    dtd: Annotated[Path, typer.Option(help="Where the folder images lies.")],
    preset: Annotated[Size, typer.Option(help="How much is trained and scored.")] = Size.demo,
    out: Annotated[Path | None, typer.Option(help="Default runs/ood-cifar-PRESET.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    gate: Annotated[bool, typer.Option(help="Refuse to score an inaccurate model.")] = True,
    store: Annotated[bool, typer.Option(help="Store the rows that docs/ood.md shows.")] = False,
) -> None:
    """Train, score, and say how well every method tells CIFAR-10 from what is not."""
    out = out or Path(f"runs/ood-cifar-{preset.value}")
    folders = Folders(cifar10, cifar100, svhn, dtd)
    rows = compare(folders, PRESETS[preset], out, device, gate)
    report.write(rows, out, "cifar", SETS)
    if store:
        report.store(rows, f"ood_cifar_{preset.value}", SETS, device)
    report.show(rows, SETS)
    print(f"rows, table, plot and models are in {out}")


if __name__ == "__main__":
    typer.run(main)
