"""How long calls take, side by side on a machine that does other things too."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call.

    Attributes:
        median: of all rounds.
        low, high: between these the true median lies, with at least 95 % confidence; no
            distribution is assumed (order statistics of a binomial). With fewer than six rounds
            they are the smallest and the largest, with less confidence.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, milliseconds: Sequence[float]) -> Timing:
        """The timing of at least one round."""
        ordered = sorted(milliseconds)
        rank = _outer_rank(len(ordered))
        return cls(median(ordered), ordered[rank], ordered[-1 - rank])


def side_by_side(
    calls: Sequence[Callable[[], object]],
    *,
    rounds: int = 15,
    warmup: int = 1,
    device: torch.device | str = "cpu",
) -> list[Timing]:
    """How long each of several calls takes.

    They take turns, so that whatever else the machine does meets them all alike.

    Args:
        calls: what is measured; each ends when its work on the device is done.
        rounds: times that every call is measured.
        warmup: rounds before, which do not count.
        device: where they compute.
    """
    device = torch.device(device)
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(warmup + rounds):
        for call, seen in zip(calls, times, strict=True):
            _wait(device)
            begun = time.perf_counter()
            call()
            _wait(device)
            seen.append(1e3 * (time.perf_counter() - begun))
    return [Timing.of(seen[warmup:]) for seen in times]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _outer_rank(count: int) -> int:
    """The largest k for which at most 2.5 % of all samples have their median below the k-th
    smallest of ``count`` values, counted from 0."""
    ways, below = 1, 0  # exactly: 0.5**count is no float for large counts
    for rank in range(count // 2):
        below += ways
        if 40 * below > 2**count:
            return max(rank - 1, 0)
        ways = ways * (count - rank) // (rank + 1)
    return 0
