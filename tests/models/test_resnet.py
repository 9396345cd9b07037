from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import dmcp
from dmcp.errors import ConfigError
from dmcp.models import ResNet, resnet18, resnet50

Build = Callable[..., ResNet]
BOTH = pytest.mark.parametrize("build", [resnet18, resnet50])


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("build", "macs", "params"),
    [(resnet18, 1_814_073_344, 11_689_512), (resnet50, 4_089_184_256, 25_557_032)],
)
def test_counts_are_those_of_the_papers_networks(
    count_macs: Any, build: Build, macs: int, params: int
) -> None:
    with torch.device("meta"):
        model = build()

    assert count_macs(model) == macs
    assert parameters(model) == params


@pytest.mark.parametrize(
    ("build", "width", "macs", "params"),
    [
        (resnet18, 0.85, 1313.568, 8.489),
        (resnet18, 0.75, 1042.640, 6.675),
        (resnet18, 0.50, 483.150, 3.056),
        (resnet18, 0.35, 243.748, 1.543),
        (resnet18, 0.25, 135.603, 0.831),
        (resnet50, 0.85, 2950.121, 18.691),
        (resnet50, 0.75, 2322.678, 14.772),
        (resnet50, 0.50, 1052.312, 6.918),
        (resnet50, 0.35, 519.751, 3.593),
        (resnet50, 0.25, 278.086, 1.994),
    ],
)
def test_counts_of_uniformly_narrower_networks(
    count_macs: Any, build: Build, width: float, macs: float, params: float
) -> None:
    with torch.device("meta"):
        model = build(width=width)

    assert round(count_macs(model) / 1e6, 3) == macs
    assert round(parameters(model) / 1e6, 3) == params


@BOTH
@pytest.mark.parametrize(
    ("image_size", "small_images", "map_size"), [(224, False, 7), (8, True, 1), (32, True, 4)]
)
def test_size_of_the_last_map(
    build: Build, image_size: int, small_images: bool, map_size: int
) -> None:
    sizes: list[torch.Size] = []
    with torch.device("meta"):
        model = build(width=0.125, small_images=small_images)
        model.layer4.register_forward_hook(lambda *call: sizes.append(call[-1].shape[2:]))
        model(torch.empty(2, 3, image_size, image_size))

    assert sizes == [(map_size, map_size)]


@BOTH
def test_small_grey_images_reach_the_classes_and_every_weight_gets_a_gradient(
    build: Build,
) -> None:
    torch.manual_seed(0)
    model = build(num_classes=5, width=0.125, small_images=True, in_channels=1)

    logits = model(torch.randn(4, 1, 8, 8))
    logits.square().sum().backward()

    assert logits.shape == (4, 5)
    assert [name for name, weight in model.named_parameters() if weight.grad is None] == []


@BOTH
def test_the_narrowest_network_runs(build: Build) -> None:
    model = build(width=1 / 64, small_images=True).eval()

    assert model(torch.zeros(1, 3, 8, 8)).shape == (1, 1000)


def test_the_stride_is_in_the_3x3_convolution() -> None:
    block = resnet50(width=0.125).layer2[0]

    assert [conv.stride[0] for conv in (block.conv1, block.conv2, block.conv3)] == [1, 2, 1]
    assert block.downsample[0].stride == (2, 2)


@pytest.mark.parametrize(
    ("build", "projecting"),
    [
        (resnet18, ["layer2.0", "layer3.0", "layer4.0"]),
        (resnet50, ["layer1.0", "layer2.0", "layer3.0", "layer4.0"]),
    ],
)
def test_blocks_that_project_their_skip(build: Build, projecting: list[str]) -> None:
    names = dict(build(width=0.125).named_modules())

    assert [name.removesuffix(".downsample") for name in names if name.endswith("downsample")] == (
        projecting
    )


@pytest.mark.parametrize(("build", "activations"), [(resnet18, 1 + 8 * 2), (resnet50, 1 + 16 * 3)])
def test_every_activation_module_runs_once(build: Build, activations: int) -> None:
    model = build(width=0.125, small_images=True).eval()
    calls: Counter[str] = Counter()
    for name, module in model.named_modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_hook(lambda *call, name=name: calls.update([name]))

    model(torch.zeros(1, 3, 8, 8))

    assert len(calls) == activations
    assert set(calls.values()) == {1}


@BOTH
def test_initialisation(build: Build) -> None:
    torch.manual_seed(0)
    model = build(width=0.5)

    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 4000:
            deviation = math.sqrt(2 / (module.kernel_size[0] ** 2 * module.out_channels))
            assert float(module.weight.detach().std()) == pytest.approx(deviation, rel=0.06)
        if isinstance(module, nn.BatchNorm2d):
            assert bool((module.weight == 1).all())
            assert bool((module.bias == 0).all())


def test_channel_units_of_resnet18() -> None:
    graph = dmcp.trace(resnet18(width=0.25, small_images=True), torch.zeros(2, 3, 8, 8))

    expected = {"conv1": 16}
    for layer, channels in enumerate((16, 32, 64, 128), start=1):
        expected |= {f"layer{layer}.{block}.conv1": channels for block in range(2)}
        if layer > 1:
            expected[f"layer{layer}.0.conv2"] = channels
    assert len(expected) == 12
    assert {unit.name: unit.channels for unit in graph.units if unit.searchable} == expected


def test_channel_units_of_resnet50() -> None:
    graph = dmcp.trace(resnet50(width=0.25, small_images=True), torch.zeros(2, 3, 8, 8))

    expected = {"conv1": 16}
    sizes = zip((3, 4, 6, 3), (16, 32, 64, 128), strict=True)
    for layer, (blocks, channels) in enumerate(sizes, start=1):
        expected[f"layer{layer}.0.conv3"] = 4 * channels
        for block in range(blocks):
            expected |= {f"layer{layer}.{block}.conv{conv}": channels for conv in (1, 2)}
    assert len(expected) == 37
    assert {unit.name: unit.channels for unit in graph.units if unit.searchable} == expected


@BOTH
@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"num_classes": 0}, "num_classes"),
        ({"in_channels": -1}, "in_channels"),
        ({"width": 0.01}, "width"),
        ({"width": math.nan}, "width"),
    ],
)
def test_bad_arguments_are_named(build: Build, arguments: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is {arguments[name]}"):
        build(**arguments)
