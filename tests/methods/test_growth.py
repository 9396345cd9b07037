from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import dmcp
from dmcp.cost import LatencyTable, TableAxis, TableTerm
from dmcp.errors import BudgetError
from dmcp.methods.growth import even_worth, held, kept_channels, largest, ranked
from dmcp.search import Targets
from dmcp.search.growth import fill, grow


@pytest.fixture(scope="module")
def graph():
    """Two units of four channels; MACs are 2 a + a b + 3 b for widths a and b."""
    layers = [torch.nn.Conv2d(i, o, 1, bias=False) for i, o in ((2, 4), (4, 4), (4, 3))]
    return dmcp.trace(torch.nn.Sequential(*layers), torch.zeros(1, 2, 1, 1))


def targets(graph, bound):
    return Targets((dmcp.cost(graph, "macs"),), (bound,))


def widths(graph, *numbers):
    return dict(zip((unit.name for unit in graph.units), (*numbers, 3), strict=True))


def test_takes_the_group_that_is_worth_most(graph):
    # (1, 1) costs 6, (1, 2) 10, (2, 1) 9, (2, 2) 14, (3, 1) 12, (3, 2) 18
    worth = [[5, 3, 1], [4, 2, 1], []]
    assert grow(graph, targets(graph, 9), worth) == widths(graph, 2, 1)
    assert grow(graph, targets(graph, 14), worth) == widths(graph, 2, 2)
    assert grow(graph, targets(graph, 18), worth) == widths(graph, 3, 2)
    assert grow(graph, targets(graph, 36), worth) == widths(graph, 4, 4)


def test_takes_a_group_that_fits_instead_of_a_better_one_that_does_not(graph):
    assert grow(graph, targets(graph, 9), [[1, 1, 1], [9, 9, 9], []]) == widths(graph, 2, 1)
    assert grow(graph, targets(graph, 11), [[1, 1, 1], [9, 9, 9], []]) == widths(graph, 1, 2)


def test_a_unit_gives_up_a_group_where_others_use_the_budget_better(graph):
    # Growing alone ends at (1, 2), five sixths of the budget; without its last group at (3, 1).
    assert grow(graph, targets(graph, 12), [[1, 1, 1], [9, 9, 9], []]) == widths(graph, 3, 1)
    assert fill(graph, targets(graph, 12), [[1, 1, 1], [9, 9, 9], []]) == widths(graph, 1, 2)
    # Nothing comes within 1 % of 17: (2, 2) costs 14, (4, 1) 15.
    assert grow(graph, targets(graph, 17), [[5, 3, 1], [4, 2, 1], []]) == widths(graph, 4, 1)


def by_table(graph, first, second, bound):
    """A bound on a latency that is the sum of these, for the widths 1 … 4 of two units."""
    units = graph.searchable
    table = LatencyTable(
        setting={},
        units=graph.widths(),
        searchable=tuple(unit.name for unit in units),
        macs=dmcp.cost(graph).of({}),
        operators=graph.operators,
        axes=tuple(TableAxis({unit.name: 1.0}, (1, 2, 3, 4)) for unit in units),
        terms=tuple(
            TableTerm(unit.name, (), (n,), ms, ms, ms)
            for n, (unit, ms) in enumerate(zip(units, (first, second), strict=True))
        ),
        scale=1.0,
        offset=0.0,
    )
    return Targets((dmcp.cost(graph, "latency", table),), (bound,))


def test_a_latency_that_falls_with_a_width_stops_nothing(graph):
    # The second width of the first unit takes longer than the third.
    targets = by_table(graph, [1, 5, 2, 3], [1, 4, 4, 4], 4)
    assert fill(graph, targets, even_worth(graph)) == widths(graph, 4, 1)
    # What did not fit fits once the other unit is as wide as it is fast.
    targets = by_table(graph, [1, 2, 3, 4], [3, 3, 1, 4], 4)
    assert fill(graph, targets, [[1, 9, 9], [5, 5, 5], []]) == widths(graph, 3, 3)


def test_what_does_not_fit_without_its_last_group_keeps_it(graph):
    # (3, 1) takes 3 of 3.5 ms, (2, 1), which was leapt over, 6.
    targets = by_table(graph, [1, 5, 2, 3], [1, 4, 4, 4], 3.5)
    assert grow(graph, targets, even_worth(graph)) == widths(graph, 3, 1)
    # The other unit still gives up its last group: (3, 2) takes 4 of 4.5 ms, (4, 1) all of them.
    targets = by_table(graph, [1, 5, 2, 3.5], [1, 2, 9, 9], 4.5)
    assert grow(graph, targets, [[1, 1, 1], [9, 1, 1], []]) == widths(graph, 4, 1)


def test_the_first_unit_wins_a_tie(graph):
    # (1, 2) costs 10, and then nothing else fits
    assert grow(graph, targets(graph, 13), [[1, 1, 1], [1, 1, 1], []]) == widths(graph, 3, 1)


