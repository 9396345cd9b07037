"""Batched augmentation on the training device, and the normalisation that ends every batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dmcp.data.images import ImageFormat
from dmcp.errors import require

LARGEST_SHIFTED = 64  # pixels; larger photographs are cropped and resized instead
JITTER = (0.2, 0.2, 0.2, 0.1)  # brightness, contrast, saturation, hue: the paper's recipe


def normalisation(format: ImageFormat, device: torch.device | str) -> Callable[[Tensor], Tensor]:
    """What ends every batch: a centre crop to ``format.size``, then mean 0 and deviation 1.

    Returns:
        A function of float images in [0, 1] [N, C, D, D] on ``device`` that gives images
        [N, C, format.size, format.size].
    """
    # Made once: copying them to a GPU for every batch would wait for it every time.
    mean = torch.tensor(format.mean, device=device).view(-1, 1, 1)
    std = torch.tensor(format.std, device=device).view(-1, 1, 1)

    def normalise(images: Tensor) -> Tensor:
        margin = (images.shape[-1] - format.size) // 2
        inside = slice(margin, margin + format.size)
        return (images[..., inside, inside] - mean) / std

    return normalise


def augmentation(format: ImageFormat, crop_scale: float) -> Callable[[Tensor, int], Tensor]:
    """The random changes that suit a format.

    Photographs above 64 pixels: a crop of random area and shape resized to ``format.size``, a
    mirror image half of the time, jitter of the colours. Smaller ones: a shift by up to an eighth
    of the side (black comes in) and the mirror image. Digits: the shift alone.

    Args:
        format: the images' format.
        crop_scale: smallest share of the area a random resized crop keeps, in (0, 1].

    Returns:
        A function of (float images in [0, 1] [N, C, D, D], seed) that gives images
        [N, C, format.size, format.size]. The same arguments give the same bits; no global random
        state changes.

    Raises:
        MissingDependencyError: kornia is not installed.
    """
    kornia = require("kornia.augmentation", "cli", "augmentation")
    side = (format.size, format.size)
    layers: list[nn.Module]
    if format.photos and format.size > LARGEST_SHIFTED:
        layers = [
            # "resample" is one kernel for the batch; "slice" resizes image by image.
            kornia.RandomResizedCrop(side, scale=(crop_scale, 1.0), cropping_mode="resample"),
            kornia.RandomHorizontalFlip(),
            kornia.ColorJitter(*JITTER),
        ]
    else:
        layers = [kornia.RandomCrop(side, padding=format.size // 8)]
        if format.photos:
            layers.append(kornia.RandomHorizontalFlip())
    pipeline = nn.Sequential(*layers)

    def augment(images: Tensor, seed: int) -> Tensor:
        # kornia draws its parameters on the CPU whatever the images' device; seeding that generator
        # alone leaves CUDA's untouched, which torch.manual_seed would not.
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.default_generator.manual_seed(seed)
            augmented: Tensor = pipeline(images)
        return augmented

    return augment
