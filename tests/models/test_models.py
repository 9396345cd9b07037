from __future__ import annotations

import pytest
import torch

from dmcp import models
from dmcp.errors import ConfigError


@pytest.mark.parametrize("name", models.names())
def test_build_passes_the_arguments_on(name: str) -> None:
    with torch.device("meta"):
        model = models.build(name, num_classes=7, width=0.25, small_images=True, in_channels=2)
        logits = model(torch.empty(2, 2, 8, 8))

    assert logits.shape == (2, 7)


def test_names() -> None:
    assert models.names() == ("mobilenet_v2", "resnet18", "resnet50")


def test_an_unknown_model_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'vgg16'.*mobilenet_v2, resnet18, resnet50"):
        models.build("vgg16")