def test_grows_from_a_start(graph):
    start = widths(graph, 1, 3)  # costs 14, (1, 4) 18, (2, 3) 19
    assert grow(graph, targets(graph, 18), [[9, 9, 9], [1, 1, 1], []], start) == widths(graph, 1, 4)


def test_refuses_a_start_beyond_the_budget(graph):
    worth = even_worth(graph)
    assert grow(graph, targets(graph, 6), worth) == widths(graph, 1, 1)
    with pytest.raises(BudgetError, match="to grow from exceeds the budget"):
        grow(graph, targets(graph, 5), worth)
    with pytest.raises(BudgetError, match="to grow from exceeds the budget"):
        grow(graph, targets(graph, 13), worth, widths(graph, 1, 3))


def test_even_worth_is_how_far_a_unit_lags_behind(graph):
    first, second, last = graph.units
    coarse = replace(graph, units=(first, replace(second, choices=(2, 4)), last))
    assert even_worth(coarse) == [[-1.5 / 4, -2.5 / 4, -3.5 / 4], [-3 / 4], []]
    assert grow(coarse, targets(graph, 100), even_worth(coarse)) == widths(graph, 4, 4)
    # (1, 2) costs 10, (2, 2) 14, (3, 2) 18, (4, 2) 22, (3, 4) 30
    assert grow(coarse, targets(graph, 29), even_worth(coarse)) == widths(graph, 4, 2)
    assert grow(coarse, targets(graph, 30), even_worth(coarse)) == widths(graph, 3, 4)


def test_a_held_unit_stays(graph):
    first, second = (unit.name for unit in graph.units[:2])
    only = held(graph, {second: 3})
    assert [unit.choices for unit in only.units] == [(1, 2, 3, 4), (3,), (3,)]
    assert grow(only, targets(graph, 19), even_worth(only)) == widths(graph, 2, 3)
    assert graph.units[1].choices == (1, 2, 3, 4)
    assert held(graph, {first: 2}).units[0].searchable


def test_largest_is_ascending_and_the_first_of_equals(graph):
    unit = graph.units[0]
    assert largest(torch.tensor([0.1, 3.0, 2.0, 5.0]), unit, 2).tolist() == [1, 3]
    assert largest(torch.tensor([1.0, 1.0, 2.0, 1.0]), unit, 3).tolist() == [0, 1, 2]


def test_largest_keeps_whole_steps(graph):
    unit = replace(graph.units[0], step=2)
    assert largest(torch.tensor([1.0, 2.0]), unit, 2).tolist() == [2, 3]
    assert largest(torch.tensor([1.0, 2.0]), unit, 4).tolist() == [0, 1, 2, 3]


def test_kept_channels_are_those_of_the_searchable_units(graph):
    first, second, _ = (unit.name for unit in graph.units)
    scores = {first: torch.tensor([1.0, 4.0, 3.0, 2.0]), second: torch.tensor([4.0, 3.0, 2.0, 1.0])}
    kept = kept_channels(graph, scores, widths(graph, 2, 1))
    assert {name: channels.tolist() for name, channels in kept.items()} == {
        first: [1, 2],
        second: [0],
    }


def test_ranks_the_channels_of_all_units_together(graph):
    first, second, _ = (unit.name for unit in graph.units)
    scores = {first: torch.tensor([0.5, 9.0, 0.1, 5.0]), second: torch.tensor([4.0, 8.0, 3.0, 7.0])}
    # Of both: 9 and 8 for the narrowest, then 7, 5, 4, 3, 0.5, 0.1.
    found, kept = ranked(graph, targets(graph, 14), scores)
    assert found == widths(graph, 2, 2)
    assert {name: channels.tolist() for name, channels in kept.items()} == {
        first: [1, 3],
        second: [1, 3],
    }
    found, kept = ranked(graph, targets(graph, 24), scores)
    assert found == widths(graph, 2, 4)
    assert kept[second].tolist() == [0, 1, 2, 3]


def test_a_group_is_worth_the_mean_of_what_it_adds(graph):
    first, second, last = graph.units
    coarse = replace(graph, units=(first, replace(second, choices=(2, 4)), last))
    scores = {
        first.name: torch.tensor([9.0, 4.0, 1.0, 1.0]),
        second.name: torch.tensor([9.0, 9.0, 6.0, 1.0]),
    }
    # (1, 2) costs 10, (2, 2) 14, (1, 4) 18; (6 + 1) / 2 is less than 4
    assert ranked(coarse, targets(graph, 18), scores)[0] == widths(graph, 3, 2)


def test_a_ranking_respects_the_budget_or_refuses_it(graph):
    scores = {unit.name: torch.rand(4) for unit in graph.searchable}
    macs = dmcp.cost(graph, "macs")
    for bound in range(6, 37):
        assert macs.of(ranked(graph, targets(graph, bound), scores)[0]) <= bound
    with pytest.raises(BudgetError):
        ranked(graph, targets(graph, 5), scores)
