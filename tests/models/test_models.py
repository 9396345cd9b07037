from __future__ import annotations

import pytest
import torch
from torch import nn

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


class Scaled(nn.Module):
    """A layer with its own scale, and a block that starts its last layer at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.scale = nn.Parameter(torch.full((4,), 0.1))
        self.block = ZeroLast(nn.Linear(4, 4), nn.Linear(4, 4))


class ZeroLast(nn.Sequential):
    def reset_parameters(self) -> None:
        nn.init.zeros_(self[-1].weight)


def test_fresh_weights_for_any_network() -> None:
    torch.manual_seed(0)
    model = Scaled()
    with torch.no_grad():
        for tensor in [*model.parameters(), model.norm.running_mean]:
            tensor.fill_(3.0)
    torch.manual_seed(1)
    models.reinitialise(model)
    torch.manual_seed(1)
    expected = nn.Conv2d(3, 4, 3)
    assert torch.equal(model.conv.weight, expected.weight)
    assert torch.equal(model.conv.bias, expected.bias)
    assert torch.equal(model.norm.weight, torch.ones(4))
    assert torch.equal(model.norm.running_mean, torch.zeros(4))
    assert torch.equal(model.scale, torch.full((4,), 3.0))
    assert model.block[0].weight.abs().max() <= 0.5
    assert not model.block[1].weight.any(), "a block's reset comes after its layers'"


@pytest.mark.parametrize("name", models.names())
def test_fresh_weights_for_the_package_s_own(name: str) -> None:
    torch.manual_seed(0)
    model = models.build(name, width=0.25)
    torch.manual_seed(1)
    models.reinitialise(model)
    fresh = model.conv1.weight.clone()
    torch.manual_seed(1)
    model.initialise()
    assert torch.equal(model.conv1.weight, fresh)
