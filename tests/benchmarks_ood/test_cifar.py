"""The comparison on CIFAR-10, with tiny files, a tiny model and few seconds."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from benchmarks.ood import cifar, images, resnet
from benchmarks.ood.trial import OURS, ProbeOptions, Row
from typer.testing import CliRunner

from tests.benchmarks_ood import image_files
from tests.benchmarks_ood.commands import command

RECIPE = resnet.Recipe(width=4, epochs=2, batch_size=50)
TINY = cifar.Preset(RECIPE, 1, None, 25, 0.0, ProbeOptions(layers="last_block", codes=8))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> cifar.Folders:
    root = tmp_path_factory.mktemp("data")
    return cifar.Folders(
        image_files.write_cifar10(root / "cifar10"),
        image_files.write_cifar100(root / "cifar100"),
        image_files.write_svhn(root / "svhn"),
        image_files.write_dtd(root / "dtd"),
    )


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("out")


@pytest.fixture(scope="module")
def rows(folders: cifar.Folders, out: Path) -> list[Row]:
    return cifar.compare(folders, TINY, out)


def test_every_method_is_scored_on_every_set(rows: list[Row]) -> None:
    assert {row.ood_set for row in rows} == set(cifar.SETS)
    methods = [row.method for row in rows if row.ood_set == "SVHN"]
    assert OURS in methods
    assert "ViM" in methods
    assert len(methods) == len(set(methods)) == 12
    assert {row.num_normal for row in rows} == {25}
    assert {row.num_ood for row in rows} == {25}


def test_a_kept_model_is_described_with_its_hash(rows: list[Row], out: Path) -> None:
    known = json.loads((out / "meta.json").read_text())["0"]
    path = out / known["checkpoint"]
    assert known["sha256"] == cifar.sha256(path)
    assert known["accuracy"] == rows[0].accuracy
    assert known["made_by"]["recipe"]["width"] == 4
    assert "torch" in known
    assert "head.weight" in safetensors.torch.load_file(path)


def kept(folders: cifar.Folders, preset: cifar.Preset, out: Path) -> resnet.ResNet18:
    data = cifar.load(folders, preset)
    return cifar.kept_model(data.train, preset.recipe, 0, torch.device("cpu"), out)


def test_a_kept_model_is_not_trained_again(
    rows: list[Row], folders: cifar.Folders, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cifar, "trained", lambda *_: pytest.fail("it was trained again"))
    assert cifar.compare(folders, TINY, out) == rows


def test_a_kept_model_that_was_changed_is_refused(
    rows: list[Row], folders: cifar.Folders, out: Path, tmp_path: Path
) -> None:
    for path in out.glob("*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    path = tmp_path / "resnet18-0.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ValueError, match="is not the file whose SHA-256 is in"):
        kept(folders, TINY, tmp_path)


def test_a_model_made_in_another_way_is_refused(
    rows: list[Row], folders: cifar.Folders, out: Path
) -> None:
    with pytest.raises(ValueError, match=r"was made by .* or another --out"):
        kept(folders, dataclasses.replace(TINY, num_train=100), out)


def test_a_model_that_has_not_learned_is_not_scored(
    rows: list[Row], folders: cifar.Folders, out: Path
) -> None:
    strict = dataclasses.replace(TINY, least_accuracy=1.01)
    with pytest.raises(cifar.InaccurateModelError, match=r"accepted: at least 1\.01, or --no-gate"):
        cifar.compare(folders, strict, out)
    assert cifar.compare(folders, strict, out, is_gated=False) == rows


def test_training_teaches_the_colors(folders: cifar.Folders) -> None:
    train = images.cifar10(folders.cifar10, "train")
    recipe = resnet.Recipe(width=4, epochs=6, batch_size=20)
    model = resnet.trained(train.pixels, train.labels, recipe, 0, torch.device("cpu"))
    _, logits = resnet.looked_at(model, train.pixels)
    assert (logits.argmax(1) == train.labels).double().mean() > 0.3  # chance is 0.1


@pytest.mark.parametrize("steps", [1, 2, 10, 300])
def test_the_learning_rate_rises_to_its_value_and_falls_to_nothing(steps: int) -> None:
    shares = [resnet.share(step, steps) for step in range(steps + 1)]
    assert max(shares) == 1
    assert shares[-1] == pytest.approx(0 if steps > 1 else 1)
    peak = shares.index(1)
    assert shares[:peak] == sorted(shares[:peak])
    assert shares[peak:] == sorted(shares[peak:], reverse=True)


def test_resnet_18_has_its_eleven_million_parameters_and_four_stages() -> None:
    model = resnet.ResNet18(num_classes=10)
    assert sum(p.numel() for p in model.parameters()) == 11_173_962
    assert sum(isinstance(m, torch.nn.Conv2d) for m in model.modules()) == 20
    shapes = []
    for stage in (model.stage1, model.stage4):
        stage.register_forward_hook(lambda _, __, output: shapes.append(tuple(output.shape)))
    assert model(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).shape == (2, 10)
    assert shapes == [(2, 64, 32, 32), (2, 512, 4, 4)]


def test_an_augmented_image_is_a_shifted_or_mirrored_part_of_itself() -> None:
    torch.manual_seed(0)
    pixels = torch.randint(1, 256, (20, 3, 32, 32), dtype=torch.uint8)
    for before, after in zip(pixels, resnet.augmented(pixels), strict=True):
        padded = torch.nn.functional.pad(before, [4] * 4)
        crops = padded.unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
        matches = (crops == after).flatten(1).all(1) | (crops == after.flip(2)).flatten(1).all(1)
        assert matches.sum() == 1


def test_features_are_the_input_of_the_head(
    folders: cifar.Folders, rows: list[Row], out: Path
) -> None:
    model = kept(folders, TINY, out)
    pixels = images.svhn(folders.svhn, "test").pixels
    features, logits = resnet.looked_at(model, pixels, batch_size=7)
    with torch.no_grad():
        torch.testing.assert_close(logits, model(pixels))
    assert features.shape == (30, 32)


def test_the_command_writes_what_it_found(
    rows: list[Row], folders: cifar.Folders, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cifar.PRESETS, cifar.Size.demo, TINY)
    asked = ["--preset", "demo", "--out", str(out)]
    for name, folder in folders._asdict().items():
        asked += [f"--{name}", str(folder)]
    done = CliRunner().invoke(command(cifar.main), asked)
    assert done.exit_code == 0, done.output
    with (out / "cifar.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    assert (out / "cifar.png").exists()
    assert "CIFAR-100" in (out / "cifar.md").read_text()


def test_a_wrong_folder_is_named(folders: cifar.Folders, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"test_32x32\.mat does not exist"):
        cifar.load(folders._replace(svhn=tmp_path), TINY)
