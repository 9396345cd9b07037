from __future__ import annotations

import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dmcp.data import open_data
from dmcp.data.folder import FolderImages, decode

CIFAR = Path(__file__).parents[3] / "shared/data/cifar10.tar.xz"


def names(images: FolderImages) -> list[str]:
    return ["/".join(path.decode().split("/")[-3:]) for path in images.files]


def test_parts_and_labels(photos: Path) -> None:
    source = open_data(str(photos), holdout=0.25)
    assert source.classes == ("cat", "dog")
    assert (source.num_classes, source.channels, source.image_size) == (2, 3, 12)
    for part, count in ((source.train, 18), (source.holdout, 6), (source.test, 6)):
        assert len(part) == count
        for name, label in zip(names(part), part.labels, strict=True):
            assert name.split("/")[1] == source.classes[label]
    assert not set(names(source.train)) & set(names(source.holdout))
    assert all(name.startswith("test/") for name in names(source.test))


def test_decodes_to_the_pixels_of_the_file(photos: Path) -> None:
    source = open_data(str(photos), holdout=0)
    path = next(name for name in names(source.train) if name.endswith(".png"))
    image, _ = source.train[names(source.train).index(path)]
    expected = np.array(Image.open(photos / path))[:, 2:14]  # the centre of 12 x 16
    assert image.dtype == torch.uint8
    assert np.array_equal(image.permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (8, 8), (300, 200)])
def test_resizes_the_short_side_and_crops_the_centre(
    tmp_path: Path, shape: tuple[int, int]
) -> None:
    # Red rises along the width and green along the height, 2 levels a pixel at 112 pixels.
    height, width = shape
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width)[None, :]
    pixels[..., 1] = np.linspace(0, 255, height)[:, None]
    Image.fromarray(pixels).save(tmp_path / "ramp.png")
    image = decode(str(tmp_path / "ramp.png"), short_side=32, crop=24)
    assert image.shape == (3, 24, 24)
    for channel, side in ((0, width), (1, height)):
        ends = image[channel].float()
        low, high = (ends[:, 0], ends[:, -1]) if channel == 0 else (ends[0], ends[-1])
        share = 24 / 32 * min(shape) / side  # of the ramp inside the crop
        assert float(low.mean()) == pytest.approx(255 * (1 - share) / 2, abs=10)
        assert float(high.mean()) == pytest.approx(255 * (1 + share) / 2, abs=10)


def test_grey_and_palette_images_become_rgb(tmp_path: Path) -> None:
    for mode in ("L", "P", "RGBA", "1", "CMYK"):
        path = tmp_path / ("image.jpg" if mode == "CMYK" else "image.png")
        Image.new("RGB", (8, 8), (255, 255, 255)).convert(mode).save(path)
        assert decode(str(path), 8, 8).eq(255).all(), mode


def test_large_images_leave_a_border_for_training(photos: Path) -> None:
    source = open_data(str(photos), image_size=70)
    assert source.image_size == 70
    assert source.train[0][0].shape == (3, 80, 80)
    assert source.holdout[0][0].shape == source.test[0][0].shape == (3, 70, 70)


def test_default_size_of_large_images(photos: Path) -> None:
    first = sorted((photos / "train/cat").iterdir())[0]
    Image.new("RGB", (90, 65)).save(first)
    assert open_data(str(photos)).image_size == 224


def test_val_stands_in_for_test_and_either_may_be_missing(photos: Path) -> None:
    (photos / "test").rename(photos / "val")
    assert len(open_data(str(photos)).test) == 6
    (photos / "val").rename(photos / "elsewhere")
    assert len(open_data(str(photos)).test) == 0


def test_other_files_are_passed_over(photos: Path) -> None:
    (photos / "train/cat/notes.txt").write_text("no image")
    (photos / "train/cat/._00.jpg").write_bytes(b"no image")
    (photos / "train/.cache").mkdir()
    assert len(open_data(str(photos), holdout=0).train) == 24


@pytest.mark.skipif(not CIFAR.exists(), reason="the CIFAR-10 archive is not there")
def test_cifar(tmp_path: Path) -> None:
    deadline = time.monotonic() + 10
    wanted = ("train/airplane/", "train/automobile/")
    counts = dict.fromkeys(wanted, 0)
    with tarfile.open(CIFAR) as archive:
        for member in archive:
            folder = member.name[: member.name.rfind("/") + 1]
            if member.isfile() and counts.get(folder, 30) < 30:
                archive.extract(member, tmp_path, filter="data")
                counts[folder] += 1
            if all(count == 30 for count in counts.values()):
                break
            if time.monotonic() > deadline:
                pytest.skip("the archive reads too slowly here")
    source = open_data(str(tmp_path))
    assert source.classes == ("airplane", "automobile")
    assert source.image_size == 32
    assert (len(source.train), len(source.holdout)) == (54, 6)
    image, _ = source.train[0]
    expected = np.array(Image.open(source.train.files[0].decode()).convert("RGB"))
    assert np.array_equal(image.permute(1, 2, 0).numpy(), expected)
