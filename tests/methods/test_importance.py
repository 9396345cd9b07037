from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import dmcp
from dmcp.methods.importance import (
    consuming_weights,
    depthwise_weights,
    filter_places,
    l1_norms,
    norm_scales,
    producers,
    producing_weights,
    unit_filters,
)


def units(graph):
    return {unit.name: unit for unit in graph.units}


def test_a_stream_is_produced_by_several_layers(residual):
    names = {name: producers(residual, unit) for name, unit in units(residual).items()}
    assert names == {
        "stem": ["stem.weight", "second.weight"],
        "first": ["first.weight"],
        "last": ["last.weight"],
        "head": ["head.weight"],
    }


def test_a_depthwise_layer_produces_nothing(traced):
    graph = traced("Depthwise").graph
    assert producers(graph, graph.units[0]) == ["0.0.weight"]
    (depthwise,) = depthwise_weights(graph, graph.model, graph.units[0])
    assert torch.equal(depthwise, graph.model[2][0].weight.reshape(8, 9))
    assert [rows.shape for rows in norm_scales(graph, graph.model, graph.units[0])] == [(8, 1)] * 2


class Scaled(nn.Module):
    """A scale of each channel and a depthwise convolution, with parameters of the module itself."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)
        self.scale = nn.Parameter(torch.rand(8, 1, 1) + 0.5)
        self.filters = nn.Parameter(torch.randn(8, 1, 3, 3))

    def forward(self, x):
        x = F.relu(self.stem(x)) * self.scale
        x = F.conv2d(x, self.filters, padding=1, groups=len(self.filters))
        return self.head(F.relu(x).mean((2, 3)))


class Functional(nn.Module):
    """A stream of two dense convolutions with parameters of the module itself."""

    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.randn(8, 3, 3, 3))
        self.second = nn.Parameter(torch.randn(8, 8, 3, 3))
        self.bias = nn.Parameter(torch.randn(8))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(F.conv2d(x, self.first, padding=1))
        x = F.relu(x + F.conv2d(x, self.second, self.bias, padding=1))
        return self.head(x.mean((2, 3)))


def traced_with_seed(kind):
    torch.manual_seed(0)
    return dmcp.trace(kind(), torch.randn(2, 3, 8, 8))


def test_functional_scales_and_depthwise_convolutions_produce_nothing():
    graph = traced_with_seed(Scaled)
    unit = units(graph)["stem"]
    assert unit.searchable
    indexed = {name for member in unit.members for name, _ in member.tensors}
    assert {"scale", "filters"} <= indexed  # they are pruned with the unit all the same
    assert producers(graph, unit) == ["stem.weight"]
    (rows,) = producing_weights(graph, graph.model, unit)
    assert torch.equal(rows, graph.model.stem.weight.reshape(8, 27))
    places = [tensor for tensor, _, _ in filter_places(graph, graph.model, unit, torch.tensor([0]))]
    assert [id(tensor) for tensor in places] == [
        id(graph.model.stem.weight),
        id(graph.model.stem.bias),
    ]


def test_functional_convolutions_of_one_module_are_producers_of_their_own():
    graph = traced_with_seed(Functional)
    model, unit = graph.model, units(graph)["first"]
    assert unit.searchable
    assert producers(graph, unit) == ["first", "second"]
    first, second = producing_weights(graph, model, unit)
    assert torch.equal(first, model.first.reshape(8, 27))
    assert torch.equal(second, model.second.reshape(8, 72))
    norms = model.first.abs().sum((1, 2, 3)) + model.second.abs().sum((1, 2, 3))
    torch.testing.assert_close(l1_norms(graph, model)["first"], norms.detach())


def test_weights_have_a_row_for_each_channel(residual):
    model, stream = residual.model, units(residual)["stem"]
    stem, second = producing_weights(residual, model, stream)
    assert torch.equal(stem, model.stem.weight.reshape(8, 9))
    assert torch.equal(second, model.second.weight.reshape(8, 72))
    first, last = consuming_weights(residual, model, stream)
    assert torch.equal(first, model.first.weight.transpose(0, 1).reshape(8, 72))
    assert torch.equal(last, model.last.weight.transpose(0, 1).reshape(8, 108))
    assert torch.equal(unit_filters(residual, model, stream), torch.cat([stem, second], 1))


def test_norm_scales_leave_shifts_and_statistics_out(residual):
    torch.nn.init.constant_(residual.model.norm1.weight, 3)
    (scales,) = norm_scales(residual, residual.model, units(residual)["first"])
    assert torch.equal(scales, torch.full((8, 1), 3.0))


def test_weights_of_a_step_stand_in_one_row(traced):
    graph = traced("FlattenedMap").graph
    (read,) = consuming_weights(graph, graph.model, graph.units[0])
    assert torch.equal(read, graph.model[4].weight.T.reshape(6, 4 * 10))


def test_l1_norms_sum_over_the_layers_of_a_stream(residual):
    with torch.no_grad():
        for layer, signs in ((residual.model.stem, 1), (residual.model.second, -1)):
            per_filter = torch.arange(8.0)[:, None, None, None]
            layer.weight.copy_((signs * per_filter).expand_as(layer.weight))
            layer.bias.fill_(100)
    norms = l1_norms(residual, residual.model)
    assert norms.keys() == units(residual).keys()
    assert norms["stem"].tolist() == [(9 + 72) * channel for channel in range(8)]
    assert not norms["stem"].requires_grad


def test_filter_places_are_weights_and_biases_of_all_producers(residual):
    stream = units(residual)["stem"]
    with torch.no_grad():
        for tensor, dim, positions in filter_places(
            residual, residual.model, stream, torch.tensor([2, 5])
        ):
            tensor.index_fill_(dim, positions, 0)
    for layer in (residual.model.stem, residual.model.second):
        zeros = (layer.weight.flatten(1) == 0).all(1) & (layer.bias == 0)
        assert zeros.nonzero().flatten().tolist() == [2, 5]
    for layer in (residual.model.norm, residual.model.norm2, residual.model.first):
        assert (layer.weight != 0).all()
