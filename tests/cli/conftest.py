"""The packages that hold other models."""

from __future__ import annotations

import importlib
import importlib.util

import pytest
import torch


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
