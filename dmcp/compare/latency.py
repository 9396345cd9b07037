"""How long networks take on this machine, side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from dmcp.latency.timing import side_by_side


@torch.inference_mode()
def latencies(networks: Sequence[nn.Module], images: Tensor) -> list[float]:
    """Milliseconds of a forward pass in evaluation mode: the median for each network, see
    `dmcp.latency.side_by_side`.

    Args:
        networks: on the device of the images.
        images: the batch, [N, C, H, W].
    """
    calls: list[Callable[[], object]] = [partial(each.eval(), images) for each in networks]
    return [timing.median for timing in side_by_side(calls, device=images.device)]
