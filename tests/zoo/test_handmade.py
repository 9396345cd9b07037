"""Every hand-made network is traced, extracted and compared with the zeroed whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from checks import (
    TOLERANCE,
    macs,
    narrowest,
    prepared,
    searchable_share,
    structures,
)
from handmade import REFUSED, ZOO, Network
from oracle import difference, outputs
from torch.utils._pytree import tree_leaves

import dmcp


@dataclass
class Traced:
    """A network of the zoo, its graph and its outputs."""

    network: Network
    graph: Any
    outputs: list[torch.Tensor]


@pytest.fixture(scope="module", params=list(ZOO))
def traced(request) -> Traced:
    network = prepared(ZOO[request.param]())
    graph = dmcp.trace(network.model, network.inputs)
    return Traced(network, graph, outputs(network.model, network.inputs))


def test_random_structures_equal_the_zeroed_whole(traced):
    inputs = traced.network.inputs
    for structure in structures(traced.graph):
        small = outputs(structure.extract(traced.graph), inputs)
        assert [x.shape for x in small] == [x.shape for x in traced.outputs]
        assert difference(small, outputs(structure.zeroed(traced.graph), inputs)) < TOLERANCE


def test_the_narrowest_structure_equals_the_zeroed_whole_and_not_the_whole(traced):
    inputs, structure = traced.network.inputs, narrowest(traced.graph)
    zeroed = outputs(structure.zeroed(traced.graph), inputs)
    assert difference(outputs(structure.extract(traced.graph), inputs), zeroed) < TOLERANCE
    assert difference(zeroed, traced.outputs) > 1e-3, "what is dropped says nothing"


def test_costs_are_those_of_the_extracted_networks(traced):
    graph = traced.graph
    for structure in structures(graph, seed=1):
        small = structure.extract(graph)
        widths = graph.widths() | structure.widths
        assert dmcp.cost(graph, "macs").of(widths) == macs(small, traced.network.inputs)
        assert dmcp.cost(graph, "params").of(widths) == sum(p.numel() for p in small.parameters())


def test_the_small_network_is_the_same_code(traced):
    model, inputs = traced.network.model, traced.network.inputs
    small = structures(traced.graph)[2].extract(traced.graph)
    assert list(small.state_dict()) == list(model.state_dict())
    for name, module in model.named_modules():
        assert type(small.get_submodule(name)) is type(module)
    again = dmcp.trace(small, inputs)
    assert dmcp.cost(again, "macs").of(again.widths()) == macs(small, inputs)
    with torch.no_grad():
        trained = [tree_leaves(m.train()(*inputs)) for m in (small, model)]
    model.eval()
    assert [x.shape for x in trained[0]] == [x.shape for x in trained[1]]


def test_a_search_reaches_most_of_the_cost(traced):
    assert searchable_share(traced.graph, traced.network.inputs) >= traced.network.least


def test_what_must_stay_is_not_searchable(traced):
    for unit in traced.graph.units:
        if unit.name in traced.network.fixed:
            assert not unit.searchable
        assert unit.searchable is (unit.reason == "")


@pytest.mark.parametrize("name", REFUSED)
def test_control_flow_that_depends_on_values_is_refused(name):
    network = REFUSED[name]()
    with pytest.raises(dmcp.TraceError, match=r"handmade\.py:\d+"):
        dmcp.trace(network.model, network.inputs)
