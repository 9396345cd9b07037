from __future__ import annotations

import hashlib
import multiprocessing
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch

from dmcp.data import Batch, ImageFormat, eval_batches, open_data, train_stream
from dmcp.data.images import MemoryImages
from dmcp.data.stream import _global_batches
from dmcp.errors import ConfigError, DataError


def numbered(count: int) -> MemoryImages:
    """Images that carry their own number as label and as every pixel."""
    labels = torch.arange(count)
    pixels = labels.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 8, 8).contiguous()
    return MemoryImages(pixels, labels, ImageFormat(8, (0.0,), (1 / 255,), photos=False))


def same(left: list[Batch], right: list[Batch]) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
        for a, b in zip(left, right, strict=True)
    )


def test_an_epoch_shows_every_image_once() -> None:
    batches = list(train_stream(numbered(40), 10, seed=0, steps=8, augment=False))
    epochs = [torch.cat([batch.labels for batch in part]) for part in (batches[:4], batches[4:])]
    for labels in epochs:
        assert torch.equal(labels.sort().values, torch.arange(40))
    assert not torch.equal(*epochs)


def test_the_default_device_of_new_tensors_does_not_matter() -> None:
    batches = torch.stack([*_global_batches(40, 8, 0, 0, 6)])
    with torch.device("meta"):
        assert torch.equal(torch.stack([*_global_batches(40, 8, 0, 0, 6)]), batches)


def test_images_belong_to_their_labels_and_are_normalised() -> None:
    for images, labels in train_stream(numbered(40), 8, seed=0, steps=5, augment=False):
        assert images.dtype == torch.float32
        expected = labels.view(-1, 1, 1, 1).expand_as(images).float()
        torch.testing.assert_close(images, expected, atol=1e-4, rtol=0)


def test_the_incomplete_batch_is_dropped() -> None:
    batches = list(train_stream(numbered(43), 10, seed=0, steps=5, augment=False))
    assert all(len(batch.labels) == 10 for batch in batches)
    assert len(torch.cat([batch.labels for batch in batches[:4]]).unique()) == 40


@pytest.mark.parametrize("start", [1, 22, 25, 30])
def test_digits_resume_bit_for_bit(start: int) -> None:
    images = open_data("digits").train  # 20 steps an epoch
    full = list(train_stream(images, 64, seed=5, steps=30))
    assert same(list(train_stream(images, 64, seed=5, steps=30, start_step=start)), full[start:])


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_files_resume_bit_for_bit_with_any_workers(photos: Path, workers: int) -> None:
    images = open_data(str(photos), holdout=0).train  # 3 steps an epoch
    full = list(train_stream(images, 8, seed=5, steps=8))
    resumed = train_stream(images, 8, seed=5, steps=8, start_step=4, workers=workers)
    assert same(list(resumed), full[4:])


def test_another_process_gets_the_same_bits() -> None:
    program = (
        "import hashlib\n"
        "from dmcp.data import open_data, train_stream\n"
        "for images, labels in train_stream(open_data('digits').train, 64, seed=5, steps=3):\n"
        "    print(hashlib.sha256(images.numpy().tobytes()).hexdigest(), labels.tolist())"
    )
    command = [sys.executable, "-c", program]
    there = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    stream = train_stream(open_data("digits").train, 64, seed=5, steps=3)
    here = [
        f"{hashlib.sha256(images.numpy().tobytes()).hexdigest()} {labels.tolist()}"
        for images, labels in stream
    ]
    assert there.splitlines() == here


