"""How the benchmarks measure: rotation of tensors, warm-up, rounds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

import torch
from machine import cache_bytes

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

SECONDS = {"cpu": 0.1, "cuda": 0.04}
"""Of rounds for one benchmark in one sweep. A GPU is not shared with other work."""
ROUNDS = (5, 100)
BURST = 5e-3
"""Seconds of calls in one round on a GPU, so that waiting for their end does not count."""
BURST_CALLS = 64

T = TypeVar("T")


def rotation(set_bytes: int, device: torch.device, most: int = 64) -> int:
    """How many sets of tensors to take in turn so that a call finds none of its own in the cache.

    Where they are so small that it would take more than `most`, they may still be in the cache.
    """
    return min(most, math.ceil(2 * cache_bytes(device) / set_bytes))


def measure(
    benchmark: BenchmarkFixture,
    call: Callable[[T], object],
    arguments: Iterator[T],
    device: torch.device,
) -> None:
    """Time `call` on one argument after the other; drawing an argument is not timed.

    On a GPU a round is a burst of calls and the wait for their end; how many goes into
    ``extra_info["calls"]``.
    """

    def run(drawn: list[T]) -> None:
        for argument in drawn:
            call(argument)
        synchronise(device)

    def draw(count: int) -> list[T]:
        drawn = list(islice(arguments, count))
        synchronise(device)
        return drawn

    run(draw(1))
    drawn = draw(1)
    begin = time.perf_counter()
    run(drawn)
    seconds = time.perf_counter() - begin
    calls = 1
    if device.type == "cuda":
        calls = min(max(1, round(BURST / seconds)), BURST_CALLS)
    fewest, most = ROUNDS
    rounds = min(max(fewest, round(SECONDS[device.type] / (calls * seconds))), most)
    benchmark.extra_info["calls"] = calls
    benchmark.pedantic(run, setup=lambda: ((draw(calls),), {}), rounds=rounds, warmup_rounds=1)


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
