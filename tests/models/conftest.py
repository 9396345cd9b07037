"""An independent counter for the models' tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

MacCounter = Callable[[nn.Module], int]


@pytest.fixture(scope="session")
def count_macs() -> MacCounter:
    """MACs of convolutions and linear layers for one 224² image, counted by PyTorch."""

    def count(model: nn.Module) -> int:
        on_meta = model.to("meta").eval()
        with FlopCounterMode(display=False) as counter:
            on_meta(torch.empty(1, 3, 224, 224, device="meta"))
        return counter.get_total_flops() // 2

    return count
