"""Batches on the device, in an order that depends on nothing but the seed and the step."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dmcp.data.augment import augmentation, normalisation
from dmcp.data.images import ImageSet, MemoryImages
from dmcp.errors import ConfigError, DataError


class Batch(NamedTuple):
    """Normalised float32 images [N, C, S, S] and int64 labels [N], on the training device."""

    images: Tensor
    labels: Tensor


def train_stream(
    images: ImageSet,
    batch_size: int,
    seed: int,
    steps: int,
    start_step: int = 0,
    world_rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    device: torch.device | str = "cpu",
    augment: bool = True,
    crop_scale: float = 0.25,
) -> Generator[Batch, None, None]:
    """Training batches of steps ``start_step`` to ``steps - 1``.

    A pure function of the arguments: batch t of an epoch is slice t of that epoch's permutation,
    which the seed and the epoch decide; its augmentation is decided by the seed, the step and the
    rank. So a stream that starts at step k gives the bits of one that came there from 0, whatever
    the number of workers. The last, incomplete batch of an epoch is dropped. No global random state
    is used.

    Args:
        images: the set to train on.
        batch_size: images of one step over all ranks.
        seed: at least 0.
        steps: steps of the whole training, not of what is left of it.
        start_step: steps already done.
        world_rank: this process; it gets its contiguous, equal slice of every batch.
        world_size: number of processes; divides ``batch_size``.
        workers: processes that decode images while steps run; with 0 each step waits for its
            images. A set held in memory is read without them.
        device: where batches are put and augmented.
        augment: change images at random, as suits the set (see `dmcp.data.augment`).
        crop_scale: smallest share of the area that a random resized crop keeps, in (0, 1].

    Returns:
        A generator; its ``close()`` ends the workers.

    Raises:
        ConfigError: an argument is out of range.
        DataError: the set is smaller than one batch; from the generator, an image cannot be read.
        MissingDependencyError: augmentation is asked for and kornia is not installed.
    """
    _check_at_least(1, batch_size=batch_size, world_size=world_size)
    _check_at_least(0, seed=seed, start_step=start_step, workers=workers, world_rank=world_rank)
    if batch_size % world_size:
        raise ConfigError(
            f"batch_size must be a multiple of world_size {world_size}, got {batch_size}"
        )
    if world_rank >= world_size:
        raise ConfigError(f"world_rank must be below world_size {world_size}, got {world_rank}")
    if not 0 < crop_scale <= 1:
        raise ConfigError(f"crop_scale must be above 0 and at most 1, got {crop_scale}")
    if len(images) < batch_size:
        raise DataError(f"the set has {len(images)} images, fewer than one batch of {batch_size}")

    change = augmentation(images.format, crop_scale) if augment else None
    normalise = normalisation(images.format, device)
    share = batch_size // world_size
    plan = (
        batch[world_rank * share : (world_rank + 1) * share].tolist()
        for batch in _global_batches(len(images), batch_size, seed, start_step, steps)
    )

    def stream() -> Generator[Batch, None, None]:
        for step, (raw, labels) in enumerate(_load(images, plan, workers, device), start_step):
            pixels = raw.float().div_(255)
            if change is not None:
                pixels = change(pixels, _derive_seed(_AUGMENTATION, seed, step, world_rank))
            yield Batch(normalise(pixels), labels)

    return stream()


def eval_batches(
    images: ImageSet, batch_size: int, workers: int = 0, device: torch.device | str = "cpu"
) -> Generator[Batch, None, None]:
    """The whole set once, in order and unchanged; the last batch may be smaller.

    Raises:
        ConfigError: an argument is out of range.
        DataError: the set is empty; from the generator, an image cannot be read.
    """
    _check_at_least(1, batch_size=batch_size)
    _check_at_least(0, workers=workers)
    if len(images) == 0:
        raise DataError("the set to evaluate on has no images")
    normalise = normalisation(images.format, device)
    plan = (
        list(range(first, min(first + batch_size, len(images))))
        for first in range(0, len(images), batch_size)
    )

    def stream() -> Generator[Batch, None, None]:
        for raw, labels in _load(images, plan, workers, device):
            yield Batch(normalise(raw.float().div_(255)), labels)

    return stream()


_PERMUTATION, _AUGMENTATION = 0, 1  # what a derived seed is for


def _derive_seed(purpose: int, *parts: int) -> int:
    """A 64-bit seed from several numbers; unlike a sum, neighbours' seeds are unrelated."""
    return int(np.random.SeedSequence((purpose, *parts)).generate_state(1, np.uint64)[0])


def _global_batches(
    length: int, batch_size: int, seed: int, start_step: int, steps: int
) -> Iterator[Tensor]:
    per_epoch = length // batch_size
    order_epoch, order = -1, torch.empty(0, device="cpu")
    for step in range(start_step, steps):
        epoch, position = divmod(step, per_epoch)
        if epoch != order_epoch:
            generator = torch.Generator().manual_seed(_derive_seed(_PERMUTATION, seed, epoch))
            order_epoch, order = epoch, torch.randperm(length, generator=generator, device="cpu")
        yield order[position * batch_size : (position + 1) * batch_size]


class _Fetch(Dataset[tuple[Tensor, Tensor] | DataError]):
    """Whole batches by their indices; an error is a result.

    A worker's exception would reach the main process with the worker's traceback as its message.
    """

    def __init__(self, images: ImageSet) -> None:
        self.images = images

    def __getitem__(self, indices: list[int]) -> tuple[Tensor, Tensor] | DataError:
        try:
            return self.images.batch(indices)
        except DataError as error:
            return DataError(str(error))


def _load(
    images: ImageSet, plan: Iterator[list[int]], workers: int, device: torch.device | str
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """Raw batches on the device: uint8 images [N, C, D, D] and labels [N].

    Workers have the next batches ready while a step runs, in pinned memory for a GPU. No copy waits
    for the GPU: it queues up behind the step, and so does the augmentation.
    """
    loader: DataLoader[tuple[Tensor, Tensor] | DataError] = DataLoader(
        _Fetch(images),
        batch_size=None,  # the plan's entries are whole batches
        sampler=plan,
        # A worker would hand a batch over in many times what gathering it from memory takes.
        num_workers=0 if isinstance(images, MemoryImages) else workers,
        pin_memory=torch.device(device).type == "cuda",
        generator=torch.Generator(),  # else it takes a number from the global one
    )
    for loaded in loader:
        if isinstance(loaded, DataError):
            raise loaded
        pixels, labels = loaded
        yield pixels.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def _check_at_least(least: int, **values: int) -> None:
    for name, value in values.items():
        if value < least:
            raise ConfigError(f"{name} must be at least {least}, got {value}")
