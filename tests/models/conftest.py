"""An independent counter for the models' tests, and the packages that hold other models."""

from __future__ import annotations

import importlib
import importlib.util
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


@pytest.fixture(scope="session")
def zoo() -> torch.library.Library:
    """torchvision and timm; where torchvision's own operators are not built for this PyTorch, it
    cannot be imported before two of them are declared."""
    if importlib.util.find_spec("torchvision") is None or importlib.util.find_spec("timm") is None:
        pytest.skip("there is no torchvision or no timm")
    boxes = "Tensor dets, Tensor scores, float iou_threshold"
    library = torch.library.Library("torchvision", "FRAGMENT")
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in ("nms", "qnms"):
            library.define(f"{name}({boxes}) -> Tensor")
        importlib.import_module("torchvision")
    return library  # what it declares lives as long as it
