"""What every data set is made of: labelled uint8 images of one size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

MIN_SIZE, MAX_SIZE = 8, 1024  # sides of the square images a network gets, in pixels


@dataclass(frozen=True)
class ImageFormat:
    """How a set's images become a network's input.

    Attributes:
        size: the side S of the square images a network gets, in pixels.
        mean: mean of each channel over pixel values in [0, 1]; as many as there are channels.
        std: standard deviation of each channel, on the same scale.
        photos: a mirrored or slightly recoloured image keeps its class (true of photographs, false
            of digits).
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    photos: bool

    @property
    def channels(self) -> int:
        """Number of image channels."""
        return len(self.mean)


class ImageSet(Dataset[tuple[Tensor, int]]):
    """Labelled images, decoded and resized but not augmented.

    Item ``i`` is ``(image, label)``, the image a uint8 tensor [C, D, D]. The side D may exceed
    ``format.size``, so that a random crop has pixels to choose from; streams crop to size.

    Args:
        labels: class indices, int64 [N].
        format: how the images become a network's input.
    """

    def __init__(self, labels: Tensor, format: ImageFormat) -> None:
        self.labels = labels
        self.format = format

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        raise NotImplementedError

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Images uint8 [N, C, D, D] and labels int64 [N] at ``indices``."""
        images = torch.stack([self[index][0] for index in indices])
        return images, self.labels[torch.as_tensor(indices)]


class MemoryImages(ImageSet):
    """An image set held in memory.

    Args:
        images: uint8 [N, C, S, S].
        labels: class indices, int64 [N].
        format: how the images become a network's input.
    """

    def __init__(self, images: Tensor, labels: Tensor, format: ImageFormat) -> None:
        super().__init__(labels, format)
        self.images = images

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        positions = torch.as_tensor(indices)
        return self.images[positions], self.labels[positions]


@dataclass(frozen=True)
class DataSource:
    """One data set in three disjoint parts.

    Attributes:
        name: what it was opened as.
        train: images to train on, without the held-out ones.
        holdout: training images kept aside for choosing structures; empty if none were asked for.
        test: images for the final evaluation only; empty if the data set has none.
        classes: class names; a label is a position in it.
    """

    name: str
    train: ImageSet
    holdout: ImageSet
    test: ImageSet
    classes: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def channels(self) -> int:
        """Channels of an image."""
        return self.train.format.channels

    @property
    def image_size(self) -> int:
        """Side of the square images a network gets, in pixels."""
        return self.train.format.size