def test_seed_and_step_change_the_augmentation() -> None:
    images = open_data("digits").train
    one_batch = MemoryImages(images.images[:1], images.labels[:1], images.format)
    shown = [
        batch.images.numpy().tobytes()
        for seed in (0, 1)
        for batch in train_stream(one_batch, 1, seed=seed, steps=20)
    ]
    assert len(set(shown)) > 5  # of the 9 shifts
    assert shown[:20] != shown[20:]


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_make_up_the_global_batch(world_size: int) -> None:
    def stream(**ranks: int) -> list[Batch]:
        return list(train_stream(numbered(40), 8, seed=1, steps=7, augment=False, **ranks))

    ranks = [stream(world_rank=rank, world_size=world_size) for rank in range(world_size)]
    for whole, *shares in zip(stream(), *ranks, strict=True):
        assert all(len(share.labels) == 8 // world_size for share in shares)
        assert torch.equal(torch.cat([share.labels for share in shares]), whole.labels)
        assert torch.equal(torch.cat([share.images for share in shares]), whole.images)


def test_ranks_augment_differently() -> None:
    image = open_data("digits").train.images[:1].expand(32, -1, -1, -1).contiguous()
    same_images = MemoryImages(image, torch.zeros(32).long(), open_data("digits").train.format)
    first, second = (
        next(train_stream(same_images, 32, 0, 1, world_rank=rank, world_size=2)).images
        for rank in (0, 1)
    )
    assert not torch.equal(first, second)


@pytest.mark.parametrize("workers", [0, 2])
def test_no_global_random_state_is_used(photos: Path, workers: int) -> None:
    torch.manual_seed(11)
    state = torch.get_rng_state()
    source = open_data(str(photos))
    list(train_stream(source.train, 4, seed=0, steps=6, workers=workers))
    list(eval_batches(source.test, 4, workers=workers))
    list(train_stream(open_data("digits").train, 64, seed=0, steps=2))
    assert torch.equal(torch.get_rng_state(), state)


def test_close_ends_the_workers(photos: Path) -> None:
    before = set(multiprocessing.active_children())
    stream = train_stream(open_data(str(photos)).train, 4, seed=0, steps=1000, workers=2)
    next(stream)
    started = set(multiprocessing.active_children()) - before
    assert len(started) == 2
    stream.close()
    assert not any(worker.is_alive() for worker in started)


def test_large_photos_come_out_at_size(photos: Path) -> None:
    source = open_data(str(photos), image_size=70)
    for augment in (True, False):
        images, _ = next(train_stream(source.train, 4, seed=0, steps=1, augment=augment))
        assert images.shape == (4, 3, 70, 70)
    for part in (source.train, source.test):
        images, _ = next(eval_batches(part, 4))
        assert images.shape == (4, 3, 70, 70)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_goes_through_the_set_in_order(photos: Path, workers: int) -> None:
    test = open_data(str(photos)).test
    batches = list(eval_batches(test, 4, workers=workers))
    assert [len(batch.labels) for batch in batches] == [4, 2]
    assert torch.equal(torch.cat([batch.labels for batch in batches]), test.labels)
    again = list(eval_batches(test, 6))
    assert torch.equal(torch.cat([batch.images for batch in batches]), again[0].images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"world_size": 3}, "batch_size must be a multiple of world_size 3, got 8"),
        ({"world_size": 2, "world_rank": 2}, "world_rank must be below world_size 2, got 2"),
        ({"workers": -1}, "workers must be at least 0, got -1"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"crop_scale": 0.0}, "crop_scale must be above 0 and at most 1, got 0.0"),
    ],
)
def test_bad_options_are_refused_at_once(options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train_stream(**({"images": numbered(8), "batch_size": 8, "seed": 0, "steps": 1} | options))


def test_sets_that_are_too_small_are_refused_at_once() -> None:
    with pytest.raises(DataError, match="7 images, fewer than one batch of 8"):
        train_stream(numbered(7), 8, seed=0, steps=1)
    with pytest.raises(DataError, match="no images"):
        eval_batches(numbered(0), 8)


def test_kornia_is_imported_only_for_augmentation() -> None:
    program = (
        "import sys\n"
        "from dmcp.data import open_data, train_stream\n"
        "next(train_stream(open_data('digits').train, 64, seed=0, steps=1, augment=False))\n"
        "assert 'kornia' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("workers", [0, 2])
def test_cuda_stream_equals_the_cpu_one(photos: Path, workers: int) -> None:
    images = open_data(str(photos)).train
    on_gpu = train_stream(images, 4, seed=0, steps=6, workers=workers, device="cuda")
    for there, here in zip(on_gpu, train_stream(images, 4, seed=0, steps=6), strict=True):
        assert there.images.is_cuda
        torch.testing.assert_close(there.images.cpu(), here.images)
        assert torch.equal(there.labels.cpu(), here.labels)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("size", [16, 70])  # shifted, and cropped with jitter
def test_a_batch_does_not_wait_for_the_gpu(photos: Path, size: int) -> None:
    images = open_data(str(photos), image_size=size).train
    stream = train_stream(images, 4, seed=0, steps=6, workers=1, device="cuda")
    next(stream)  # what is set up once may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert len(list(stream)) == 5
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_streams_can_be_abandoned() -> None:
    stream = train_stream(numbered(40), 8, seed=0, steps=100, augment=False)
    assert len(list(islice(stream, 3))) == 3
    stream.close()
    assert list(stream) == []
