import pytest
import torch

import dmcp
from dmcp.errors import BudgetError
from dmcp.search import Budget


@pytest.fixture
def graph(example):
    case = example("Residual")
    return dmcp.trace(case.model, case.inputs)


def test_a_bound_is_a_number_a_string_or_a_share(graph):
    full = dmcp.cost(graph).of({})
    for bound, expected in (
        (20_000, 20_000),
        (2.5e4, 25_000),
        ("20000", 20_000),
        ("20K", 20_000),
        (" 0.025 M ", 25_000),
        ("0.00002G", 20_000),
        ("2e4", 20_000),
        ("50%", full // 2),
        ("33.3%", full * 333 // 1000),
        ("100%", full),
    ):
        assert Budget(macs=bound).of(graph).bounds == (expected,)


def test_decimal_fractions_are_exact():
    """In binary floating point 2.01 * 10**6 is below 2010000 and 29 / 100 * 100 below 29."""
    from dmcp.cost import METRICS
    from dmcp.search.budget import _parse

    macs = METRICS["macs"]
    assert _parse(macs, "2.01M", full=10**9) == 2_010_000
    assert [_parse(macs, "100%", full=full) for full in range(1, 200)] == list(range(1, 200))


@pytest.mark.parametrize(
    "bound",
    ["", "M", "12 apples", "1.2.3M", ".", "-5M", "50 %%", "1T", "nan", "inf", [], True, b"1M"],
)
def test_what_is_no_bound_is_refused(bound):
    with pytest.raises(BudgetError, match="budget params must be a number, or a string such as"):
        Budget(params=bound)


@pytest.mark.parametrize("bound", [0, -1, float("nan"), float("inf"), "0%", "0M", 0.0])
def test_a_bound_must_be_positive_and_finite(bound):
    with pytest.raises(BudgetError, match="budget memory must be positive and finite, got"):
        Budget(memory=bound)


def test_a_budget_needs_a_bound():
    with pytest.raises(BudgetError, match="at least one of macs, params, memory"):
        Budget()


def test_a_bound_out_of_reach_is_refused(graph):
    full, least = (dmcp.cost(graph).of(w) for w in ({}, {u.name: 1 for u in graph.searchable}))
    Budget(macs=full).of(graph)
    Budget(macs=least).of(graph)
    with pytest.raises(BudgetError, match=f"above the full network's {full:,}"):
        Budget(macs=full + 1).of(graph)
    with pytest.raises(BudgetError, match=f"below the narrowest network's {least:,}"):
        Budget(macs=least - 1).of(graph)
    with pytest.raises(BudgetError, match="macs='200%'"):
        Budget(macs="200%").of(graph)
    with pytest.raises(BudgetError, match=r"params='0\.001%'"):
        Budget(macs="50%", params="0.001%").of(graph)


def test_the_narrowest_network_is_that_of_the_grid(example):
    case = example("Residual")
    net = dmcp.search.MarkovNet(case.model, case.inputs, groups=2, divisor=1)
    least = dmcp.cost(net.graph).of({u.name: u.choices[0] for u in net.graph.units})
    with pytest.raises(BudgetError, match="below the narrowest"):
        Budget(macs=least - 1).of(net.graph)


def test_targets_compare_structures_with_every_bound(graph):
    targets = Budget(macs="60%", params="50%").of(graph)
    macs, params = dmcp.cost(graph, "macs"), dmcp.cost(graph, "params")
    structures = [
        {u.name: width if u.searchable else u.channels for u in graph.units}
        for width in range(1, 7)
    ]
    widths = torch.tensor([list(structure.values()) for structure in structures])
    ratios = targets.largest_ratio(widths)
    met = targets.met(widths)
    for structure, ratio, within in zip(structures, ratios.tolist(), met.tolist(), strict=True):
        shares = [
            cost.of(structure) / bound
            for cost, bound in zip((macs, params), targets.bounds, strict=True)
        ]
        assert ratio == max(shares)
        assert within == (max(shares) <= 1)
    assert met.any()
    assert not met.all()


def test_ratios_are_expected_cost_over_bound(example):
    case = example("Residual")
    net = dmcp.search.MarkovNet(case.model, case.inputs, groups=4, divisor=1)
    targets = Budget(macs="60%", memory="50%").of(net.graph)
    ratios = targets.ratios(net.expected_cost(net.cost_table(targets.costs)).cost)
    moments = net.width_moments()
    for ratio, metric, bound in zip(ratios, ("macs", "memory"), targets.bounds, strict=True):
        torch.testing.assert_close(ratio, dmcp.cost(net.graph, metric).mean(moments) / bound)
    ratios.sum().backward()
    assert all(alpha.grad.min() > 0 for alpha in net.architecture_parameters())
