"""The search itself on networks of many families: it runs, moves, and lands inside its budget."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from handmade import ZOO
from published import PUBLISHED

import dmcp

HANDMADE = [
    "AtrousPyramid",
    "Bottlenecks",
    "ConvNeXt",
    "CrossStagePlain",
    "DenseBlock",
    "Fire",
    "FullyConvolutional",
    "GatingProduct",
    "Ghost",
    "GroupNorm",
    "Inception",
    "InvertedResidual",
    "LSTMHead",
    "MobileNetV3",
    "PositionalEmbedding",
    "RawConvolution",
    "RegNet",
    "ResNeXt",
    "ShuffleNetUnit",
    "ThreeDimensions",
    "TiedParameter",
    "TransposedGrouped",
    "UNet",
]

FAMILIES = [
    "torchvision/resnet18",
    "torchvision/resnext50_32x4d",
    "torchvision/mobilenet_v2",
    "torchvision/mobilenet_v3_small",
    "torchvision/efficientnet_b0",
    "torchvision/densenet121",
    "torchvision/regnet_x_400mf",
    "torchvision/shufflenet_v2_x1_0",
    "torchvision/convnext_tiny",
    "torchvision/vgg11_bn",
    "torchvision/squeezenet1_1",
    "timm/ghostnet_100",
]


def searched(network):
    """A search of a few steps: (net, widths, whether each chain moved)."""
    torch.manual_seed(0)
    with torch.no_grad():
        logits = network.model.eval()(*network.inputs)
    net = dmcp.MarkovNet(network.model.train(), network.inputs, groups=4, divisor=1)
    search = dmcp.Search(net, dmcp.Budget(macs="70%"), steps=3)
    labels = torch.randint(logits.shape[1], (len(logits), *logits.shape[2:]))
    before = [alpha.detach().clone() for alpha in net.architecture_parameters()]
    for _ in range(3):
        metrics = search.step(network.inputs[0], labels)
        assert all(bool(value.isfinite().all()) for value in metrics.values())
    pairs = zip(before, net.architecture_parameters(), strict=True)
    return net, search.expected_widths(), [not torch.equal(old, new) for old, new in pairs]


@pytest.mark.parametrize("name", HANDMADE)
def test_a_search_of_a_handmade_network_lands_inside_its_budget(name):
    network = ZOO[name]()
    net, widths, moved = searched(network)
    assert all(moved)
    cost = dmcp.cost(net.graph, "macs")
    assert cost.of(widths) <= 0.7 * cost.of({})
    small = dmcp.extract(net.graph, widths).eval()
    with torch.no_grad(), net.eval().at(widths):
        expected = net(*network.inputs)
        torch.testing.assert_close(small(*network.inputs), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.zoo
@pytest.mark.skipif(find_spec("timm") is None, reason="torchvision and timm missing")
@pytest.mark.parametrize("name", FAMILIES)
def test_a_search_of_a_published_network_lands_inside_its_budget(name):
    # A few steps on two images may leave a large network so sure that its gradients vanish.
    net, widths, _ = searched(PUBLISHED[name]())
    cost = dmcp.cost(net.graph, "macs")
    assert cost.of(widths) <= 0.7 * cost.of({})
