from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dmcp.data.augment import augmentation, normalisation
from dmcp.data.images import ImageFormat

PHOTOS = ImageFormat(16, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), photos=True)
DIGITS = ImageFormat(16, (0.3,), (0.4,), photos=False)


def random_images(format: ImageFormat, count: int = 64, size: int | None = None) -> Tensor:
    side = size or format.size
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, format.channels, side, side, generator=generator)


def shifts(image: Tensor, reach: int) -> list[Tensor]:
    """Every shift of one image [C, S, S] by up to ``reach`` pixels, black coming in."""
    size = image.shape[-1]
    padded = torch.nn.functional.pad(image, (reach,) * 4)
    span = range(2 * reach + 1)
    return [padded[:, top : top + size, left : left + size] for top in span for left in span]


def one_of(image: Tensor, candidates: list[Tensor]) -> bool:
    return any(torch.equal(image, candidate) for candidate in candidates)


def test_digits_are_only_shifted() -> None:
    images = random_images(DIGITS)
    augmented = augmentation(DIGITS, 0.25)(images, 0)
    found = {
        next(k for k, shifted in enumerate(shifts(before, 2)) if torch.equal(shifted, after))
        for before, after in zip(images, augmented, strict=True)
    }
    assert len(found) > 12  # of 25


def test_small_photos_are_shifted_and_mirrored() -> None:
    images = random_images(PHOTOS)
    augmented = augmentation(PHOTOS, 0.25)(images, 0)
    mirrored = 0
    for before, after in zip(images, augmented, strict=True):
        candidates = shifts(before, 2)
        if not one_of(after, candidates):
            assert one_of(after.flip(-1), candidates)
            mirrored += 1
    assert 16 < mirrored < 48


def test_large_photos_are_cropped_to_size_and_recoloured() -> None:
    format = ImageFormat(70, PHOTOS.mean, PHOTOS.std, photos=True)
    # Flat images: cropping, resizing and mirroring leave them alone, so what differs is the colour.
    flat = torch.tensor([0.6, 0.5, 0.4]).view(1, 3, 1, 1).expand(8, 3, 80, 80)
    augmented = augmentation(format, 0.25)(flat, 0)
    assert augmented.shape == (8, 3, 70, 70)
    assert augmented.std((-1, -2)).max() < 1e-3
    assert len({tuple(image[:, 35, 35].tolist()) for image in augmented}) == 8
    assert augmented.min() >= 0
    assert augmented.max() <= 1


def test_crop_scale_bounds_the_area() -> None:
    format = ImageFormat(70, PHOTOS.mean, PHOTOS.std, photos=True)
    ramp = torch.linspace(0, 1, 80).expand(32, 3, 80, 80)
    spans = {}
    for scale in (0.1, 1.0):
        augmented = augmentation(format, scale)(ramp, 0).mean((1, 2))
        spans[scale] = (augmented.amax(1) - augmented.amin(1)).min()
    assert spans[1.0] > 1.5 * spans[0.1]


@pytest.mark.parametrize("format", [PHOTOS, DIGITS, ImageFormat(72, (0.5,) * 3, (1.0,) * 3, True)])
def test_the_seed_decides_and_the_global_state_stays(format: ImageFormat) -> None:
    images = random_images(format, 8)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    augment = augmentation(format, 0.25)
    first = augment(images, 3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    assert torch.equal(augmentation(format, 0.25)(images, 3), first)
    assert not torch.equal(augment(images, 4), first)


@pytest.mark.parametrize("format", [PHOTOS, DIGITS, ImageFormat(72, (0.5,) * 3, (1.0,) * 3, True)])
def test_nothing_is_read_back_from_the_device(format: ImageFormat) -> None:
    images = random_images(format, 8).to("meta")  # which has no numbers to read
    assert augmentation(format, 0.25)(images, 3).shape == images.shape


def test_normalisation_crops_the_centre() -> None:
    images = random_images(PHOTOS, 4, size=20)
    mean = torch.tensor(PHOTOS.mean).view(3, 1, 1)
    std = torch.tensor(PHOTOS.std).view(3, 1, 1)
    expected = (images[..., 2:18, 2:18] - mean) / std
    assert torch.equal(normalisation(PHOTOS, "cpu")(images), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("format", [PHOTOS, DIGITS, ImageFormat(72, (0.5,) * 3, (1.0,) * 3, True)])
def test_cuda_equals_cpu_and_leaves_its_generator_alone(format: ImageFormat) -> None:
    images = random_images(format, 8)
    state = torch.cuda.get_rng_state()
    on_gpu = augmentation(format, 0.25)(images.cuda(), 3)
    assert on_gpu.is_cuda
    assert torch.equal(torch.cuda.get_rng_state(), state)
    expected = augmentation(format, 0.25)(images, 3)
    torch.testing.assert_close(on_gpu.cpu(), expected, atol=1e-3, rtol=0)
