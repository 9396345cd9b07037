import itertools

import pytest
import torch
from torch import nn

import dmcp
from dmcp.cost import Cost, measured_macs
from dmcp.nn import width_choices
from dmcp.ops import CostTable, expected_cost

SMALL_ENOUGH_TO_ENUMERATE = [
    "Residual",
    "Depthwise",
    "DepthwiseMultiplier",
    "BothEnds",
    "CalledTwice",
    "Concat",
    "FlattenedMap",
]


def enumerate_structures(q, choices):
    """Every structure and its probability, from the chains' definition: [n, U], [n]."""
    per_unit, start = [], 0
    for grid in choices:
        own = torch.cat([q.new_ones(1), q[start : start + len(grid) - 1], q.new_zeros(1)])
        per_unit.append(own[:-1] - own[1:])
        start += len(grid) - 1
    widths = torch.tensor(list(itertools.product(*choices)))
    probabilities = [torch.stack(pick).prod() for pick in itertools.product(*per_unit)]
    return widths, torch.stack(probabilities)


def chains(graph, groups=4, seed=0):
    """Grids of the searchable units and random retain probabilities."""
    choices = [
        width_choices(unit.channels, groups, unit.step) if unit.searchable else unit.choices
        for unit in graph.units
    ]
    generator = torch.Generator().manual_seed(seed)
    alpha = torch.randn(sum(map(len, choices)) - len(choices), generator=generator).double()
    return choices, alpha.requires_grad_()


def retain_by_definition(alpha, choices):
    parts = alpha.sigmoid().split([len(grid) - 1 for grid in choices])
    return torch.cat([part.cumprod(0) for part in parts])


@pytest.mark.parametrize("metric", ["macs", "params", "memory"])
@pytest.mark.parametrize("name", SMALL_ENOUGH_TO_ENUMERATE)
def test_mean_and_variance_are_those_of_all_structures(traced, name, metric):
    assert_mean_and_variance_are_exact(dmcp.cost(traced(name).graph, metric))


