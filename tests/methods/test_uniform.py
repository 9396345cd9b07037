from __future__ import annotations

import pytest
import torch

import dmcp
from dmcp.errors import BudgetError
from dmcp.methods import uniform_widths
from dmcp.models import build
from dmcp.search import Budget, Targets


@pytest.fixture(scope="module", params=["mobilenet_v2", "resnet18"])
def graph(request):
    model = build(request.param, num_classes=10, width=0.25, small_images=True)
    return dmcp.trace(model, torch.zeros(1, 3, 16, 16))


@pytest.mark.parametrize("share", ["15%", "40%", "50%", "73%", "99%"])
@pytest.mark.parametrize("metric", ["macs", "params"])
def test_meets_the_budget_with_one_share(graph, metric, share):
    targets = Budget(**{metric: share}).of(graph)
    widths = uniform_widths(graph, targets)
    cost = dmcp.cost(graph, metric).of(widths)
    assert 0.97 * targets.bounds[0] <= cost <= targets.bounds[0]
    assert set(widths) == {unit.name for unit in graph.units}
    # one share that every unit keeps, to less than a channel
    lowest = max((widths[unit.name] - 1) / unit.channels for unit in graph.searchable)
    highest = min((widths[unit.name] + 1) / unit.channels for unit in graph.searchable)
    assert lowest < highest


def test_the_default_device_of_new_tensors_does_not_matter(graph):
    targets = Budget(macs="40%").of(graph)
    widths = uniform_widths(graph, targets)
    with torch.device("meta"):
        assert uniform_widths(graph, targets) == widths


def test_ends_of_the_range(graph):
    assert uniform_widths(graph, Budget(macs="100%").of(graph)) == graph.widths()
    macs = dmcp.cost(graph, "macs")
    narrowest = {unit.name: unit.choices[0] for unit in graph.units}
    assert uniform_widths(graph, Targets((macs,), (macs.of(narrowest),))) == narrowest
    with pytest.raises(BudgetError, match="narrowest"):
        uniform_widths(graph, Targets((macs,), (macs.of(narrowest) - 1,)))


def test_meets_several_bounds(graph):
    targets = Budget(macs="60%", params="20%").of(graph)
    widths = uniform_widths(graph, targets)
    params, full = dmcp.cost(graph, "params"), dmcp.cost(graph, "params").of({})
    assert 0.97 * 0.2 * full <= params.of(widths) <= 0.2 * full
    assert dmcp.cost(graph, "macs").of(widths) <= targets.bounds[0]


def test_stays_on_the_choices_of_the_graph():
    model = build("resnet18", num_classes=10, width=0.5, small_images=True)
    graph = dmcp.MarkovNet(model, torch.zeros(1, 3, 16, 16), divisor=8).graph
    widths = uniform_widths(graph, Budget(macs="50%").of(graph))
    assert all(widths[unit.name] in unit.choices for unit in graph.units)
    assert widths != graph.widths()
