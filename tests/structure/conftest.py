from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor, nn

import dmcp
from dmcp.graph import ChannelGraph
from dmcp.models import build


class Block(nn.Module):
    """A residual stream, a grouped convolution and a concatenation: units stem (8 channels, in
    steps of 2), side (6) and head (3, the outputs)."""

    def __init__(self, classes: int = 3, kernel: int = 3, reverse: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, kernel, padding=kernel // 2, groups=2)
        self.side = nn.Conv2d(8, 6, 1)
        self.reverse = reverse
        self.head = nn.Linear(14, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = x + self.grouped(x)
        parts = [x, self.side(x).relu()]
        x = torch.cat(parts[::-1] if self.reverse else parts, 1)
        out: Tensor = self.head(x.mean((2, 3)))
        return out


@pytest.fixture(scope="session")
def block() -> type[Block]:
    return Block


@pytest.fixture(scope="session")
def graph() -> ChannelGraph:
    """Of a `Block`."""
    return dmcp.trace(Block(), torch.zeros(2, 3, 8, 8))


@pytest.fixture(scope="session")
def traced() -> Callable[..., ChannelGraph]:
    """Traces a network of `dmcp.models`, without weights."""

    @cache
    def trace(name: str, width: float = 1.0) -> ChannelGraph:
        with torch.device("meta"):
            model, images = build(name, width=width), torch.zeros(1, 3, 224, 224)
        return dmcp.trace(model, images)

    return trace
