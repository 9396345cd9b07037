import pytest

import dmcp
from dmcp.graph import Node
from dmcp.search.mask_sites import mask_sites

# By hand: module -> the module whose output channels its mask follows.
EXPECTED = {
    "Residual": ["stem.1", "first.1", "second.1", "down.1", "skip.1"],
    "Depthwise": {"3": "2.1", "4.1": "4.1"},
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
def test_sites_of_small_networks(example, name):
    case = example(name)
    graph = dmcp.trace(case.model, case.inputs)
    expected = EXPECTED[name]
    if isinstance(expected, list):
        expected = {site: site for site in expected}
    searchable = {m.module for unit in graph.searchable for m in unit.members}
    found = mask_sites(graph.nodes)
    # norm1 and norm3 of the pre-activation network, say, are sites beside the stream's own.
    assert {site: owner for site, owner in found.items() if owner in searchable | {"last.1"}} == (
        expected
    )


def test_resnet_is_masked_after_every_norm(example):
    case = example("resnet18")
    graph = dmcp.trace(case.model, case.inputs)
    norms = {name for name, axes in graph.modules.items() if axes.kind == "norm"}
    assert mask_sites(graph.nodes) == {name: name for name in norms}


def test_mobilenet_is_masked_after_the_activations_that_clip(example):
    case = example("mobilenet_v2")
    graph = dmcp.trace(case.model, case.inputs)
    expected = {"relu_last": "bn_last"}
    for name, axes in graph.modules.items():
        if name.endswith("depthwise_bn"):
            expected[name.removesuffix("bn") + "relu"] = name
        if axes.kind == "norm" and name.endswith("project_bn"):
            expected[name] = name
    assert mask_sites(graph.nodes) == expected


def flow(*nodes):
    return [Node(kind, module, inputs, homogeneous) for kind, module, inputs, homogeneous in nodes]


def test_a_depthwise_convolution_that_is_called_twice_is_masked_before():
    nodes = flow(
        ("input", None, (), True),
        ("dense", "a", (0,), True),
        ("depthwise", "b", (1,), True),
        ("depthwise", "b", (2,), True),
        ("dense", "c", (3,), True),
    )
    assert mask_sites(nodes) == {"a": "a"}


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
    assert mask_sites(nodes) == {"a": "a"}


def test_two_activations_in_a_row_are_masked_behind_the_last():
    nodes = flow(
        ("input", None, (), True),
        ("dense", "a", (0,), True),
        ("activation", "first", (1,), False),
        ("linear_map", None, (2,), True),
        ("activation", "second", (3,), False),
        ("dense", "b", (4,), True),
    )
    assert mask_sites(nodes) == {"second": "a"}
    nodes[4] = Node("activation", None, (3,), False)
    assert mask_sites(nodes) == {"first": "a"}
