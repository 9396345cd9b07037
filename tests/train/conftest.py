from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def small_net() -> Callable[..., nn.Sequential]:
    """A factory of three conv-BN layers and a classifier of four classes."""

    def make(seed: int = 0, dropout: float = 0.0) -> nn.Sequential:
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for inputs, outputs in ((3, 8), (8, 6), (6, 10)):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
        pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        return nn.Sequential(*layers, *pool, nn.Dropout(dropout), nn.Linear(10, 4))

    return make


@pytest.fixture
def batch_of() -> Callable[..., tuple[Tensor, Tensor]]:
    """The batch of a step: a pure function of it, which moves no global generator."""

    def draw(step: int, images: int = 8) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1000 + step)
        pixels = torch.randn(images, 3, 8, 8, generator=generator)
        return pixels, torch.randint(0, 4, (images,), generator=generator)

    return draw
