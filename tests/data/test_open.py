"""Every way in which data can be wrong is one DataError of one line that says what and where."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image

from dmcp.data import eval_batches, open_data
from dmcp.errors import DataError


def refused(name: Path | str, *parts: str, **options: float) -> None:
    with pytest.raises(DataError) as caught:
        open_data(str(name), **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_unknown_name() -> None:
    refused("digit", "'digit'", "'digits'")


def test_file_instead_of_a_folder(photos: Path) -> None:
    (photos / "data.tar").touch()
    refused(photos / "data.tar", "data.tar", "unpack")


@pytest.mark.parametrize("size", [0, 7, 1025, -8])
def test_image_size_out_of_range(size: int) -> None:
    refused("digits", "image_size", "8 to 1024", str(size), image_size=size)


@pytest.mark.parametrize("holdout", [-0.1, 1.0, float("nan")])
def test_holdout_out_of_range(holdout: float) -> None:
    refused("digits", "holdout", str(holdout), holdout=holdout)


def test_no_train_folder(tmp_path: Path) -> None:
    refused(tmp_path, "train/", str(tmp_path))


def test_no_classes(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    refused(tmp_path, "0 class folders")


def test_one_class(photos: Path) -> None:
    shutil.rmtree(photos / "train/dog")
    refused(photos, "1 class folder", "at least 2")


def test_class_without_images(photos: Path) -> None:
    shutil.rmtree(photos / "train/dog")
    (photos / "train/dog").mkdir()
    refused(photos, "no images", "train/dog", ".png")


def test_class_too_small_to_split(photos: Path) -> None:
    (photos / "train/bird").mkdir()
    Image.new("RGB", (12, 12)).save(photos / "train/bird/only.png")
    refused(photos, "'bird'", "got 1")
    assert open_data(str(photos), holdout=0).classes == ("bird", "cat", "dog")


def test_unknown_test_class(photos: Path) -> None:
    (photos / "test/bird").mkdir()
    refused(photos, "'bird'", "test")


def test_test_classes_without_images(photos: Path) -> None:
    shutil.rmtree(photos / "test")
    (photos / "test/cat").mkdir(parents=True)
    refused(photos, "no images", "test")


def test_first_image_corrupt(photos: Path) -> None:
    (photos / "train/cat/00.png").write_bytes(b"no image")
    refused(photos, "00.png", "cannot read")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", ["truncated", "garbage", "deleted", "16 bits"])
def test_corrupt_image_named_from_workers_too(photos: Path, workers: int, damage: str) -> None:
    source = open_data(str(photos), image_size=12)
    path = photos / "test/dog/00.png"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-200])
    elif damage == "garbage":
        path.write_bytes(b"no image")
    elif damage == "deleted":
        path.unlink()
    else:
        Image.new("I;16", (12, 12), 1000).save(path)
    with pytest.raises(DataError, match=r"dog/00\.png") as caught:
        list(eval_batches(source.test, 2, workers=workers))
    assert "\n" not in str(caught.value)
