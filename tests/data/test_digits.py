from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_digits

from dmcp.data import open_data
from dmcp.data.images import MemoryImages


def keys(images: MemoryImages) -> set[bytes]:
    return {image.numpy().tobytes() for image in images.images}


def test_the_bundled_images_without_loss() -> None:
    source = open_data("digits")
    bundled = load_digits()
    parts = [source.train, source.holdout, source.test]
    got = sorted(
        ((image.numpy() / 255 * 16).round().tobytes(), label)
        for part in parts
        for image, label in (part[index] for index in range(len(part)))
    )
    expected = sorted(
        (image[None].round().tobytes(), int(label))
        for image, label in zip(bundled.images, bundled.target, strict=True)
    )
    assert got == expected
    assert (source.num_classes, source.channels, source.image_size) == (10, 1, 8)
    assert source.classes == tuple("0123456789")


def test_parts_are_disjoint_and_stratified() -> None:
    source = open_data("digits", holdout=0.1)
    parts = [source.train, source.holdout, source.test]
    assert [len(part) for part in parts] == pytest.approx([1294, 144, 359], abs=2)
    assert sum(map(len, parts)) == 1797
    images = [keys(part) for part in parts]  # the 1797 images are all different
    assert sum(map(len, images)) == len(set.union(*images)) == 1797
    for part in parts:
        share = part.labels.bincount(minlength=10) / len(part)
        assert share.min() > 0.09
        assert share.max() < 0.11


def test_the_seed_moves_the_holdout_but_not_the_test_set() -> None:
    first, second = open_data("digits", seed=0), open_data("digits", seed=1)
    assert torch.equal(first.test.images, second.test.images)
    assert keys(first.holdout) != keys(second.holdout)
    assert keys(first.train) | keys(first.holdout) == keys(second.train) | keys(second.holdout)


def test_no_holdout() -> None:
    source = open_data("digits", holdout=0)
    assert len(source.holdout) == 0
    assert len(source.train) == 1438


def test_the_normalisation_fits_the_training_images() -> None:
    source = open_data("digits", holdout=0)
    pixels = source.train.images.double() / 255
    assert source.train.format.mean[0] == pytest.approx(float(pixels.mean()), abs=1e-3)
    assert source.train.format.std[0] == pytest.approx(float(pixels.std()), abs=1e-3)


@pytest.mark.parametrize("size", [12, 32])
def test_upscaling_keeps_image_and_label(size: int) -> None:
    small, large = open_data("digits"), open_data("digits", image_size=size)
    assert large.image_size == size
    assert large.train.images.shape == (len(small.train), 1, size, size)
    assert large.train.images.dtype == torch.uint8
    assert torch.equal(large.train.labels, small.train.labels)
    back = torch.nn.functional.interpolate(
        large.train.images.float(), size=8, mode="bilinear", antialias=True
    )
    both = torch.stack([back.flatten(), small.train.images.float().flatten()])
    assert torch.corrcoef(both)[0, 1] > 0.95
