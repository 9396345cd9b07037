from __future__ import annotations

import pytest
import torch
from layers import (
    NETWORKS,
    DepthwiseLayer,
    Layer,
    PointwiseLayer,
    depthwise_layers,
    largest,
    layers,
    pointwise_layers,
)
from torch import nn


@pytest.mark.parametrize("network", NETWORKS)
def test_every_batch_norm_is_a_layer(network):
    with torch.device("meta"):
        model = NETWORKS[network]()
        images = torch.empty(2, 3, 96, 96)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    shapes = []
    for norm in norms:
        norm.register_forward_hook(lambda _, __, output: shapes.append(tuple(output.shape[1:])))
    model(images)
    counts = layers(network, 96)
    found = [(one.channels, one.height, one.width) for one in counts.elements()]
    assert sorted(found) == sorted(shapes)
    assert len(found) == len(norms)


def test_every_depthwise_convolution_is_a_layer():
    counts = depthwise_layers("mobilenet_v2-1.0")
    assert counts.total() == 17
    assert counts[DepthwiseLayer(32, 112, 112, 3, 1)] == 1
    assert counts[DepthwiseLayer(96, 112, 112, 3, 2)] == 1
    assert counts[DepthwiseLayer(960, 7, 7, 3, 1)] == 3
    assert not depthwise_layers("resnet18")


def test_every_pointwise_convolution_is_a_layer():
    counts = pointwise_layers("mobilenet_v2-1.0")
    assert counts.total() == 34
    assert counts[PointwiseLayer(32, 16, 112, 112)] == 1
    assert counts[PointwiseLayer(960, 160, 7, 7)] == 2
    assert counts[PointwiseLayer(320, 1280, 7, 7)] == 1


def test_mobilenet_adds_its_residuals_after_the_projection():
    counts = layers("mobilenet_v2-1.0")
    assert counts[Layer(32, 112, 112, "relu6")] == 2
    assert counts[Layer(24, 56, 56, "identity")] == 1
    assert counts[Layer(24, 56, 56, "identity", "after")] == 1
    assert sum(count for layer, count in counts.items() if layer.residual) == 10
    assert {layer.act for layer in counts} == {"relu6", "identity"}


@pytest.mark.parametrize(("network", "blocks"), [("resnet18", 8), ("resnet50", 16)])
def test_resnet_adds_its_residuals_before_the_activation(network, blocks):
    counts = layers(network)
    joined = {layer: count for layer, count in counts.items() if layer.residual}
    assert sum(joined.values()) == blocks
    assert {(layer.act, layer.residual) for layer in joined} == {("relu", "before")}
    projections = [layer for layer in counts if layer.act == "identity"]
    assert sum(counts[layer] for layer in projections) == (3 if network == "resnet18" else 4)


@pytest.mark.parametrize(
    ("residual", "accesses"), [(None, (3, 5, 8)), ("after", (4, 5, 9)), ("before", (4, 7, 11))]
)
def test_accesses_are_those_of_two_passes_each_way(residual, accesses):
    layer = Layer(8, 4, 4, "relu", residual)
    assert tuple(map(layer.accesses, ("fwd", "bwd", "both"))) == accesses


def test_the_largest_layers_hold_most_values():
    counts = layers("resnet18")
    chosen = largest(counts, 2)
    sizes = sorted((layer.elements * count for layer, count in counts.items()), reverse=True)
    assert [layer.elements * count for layer, count in chosen.items()] == sizes[:2]
    assert all(counts[layer] == count for layer, count in chosen.items())
