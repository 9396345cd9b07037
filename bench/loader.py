"""Whether input keeps up: images a second of a training stream, and how long a step waits for them.

    python bench/loader.py --data cifar10 --batch 64 --size 64 --workers 0 1 2 --step-ms 50
    python bench/loader.py --device cuda --step-ms 30      # random JPEGs in a temporary folder

A stream's batches are decoded, put on the device, augmented and normalised. They are drawn as fast
as they come, then by a consumer that multiplies matrices for as long as a search step takes (what
`iteration.py` measures). It waits from the end of a step to the start of the next, by the device's
own clock: for decoding that is late, and for copies and augmentation, which the device does itself.
The first row, of images that were decoded before, shows how long the latter takes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkout import commit
from machine import describe
from PIL import Image
from rich.table import Table
from table import print_table

from dmcp.data import ImageSet, open_data, train_stream
from dmcp.data.images import MemoryImages

WARM_UP = 3
"""Batches before the first that counts, beside those that workers have ready."""
AHEAD = 2
"""Batches that each worker has ready."""
SIDES = {"cpu": 256, "cuda": 2048}
"""Of the matrices that keep a device busy."""
RANDOM_IMAGES = 512  # at least a batch


def deliver(
    images: ImageSet,
    batch: int,
    batches: int,
    workers: int,
    device: torch.device,
    step: Callable[[], object] | None = None,
) -> dict[str, float]:
    """What a consumer sees of a stream.

    Args:
        images: where the batches come from.
        batch: images in a batch.
        batches: how many count.
        workers: processes that decode.
        device: where batches go.
        step: what the consumer does with each, None for nothing.

    Returns:
        Images a second, mean seconds of a step and of the wait for its batch, the longest wait, and
        the share of all time that was waited (``"starved"``).
    """
    before = WARM_UP + AHEAD * workers
    stream = train_stream(
        images, batch, seed=0, steps=before + batches, workers=workers, device=device
    )
    marks = [_mark(device)]
    for _ in stream:
        marks.append(_mark(device))
        if step is not None:
            step()
        marks.append(_mark(device))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = [_between(first, second) for first, second in pairwise(marks[2 * before :])]
    waits, steps = seconds[::2], seconds[1::2]
    return {
        "images_per_second": batch * batches / sum(seconds),
        "step": statistics.mean(steps),
        "wait": statistics.mean(waits),
        "longest_wait": max(waits),
        "starved": sum(waits) / sum(seconds),
    }


def busy(seconds: float, device: torch.device) -> Callable[[], None]:
    """A stand-in for a step: products of matrices for so long."""
    side = SIDES[device.type]
    left, right, result = (torch.rand(side, side, device=device) for _ in range(3))

    def multiply(times: int) -> None:
        for _ in range(times):
            torch.mm(left, right, out=result)

    def multiply_on() -> None:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            multiply(1)

    if device.type == "cpu":  # which workers share: as many products would take longer with more
        return multiply_on
    multiply(10)
    begin = _mark(device)
    multiply(100)
    end = _mark(device)
    torch.cuda.synchronize(device)
    times = max(1, round(100 * seconds / _between(begin, end)))
    return lambda: multiply(times)


def write_random_images(folder: Path, size: int, count: int) -> None:
    """JPEGs of two classes, smooth as photographs are, with twice the side that is asked for."""
    noise = np.random.default_rng(0)
    for index in range(count):
        path = folder / "train" / f"class{index % 2}" / f"{index:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = noise.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((2 * size, 2 * size)).save(path)


def render(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    caption = (
        "alone: drawn as fast as they come; the rest with a step in between. wait: from the end of "
        "a step to the start of the next, mean and longest; starved: its share of all time. What "
        "is above the row in memory is decoding that was late."
    )
    table = Table(title=title, caption=caption, caption_justify="left")
    columns = ("images/s alone", "images/s", "step ms", "wait ms", "longest ms", "starved")
    table.add_column("workers")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        fed = row["with_step"]
        table.add_row(
            "in memory" if row["workers"] is None else f"{row['workers']}",
            f"{row['alone']['images_per_second']:,.0f}",
            f"{fed['images_per_second']:,.0f}",
            *(f"{1e3 * fed[name]:.1f}" for name in ("step", "wait", "longest_wait")),
            f"{fed['starved']:.1%}",
        )
    return table


def _mark(device: torch.device) -> Any:
    """The time when the device gets here; the host, which runs ahead of a GPU, does not wait."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _between(first: Any, second: Any) -> float:
    """Seconds from one mark to another."""
    if isinstance(first, torch.cuda.Event):
        return first.elapsed_time(second) / 1e3
    return second - first


def _measure(images: ImageSet, given: argparse.Namespace) -> list[dict[str, Any]]:
    device = torch.device(given.device)
    step = busy(given.step_ms / 1e3, device)

    def row(source: ImageSet, workers: int | None) -> dict[str, Any]:
        alone, fed = (
            deliver(source, given.batch, given.batches, workers or 0, device, consumer)
            for consumer in (None, step)
        )
        return {"workers": workers, "alone": alone, "with_step": fed}

    decoded = MemoryImages(*images.batch(range(given.batch)), images.format)
    return [row(decoded, None), *(row(images, workers) for workers in given.workers)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="an image folder or digits; random JPEGs by default")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=64, help="of an image's sides")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batches", type=int, default=50, help="that are measured")
    parser.add_argument("--step-ms", type=float, default=50.0, help="of the consumer")
    parser.add_argument("--threads", type=int, help="of PyTorch; its own choice by default")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--json", type=Path, help="where everything goes")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as folder:
        if given.data is None:
            write_random_images(Path(folder), given.size, max(RANDOM_IMAGES, given.batch))
        images = open_data(given.data or folder, given.size, holdout=0).train
        rows = _measure(images, given)
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": describe(torch.device(given.device)),
        "data": given.data or "random JPEGs",
        **{name: getattr(given, name) for name in ("batch", "size", "batches", "step_ms")},
        "rows": rows,
    }
    machine = {key: value for key, value in result["machine"].items() if key != "backends"}
    print(", ".join(f"{key} {value}" for key, value in machine.items() if value is not None))
    title = "{data}, batch {batch}, {size}x{size}, {batches} batches".format(**result)
    print_table(render(rows, title))
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
