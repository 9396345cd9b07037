"""The real 8x8 handwritten digits that scikit-learn carries: 1797 images, no download."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dmcp.data.images import DataSource, ImageFormat, MemoryImages
from dmcp.data.split import stratified_split
from dmcp.errors import require

TEST_FRACTION = 0.2
TEST_SEED = 0  # the test set never changes
# Of the 1438 training images at 8x8, held-out ones included: the input's scale depends on no seed.
MEAN, STD = 0.306, 0.376


def open_digits(image_size: int | None, holdout: float, seed: int) -> DataSource:
    """The digits as a `DataSource`; see `dmcp.data.open_data`."""
    bundled = require("sklearn.datasets", "cli", "the digits data set").load_digits()
    size = image_size or 8
    images = torch.from_numpy(bundled.images).float()[:, None] * (255 / 16)
    if size != 8:
        images = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    pixels = images.round().to(torch.uint8)
    labels = torch.from_numpy(bundled.target).long()
    classes = tuple(str(name) for name in bundled.target_names)
    format = ImageFormat(size, mean=(MEAN,), std=(STD,), photos=False)

    training, test = stratified_split(labels, TEST_FRACTION, TEST_SEED, classes)
    train, held_out = stratified_split(labels[training], holdout, seed, classes)

    def part(indices: Tensor) -> MemoryImages:
        return MemoryImages(pixels[indices], labels[indices], format)

    return DataSource(
        "digits", part(training[train]), part(training[held_out]), part(test), classes
    )
