"""How long networks take on this machine, side by side."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median

import torch
from torch import Tensor, nn

ROUNDS = 15
"""Times that every network is measured; the median counts."""


@torch.inference_mode()
def latencies(networks: Sequence[nn.Module], images: Tensor) -> list[float]:
    """Milliseconds of a forward pass in evaluation mode: the median of `ROUNDS` for each network.

    The networks take turns, so that whatever else the machine does meets them all alike.

    Args:
        networks: on the device of the images.
        images: the batch, [N, C, H, W].
    """
    times: list[list[float]] = [[] for _ in networks]
    for each in networks:
        each.eval()
    for _ in range(1 + ROUNDS):  # the first round warms up
        for network, seen in zip(networks, times, strict=True):
            _wait(images.device)
            begun = time.perf_counter()
            network(images)
            _wait(images.device)
            seen.append(1e3 * (time.perf_counter() - begun))
    return [median(seen[1:]) for seen in times]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