class Tied(nn.Sequential):
    """Grouped convolutions, a shuffle and a group norm: steps of 2, 4 and 6 channels."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 8, 3),
            nn.Conv2d(8, 12, 3, groups=2),
            nn.ChannelShuffle(2),
            nn.GroupNorm(3, 12),
            nn.Conv2d(12, 8, 1, groups=4),
            nn.ReLU(),
            nn.Conv2d(8, 3, 1),
        )


@pytest.fixture(scope="module")
def tied():
    graph = dmcp.trace(Tied(), torch.zeros(2, 3, 8, 8))
    assert {unit.step for unit in graph.searchable} >= {2, 4}
    return graph


@pytest.mark.parametrize("metric", ["macs", "params", "memory"])
def test_mean_and_variance_with_steps_are_those_of_all_structures(tied, metric):
    assert_mean_and_variance_are_exact(dmcp.cost(tied, metric))


@pytest.mark.parametrize("metric", ["macs", "params"])
def test_costs_with_steps_are_those_of_the_extracted_network(tied, metric, random_widths):
    images = torch.zeros(2, 3, 8, 8)
    for seed in range(4):
        widths = random_widths(tied, seed)
        small = dmcp.extract(tied, widths)
        measured = {
            "macs": measured_macs(small, images),
            "params": sum(parameter.numel() for parameter in small.parameters()),
        }
        assert dmcp.cost(tied, metric).of(widths) == measured[metric]


def test_coefficients_with_steps_are_the_polynomial(tied, random_widths):
    cost = dmcp.cost(tied)
    matrix = cost.coefficients()
    for seed in range(3):
        widths = random_widths(tied, seed)
        c = torch.tensor([1.0, *widths.values()], dtype=torch.float64)
        torch.testing.assert_close(
            c @ matrix.triu() @ c, torch.tensor(float(cost.of(widths))).double(), rtol=1e-14, atol=0
        )


def assert_mean_and_variance_are_exact(cost):
    choices, alpha = chains(cost)
    q = retain_by_definition(alpha, choices)
    widths, probability = enumerate_structures(q, choices)
    costs = cost.of_many(widths).double()
    mean = (probability * costs).sum()
    variance = (probability * (costs - mean) ** 2).sum()

    chosen = expected_cost(alpha, CostTable.of(choices, [cost.coefficients()]))
    for closed_mean, closed_variance in (
        (chosen.cost[0], chosen.variance[0]),
        (cost.mean(chosen.moments.T), cost.variance(chosen.moments.T)),
    ):
        torch.testing.assert_close(closed_mean, mean, rtol=1e-12, atol=0)
        torch.testing.assert_close(closed_variance, variance, rtol=1e-11, atol=0)
        for closed, enumerated in ((closed_mean, mean), (closed_variance, variance)):
            (gradient,) = torch.autograd.grad(closed, alpha, retain_graph=True)
            (expected,) = torch.autograd.grad(enumerated, alpha, retain_graph=True)
            torch.testing.assert_close(
                gradient, expected, rtol=1e-9, atol=1e-9 * float(mean.detach())
            )


def test_the_gradient_equals_finite_differences(traced):
    graph = traced("Depthwise").graph
    cost = dmcp.cost(graph)
    choices, alpha = chains(graph)
    table = CostTable.of(choices, [cost.coefficients()])

    def mean(alpha):
        return cost.mean(expected_cost(alpha, table).moments.T)

    def deviation(alpha):
        return cost.variance(expected_cost(alpha, table).moments.T).sqrt()

    assert torch.autograd.gradcheck(mean, alpha)
    assert torch.autograd.gradcheck(deviation, alpha)


def test_a_unit_at_both_ends_enters_by_its_second_moment(traced):
    graph = traced("BothEnds").graph
    cost = dmcp.cost(graph)
    assert cost.quadratic[0, 0] == 9 * 8 * 8
    moments = torch.tensor([[4.0, 20.0], [5.0, 25.0]], dtype=torch.float64)
    squared = torch.tensor([[4.0, 16.0], [5.0, 25.0]], dtype=torch.float64)
    assert cost.mean(moments) - cost.mean(squared) == 9 * 8 * 8 * (20 - 16)


def test_coefficients_are_the_polynomial(traced, random_widths):
    graph = traced("BothEnds").graph
    cost = dmcp.cost(graph, "params")
    matrix = cost.coefficients()
    assert torch.equal(matrix, matrix.T)
    for seed in range(3):
        widths = random_widths(graph, seed)
        c = torch.tensor([1.0, *widths.values()], dtype=torch.float64)
        assert c @ matrix.triu() @ c == cost.of(widths)


def test_certain_chains_have_the_cost_of_one_structure(traced):
    graph = traced("Residual").graph
    cost = dmcp.cost(graph)
    choices, alpha = chains(graph)
    table = CostTable.of(choices, [cost.coefficients()])
    for sign, place in ((1, -1), (-1, 0)):
        chosen = expected_cost(torch.full_like(alpha, sign * 1000.0), table)
        structure = {u.name: grid[place] for u, grid in zip(graph.units, choices, strict=True)}
        assert chosen.cost.item() == cost.of(structure)
        assert chosen.variance.item() == 0
        assert cost.mean(chosen.moments.T) == cost.of(structure)
        assert cost.variance(chosen.moments.T).abs() <= 1e-12 * cost.of(structure) ** 2


def test_mobilenet_agrees_with_its_sampled_structures(example):
    case = example("mobilenet_v2")
    net = dmcp.search.MarkovNet(case.model, case.inputs, groups=6, divisor=1)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for alpha in net.architecture_parameters():
            alpha.normal_(1, 1, generator=generator)
        cost: Cost = dmcp.cost(net.graph)
        expected = net.expected_cost(net.cost_table([cost]))
        count = 40_000
        drawn = dmcp.search.draw_widths(net, count, generator)
    costs = cost.of_many(drawn.widths).double()
    deviation = expected.variance.sqrt()
    assert (costs.mean() - expected.cost).abs() < 4 * deviation / count**0.5
    centred = (costs - costs.mean()) ** 2
    assert (centred.mean() - deviation**2).abs() < 4 * centred.std() / count**0.5
