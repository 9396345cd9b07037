import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dmcp
from dmcp.graph import Node
from dmcp.graph.units import AxisMap
from dmcp.search.mask_sites import MaskSites, fusable, mask_sites

# By hand: the modules whose outputs are scaled.
EXPECTED = {
    "Residual": ["stem.1", "first.1", "second.1", "down.1", "skip.1"],
    "Depthwise": ["3", "4.1"],
    "DepthwiseMultiplier": ["2.1", "4.1"],
    "BiasedDepthwise": ["stem.1", "branch.1", "depthwise", "mix.1"],
    "Concat": ["stem.1", "left.1", "right.1", "last.1"],
    "Interleaved": ["left.1", "right.1", "last.1"],
    "WithoutNorm": ["0", "2"],
    "FlattenedMap": ["0.1", "4"],
    "FunctionalReLU6": ["first.1", "second.1"],
    "SharedActivation": ["first.1", "second.1"],
    "ReadTwice": ["first.1", "left.1", "right.1"],
    "PreActivation": ["stem", "norm1", "norm2", "conv2", "norm3"],
    "BothEnds": ["stem.1", "conv.1"],
    "CalledTwice": ["stem.1", "block.1", "last.1"],
    "SeveralInputs": ["left.1", "right.1", "middle.1", "last.1"],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_sites_of_small_networks(traced, name):
    graph = traced(name).graph
    sites = mask_sites(graph.nodes)
    assert sorted(sites.modules) == sorted(EXPECTED[name])
    assert sites.parameters == {}
    assert sites.missing == set()
    for module, number in sites.modules.items():
        assert graph.nodes[number].module == module
        assert len(graph.nodes[number].axes) == 1


def test_resnet_is_masked_after_every_norm(traced):
    graph = traced("resnet18").graph
    norms = {name for name, axes in graph.modules.items() if axes.kind == "norm"}
    assert set(mask_sites(graph.nodes).modules) == norms


def test_mobilenet_is_masked_after_the_activations_that_clip(traced):
    graph = traced("mobilenet_v2").graph
    expected = {"relu_last"}
    for name, axes in graph.modules.items():
        if name.endswith("depthwise_bn"):
            expected.add(name.removesuffix("bn") + "relu")
        if axes.kind == "norm" and name.endswith("project_bn"):
            expected.add(name)
    assert set(mask_sites(graph.nodes).modules) == expected


CHANNELS = AxisMap(torch.zeros(4, dtype=torch.int64), torch.arange(4))
"""Of one unit."""


def flow(*nodes):
    """Nodes with channels in dimension 1, by their kind, module, inputs and homogeneity."""
    return [
        Node(kind, module, inputs, homogeneous, axes=((1, CHANNELS),) if inputs else ())
        for kind, module, inputs, homogeneous in nodes
    ]


def test_a_depthwise_convolution_that_is_called_twice_is_masked_before():
    nodes = flow(
        ("input", None, (), True),
        ("dense", "a", (0,), True),
        ("depthwise", "b", (1,), True),
        ("depthwise", "b", (2,), True),
        ("dense", "c", (3,), True),
    )
    assert mask_sites(nodes) == MaskSites(modules={"a": 1})


def test_a_value_of_a_repeated_module_is_scaled_once_per_call():
    """The first call is read before and after its activation, the second one only before."""
    nodes = flow(
        ("input", None, (), True),
        ("dense", "a", (0,), True),
        ("activation", "act", (1,), False),
        ("dense", "a", (2,), True),
        ("dense", "b", (3,), True),
        ("join", None, (2, 1), True),
        ("dense", "c", (5,), True),
    )
    assert set(mask_sites(nodes).modules) == {"a"}


def test_two_activations_in_a_row_are_masked_behind_the_last():
    nodes = flow(
        ("input", None, (), True),
        ("dense", "a", (0,), True),
        ("activation", "first", (1,), False),
        ("linear_map", None, (2,), True),
        ("activation", "second", (3,), False),
        ("dense", "b", (4,), True),
    )
    assert mask_sites(nodes) == MaskSites(modules={"second": 4})
    nodes[4] = Node("activation", None, (3,), False)
    assert mask_sites(nodes) == MaskSites(modules={"first": 2})


def test_a_value_without_channels_needs_no_mask():
    nodes = flow(("input", None, (), True), ("dense", "a", (0,), True), ("dense", "b", (1,), True))
    nodes[1] = Node("dense", "a", (0,))
    assert mask_sites(nodes) == MaskSites()


def test_a_value_that_no_module_and_no_parameter_makes_cannot_be_masked():
    nodes = flow(("input", None, (), True), ("dense", None, (0,), True), ("dense", "b", (1,), True))
    assert mask_sites(nodes) == MaskSites(missing={1})


def test_a_value_with_two_dimensions_of_channels_cannot_be_masked_at_once():
    nodes = flow(("input", None, (), True), ("dense", "a", (0,), True), ("dense", "b", (1,), True))
    nodes[1] = Node("dense", "a", (0,), axes=((1, CHANNELS), (2, CHANNELS)))
    assert mask_sites(nodes) == MaskSites(missing={1})


IMAGES = torch.zeros(2, 3, 8, 8)


class Calls(nn.Module):
    """A convolution to 8 channels, ``function(module, x)`` and another convolution."""

    def __init__(self, function, **modules):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.last(self.function(self, self.first(x)))


def raw(*shape):
    return nn.Parameter(torch.rand(shape))


@pytest.mark.parametrize(
    ("function", "modules", "masked", "parameters"),
    [
        (lambda m, x: F.relu(x), {}, ["first"], []),
        (lambda m, x: m.act(x), {"act": nn.SiLU()}, ["act"], []),
        (lambda m, x: F.silu(x), {}, ["first"], []),
        (
            lambda m, x: m.act(m.norm(x)),
            {"norm": nn.GroupNorm(4, 8), "act": nn.ReLU()},
            ["norm"],
            [],
        ),
        (lambda m, x: m.norm(x), {"norm": nn.InstanceNorm2d(8, affine=True)}, ["norm"], []),
        (lambda m, x: m.up(x), {"up": nn.ConvTranspose2d(8, 8, 2, 2)}, ["first", "up"], []),
        # A convolution of raw weights is scaled through them.
        (
            lambda m, x: F.conv2d(x, m.weight, m.bias),
            {"weight": raw(8, 8, 1, 1), "bias": raw(8)},
            ["first"],
            ["weight", "bias"],
        ),
        # What is added has to be scaled like what it is added to.
        (lambda m, x: x + m.place, {"place": raw(1, 8, 8, 8)}, ["first"], ["place"]),
        (
            lambda m, x: F.conv2d(x + F.relu(x), m.weight, m.bias, groups=x.shape[1]),
            {"weight": raw(8, 1, 1, 1), "bias": raw(8)},
            ["first"],
            ["bias"],
        ),
        # A scale needs no mask of its own.
        (lambda m, x: x * m.scale, {"scale": raw(1, 8, 1, 1)}, ["first"], []),
        # Of a product one factor is scaled: the gate stays as it is.
        (
            lambda m, x: x * m.gate(x.mean((2, 3), keepdim=True)).sigmoid(),
            {"gate": nn.Conv2d(8, 8, 1)},
            ["first"],
            [],
        ),
        (lambda m, x: x * x.sigmoid(), {}, ["first"], []),
        (lambda m, x: m.a(x) * m.b(x), {n: nn.Conv2d(8, 8, 1) for n in "ab"}, ["a", "first"], []),
    ],
)
def test_sites_beside_norms_and_activations(function, modules, masked, parameters):
    graph = dmcp.trace(Calls(function, **modules), IMAGES)
    assert "first" in {unit.name for unit in graph.searchable}
    sites = mask_sites(graph.nodes)
    assert sorted(sites.modules) == masked
    assert set(sites.parameters) == set(parameters)
    assert sites.missing == set()


def test_a_computed_weight_without_a_norm_is_missing():
    model = Calls(lambda m, x: F.relu(x))
    nn.utils.parametrizations.weight_norm(model.first)
    graph = dmcp.trace(model, IMAGES)
    (number,) = mask_sites(graph.nodes).missing
    assert graph.nodes[number].kind == "dense"
    normed = Calls(lambda m, x: m.norm(x), norm=nn.BatchNorm2d(8))
    nn.utils.parametrizations.weight_norm(normed.first)
    sites = mask_sites(dmcp.trace(normed, IMAGES).nodes)
    assert sites.missing == set()
    assert set(sites.modules) == {"norm"}


@pytest.mark.parametrize(
    ("function", "modules", "expected"),
    [
        (lambda m, x: m.act(m.norm(x)), {"act": nn.ReLU()}, {"norm": "act"}),
        (lambda m, x: m.act(m.norm(x)), {"act": nn.SiLU()}, {"norm": "act"}),
        (lambda m, x: F.relu(m.norm(x)), {}, {}),
        (lambda m, x: m.act(m.norm(m.act(x))), {"act": nn.ReLU()}, {}),
        (lambda m, x: m.act(m.norm(m.norm(x))), {"act": nn.ReLU()}, {}),
        (lambda m, x: m.act(F.dropout(m.norm(x), 0.0)), {"act": nn.ReLU()}, {}),
    ],
)
def test_a_norm_may_compute_the_activation_that_alone_reads_it(function, modules, expected):
    graph = dmcp.trace(Calls(function, norm=nn.BatchNorm2d(8), **modules), IMAGES)
    assert fusable(graph.nodes).activations == expected


def test_a_norm_that_two_read_computes_no_activation():
    model = Calls(lambda m, x: (y := m.norm(x)) + m.act(y), norm=nn.BatchNorm2d(8), act=nn.ReLU())
    assert fusable(dmcp.trace(model, IMAGES).nodes).activations == {}
