"""The readers of image data sets, on files written byte by byte."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks.ood import images
from PIL import Image

from tests.benchmarks_ood import image_files


def test_a_cifar10_record_is_a_label_and_three_planes(tmp_path: Path) -> None:
    pixels = np.zeros((3, 32, 32))
    pixels[0, 0, 1], pixels[1, 2, 3], pixels[2, 31, 31] = 10, 20, 30
    record = image_files.cifar_record([7], pixels)
    (tmp_path / "test_batch.bin").write_bytes(record + image_files.cifar_record([0], 0 * pixels))
    found = images.cifar10(tmp_path, "test")
    assert found.labels.tolist() == [7, 0]
    assert found.pixels.dtype == torch.uint8
    assert found.pixels.shape == (2, 3, 32, 32)
    assert found.pixels[0].nonzero().tolist() == [[0, 0, 1], [1, 2, 3], [2, 31, 31]]
    assert found.pixels[0][found.pixels[0] > 0].tolist() == [10, 20, 30]


def test_cifar10_is_trained_on_five_files_in_their_order(tmp_path: Path) -> None:
    for i in range(1, 6):
        record = image_files.cifar_record([i], np.zeros((3, 32, 32)))
        (tmp_path / f"data_batch_{i}.bin").write_bytes(record)
    assert images.cifar10(tmp_path, "train").labels.tolist() == [1, 2, 3, 4, 5]


def test_the_folder_that_the_archive_brings_is_found(tmp_path: Path) -> None:
    image_files.write_cifar10(tmp_path / "cifar-10-batches-bin", per_file=3)
    assert len(images.cifar10(tmp_path, "train").labels) == 15


def test_the_fine_label_of_cifar100_is_taken(tmp_path: Path) -> None:
    record = image_files.cifar_record([3, 99], np.full((3, 32, 32), 5))
    (tmp_path / "test.bin").write_bytes(record)
    found = images.cifar100(tmp_path, "test")
    assert found.labels.tolist() == [99]
    assert found.pixels.unique().tolist() == [5]


def test_svhn_has_its_images_along_the_last_axis_and_0_as_class_10(tmp_path: Path) -> None:
    pixels = np.zeros((32, 32, 3, 2))
    pixels[4, 5, 2, 1] = 77
    image_files.write_mat(tmp_path / "test_32x32.mat", X=pixels, y=np.array([[10], [3]]))
    found = images.svhn(tmp_path, "test")
    assert found.labels.tolist() == [0, 3]
    assert found.pixels.shape == (2, 3, 32, 32)
    assert found.pixels.nonzero().tolist() == [[1, 2, 4, 5]]
    assert found.pixels[1, 2, 4, 5] == 77


def test_a_texture_is_the_middle_of_its_picture(tmp_path: Path) -> None:
    wide = np.zeros((64, 128, 3), np.uint8)
    wide[:, 32:96] = [250, 10, 130]
    (tmp_path / "images" / "woven").mkdir(parents=True)
    Image.fromarray(wide).save(tmp_path / "images" / "woven" / "woven_0001.jpg", quality=100)
    found = images.dtd(tmp_path)
    middle = found.pixels[0, :, 4:-4, 4:-4].float()
    assert found.pixels.shape == (1, 3, 32, 32)
    expected = torch.tensor([250.0, 10, 130]).view(3, 1, 1).expand_as(middle)
    torch.testing.assert_close(middle, expected, atol=6, rtol=0)


def test_textures_are_labelled_by_their_folders(tmp_path: Path) -> None:
    found = images.dtd(image_files.write_dtd(tmp_path / "dtd", per_class=2))
    assert found.labels.tolist() == [0, 0, 1, 1, 2, 2]


class Bomb:
    """Goes off when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (pytest.fail, ("it was unpickled",))


def test_the_python_version_of_cifar_is_not_unpickled(tmp_path: Path) -> None:
    for name in ("test_batch", "test", "test_batch.bin"):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(FileNotFoundError, match=r"test\.bin does not exist; expected: the binary"):
        images.cifar100(tmp_path, "test")
    with pytest.raises(ValueError, match=r"accepted: a multiple of 3073"):
        images.cifar10(tmp_path, "test")


def test_a_file_cut_short_is_an_error_with_its_name(tmp_path: Path) -> None:
    record = image_files.cifar_record([0], np.zeros((3, 32, 32)))
    (tmp_path / "test_batch.bin").write_bytes(record * 2 + record[:-1])
    with pytest.raises(ValueError, match=r"test_batch\.bin has 9218 bytes; accepted: a multiple"):
        images.cifar10(tmp_path, "test")


def test_cifar100_in_the_folder_of_cifar10_is_an_error(tmp_path: Path) -> None:
    record = image_files.cifar_record([11], np.zeros((3, 32, 32)))
    (tmp_path / "test_batch.bin").write_bytes(record)
    with pytest.raises(ValueError, match="labels 11 to 11; accepted: 0 to 9"):
        images.cifar10(tmp_path, "test")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"X": np.zeros((32, 32, 3, 1))}, r"lacks \['y'\]"),
        ({"X": np.zeros((32, 32, 1, 1)), "y": np.ones((1, 1))}, r"accepted: \(32, 32, 3, N\)"),
        ({"X": np.zeros((32, 32, 3, 2)), "y": np.ones((1, 1))}, "2 images and 1 labels"),
        (
            {"X": np.zeros((32, 32, 3, 2)), "y": np.zeros((2, 1))},
            "labels 0 to 0; accepted: 1 to 10",
        ),
    ],
    ids=["no labels", "grey", "a label too few", "a class 0"],
)
def test_a_mat_file_that_is_not_svhn_is_an_error(
    tmp_path: Path, arrays: dict[str, np.ndarray], message: str
) -> None:
    image_files.write_mat(tmp_path / "test_32x32.mat", **arrays)
    with pytest.raises(ValueError, match=message):
        images.svhn(tmp_path, "test")


def test_what_is_no_jpeg_is_an_error_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "images" / "woven").mkdir(parents=True)
    (tmp_path / "images" / "woven" / "broken.jpg").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"broken\.jpg is no JPEG"):
        images.dtd(tmp_path)


def test_a_folder_without_textures_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="images does not exist"):
        images.dtd(tmp_path)
    (tmp_path / "images").mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds no CLASS/NAME\.jpg"):
        images.dtd(tmp_path)
