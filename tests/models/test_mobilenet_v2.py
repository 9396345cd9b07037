from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

import dmcp
from dmcp.errors import ConfigError
from dmcp.models import MobileNetV2, mobilenet_v2
from dmcp.models.mobilenet_v2 import round_channels

BLOCKS_PER_LAYER = (1, 2, 3, 4, 3, 3, 1)


def skips(model: MobileNetV2) -> list[bool]:
    return [module.skip for module in model.modules() if hasattr(module, "skip")]


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("width", "macs", "params"),
    [(1.0, 300_774_272, 3_504_872), (1.5, 672_832_704, 6_858_152)],
)
def test_counts_are_those_of_the_papers_networks(
    count_macs: Any, width: float, macs: int, params: int
) -> None:
    with torch.device("meta"):
        model = mobilenet_v2(width=width)

    assert count_macs(model) == macs
    assert parameters(model) == params


@pytest.mark.parametrize(
    ("width", "macs", "params"),
    [
        (1.4, 582.196, 6.109),
        (0.85, 254.198, 2.970),
        (0.75, 209.070, 2.636),
        (0.50, 97.132, 1.969),
        (0.35, 59.286, 1.677),
        (0.25, 37.201, 1.519),
    ],
)
def test_counts_of_uniformly_narrower_and_wider_networks(
    count_macs: Any, width: float, macs: float, params: float
) -> None:
    with torch.device("meta"):
        model = mobilenet_v2(width=width)

    assert round(count_macs(model) / 1e6, 3) == macs
    assert round(parameters(model) / 1e6, 3) == params


@pytest.mark.parametrize(
    ("channels", "rounded"),
    [(32, 32), (11.2, 16), (4, 8), (0.5, 8), (36, 40), (35.5, 32), (24 * 0.75, 24)],
)
def test_round_channels(channels: float, rounded: int) -> None:
    assert round_channels(channels) == rounded


def test_hidden_channels_are_six_times_the_rounded_input() -> None:
    model = mobilenet_v2(width=0.35)

    # 96 * 0.35 = 33.6 becomes 32, and 6 * 33.6 = 201.6 would become 200.
    assert model.layer6[0].expand.out_channels == 192


@pytest.mark.parametrize("width", [1.0, 0.25, 1.5])
def test_every_width_has_the_skips_of_the_full_network(width: float) -> None:
    with torch.device("meta"):
        model = mobilenet_v2(width=width)

    # At width 0.25 the first block has 8 channels at both ends, and must not gain a skip by it.
    assert skips(model) == [block > 0 for blocks in BLOCKS_PER_LAYER for block in range(blocks)]


@pytest.mark.parametrize(
    ("image_size", "small_images", "map_size"),
    [(224, False, 7), (8, True, 1), (32, True, 4), (28, True, 4)],
)
def test_size_of_the_last_map(image_size: int, small_images: bool, map_size: int) -> None:
    sizes: list[torch.Size] = []
    with torch.device("meta"):
        model = mobilenet_v2(width=0.25, small_images=small_images)
        model.conv_last.register_forward_hook(lambda *call: sizes.append(call[-1].shape[2:]))
        model(torch.empty(2, 3, image_size, image_size))

    assert sizes == [(map_size, map_size)]


def test_small_grey_images_reach_the_classes_and_every_weight_gets_a_gradient() -> None:
    torch.manual_seed(0)
    model = mobilenet_v2(num_classes=5, width=0.25, small_images=True, in_channels=1)

    logits = model(torch.randn(4, 1, 8, 8))
    logits.square().sum().backward()

    assert logits.shape == (4, 5)
    assert [name for name, weight in model.named_parameters() if weight.grad is None] == []


def test_every_activation_module_runs_once() -> None:
    model = mobilenet_v2(width=0.25, small_images=True).eval()
    calls: Counter[str] = Counter()
    for name, module in model.named_modules():
        if isinstance(module, nn.ReLU6):
            module.register_forward_hook(lambda *call, name=name: calls.update([name]))

    model(torch.zeros(1, 3, 8, 8))

    assert len(calls) == 1 + 2 * sum(BLOCKS_PER_LAYER) - 1 + 1
    assert set(calls.values()) == {1}


def test_initialisation() -> None:
    torch.manual_seed(0)
    model = mobilenet_v2()

    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 4000:
            deviation = math.sqrt(2 / (module.kernel_size[0] ** 2 * module.out_channels))
            assert float(module.weight.detach().std()) == pytest.approx(deviation, rel=0.06)
        if isinstance(module, nn.BatchNorm2d):
            assert bool((module.weight == 1).all())
            assert bool((module.bias == 0).all())
    assert float(model.fc.weight.detach().abs().max()) <= 1 / math.sqrt(1280)


def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    model = mobilenet_v2(width=0.25, small_images=True, dropout=0.5)
    features: list[tuple[torch.Tensor, torch.Tensor]] = []
    model.dropout.register_forward_hook(lambda _, given, out: features.append((given[0], out)))
    images = torch.randn(2, 3, 16, 16)

    model(images)
    model.eval()(images)

    (given, dropped), (given_in_eval, same) = features
    assert 0.4 < float((dropped[given > 0] == 0).float().mean()) < 0.6
    assert torch.equal(given_in_eval, same)


def test_channel_units() -> None:
    graph = dmcp.trace(mobilenet_v2(small_images=True), torch.zeros(2, 3, 8, 8))

    expected = {"conv1": 32, "conv_last": 1280}
    channels = [16, 24, 32, 64, 96, 160, 320]
    for layer, (blocks, stream) in enumerate(zip(BLOCKS_PER_LAYER, channels, strict=True), start=1):
        expected[f"layer{layer}.0.project"] = stream
        for block in range(blocks if layer > 1 else 0):
            inputs = stream if block else channels[layer - 2]
            expected[f"layer{layer}.{block}.expand"] = 6 * inputs
    assert len(expected) == 25
    assert {unit.name: unit.channels for unit in graph.units if unit.searchable} == expected


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"num_classes": 0}, "num_classes"),
        ({"in_channels": 0}, "in_channels"),
        ({"width": 0.0}, "width"),
        ({"width": math.nan}, "width"),
        ({"width": math.inf}, "width"),
        ({"dropout": 1.0}, "dropout"),
        ({"dropout": -0.1}, "dropout"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is {arguments[name]}"):
        mobilenet_v2(**arguments)
