"""Published networks are traced, extracted and compared with the zeroed whole."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
from checks import TOLERANCE, macs, prepared, searchable_share, structures
from oracle import difference, outputs
from published import FAST, PUBLISHED

import dmcp

# Not importorskip: torchvision is imported by `published` alone.
pytestmark = pytest.mark.skipif(find_spec("timm") is None, reason="torchvision and timm missing")

NAMES = [
    pytest.param(name, marks=() if name in FAST else pytest.mark.zoo, id=name) for name in PUBLISHED
]


@pytest.mark.parametrize("name", NAMES)
def test_extracted_networks_are_equal_and_cost_what_they_should(name):
    network = prepared(PUBLISHED[name]())
    graph = dmcp.trace(network.model, network.inputs)
    whole = outputs(network.model, network.inputs)
    keys = list(network.model.state_dict())
    for structure in structures(graph):
        small, widths = structure.extract(graph), graph.widths() | structure.widths
        found = outputs(small, network.inputs)
        assert [x.shape for x in found] == [x.shape for x in whole]
        zeroed = outputs(structure.zeroed(graph), network.inputs)
        assert difference(found, zeroed) < TOLERANCE
        if structure.widths:
            assert difference(zeroed, whole) > 1e-6, "what is dropped says nothing"
        assert dmcp.cost(graph, "macs").of(widths) == macs(small, network.inputs)
        assert dmcp.cost(graph, "params").of(widths) == sum(p.numel() for p in small.parameters())
        assert list(small.state_dict()) == keys
    again = dmcp.trace(small, network.inputs)
    assert dmcp.cost(again, "macs").of(again.widths()) == macs(small, network.inputs)
    assert searchable_share(graph, network.inputs) >= network.least
