"""Batches that are computed in parts, so that their activations take less memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from dmcp.errors import ConfigError


class Part(NamedTuple):
    """Some images of a batch.

    Attributes:
        images: [n, C, H, W].
        labels: int64 [n].
        share: of the batch, by which the mean loss of the part counts in that of the batch.
    """

    images: Tensor
    labels: Tensor
    share: float


def split_batch(images: Tensor, labels: Tensor, count: int) -> list[Part]:
    """A batch in ``count`` parts, as equal as they can be.

    Raises:
        ConfigError: a part would have fewer than two images, which is no batch to normalise by, or
            there are no images.
    """
    size = len(images)
    if not size:
        raise ConfigError("images: the batch is empty")
    if count > 1 and size < 2 * count:
        raise ConfigError(f"micro_batches is {count}: too many parts for a batch of {size} images")
    parts = zip(images.tensor_split(count), labels.tensor_split(count), strict=True)
    return [Part(own, known, len(own) / size) for own, known in parts]


def check_micro_batches(count: int) -> None:
    """Raises ConfigError unless it is a number of parts."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ConfigError(f"micro_batches must be an int of at least 1, got {count!r}")


def sum_of(losses: Sequence[Tensor]) -> Tensor:
    """The loss of a batch from the shares of its parts."""
    return sum(losses[1:], losses[0])
