"""From what each channel group is worth to the widths that fit a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from dmcp.cost import METRICS
from dmcp.errors import BudgetError
from dmcp.graph import ChannelGraph
from dmcp.search.budget import Targets

CLOSE = 0.99
"""The share of a budget that is used well enough."""

Worth = Sequence[Sequence[float]]
"""For every unit of a graph that of each growth, from choices[k] to choices[k + 1]."""


def fill(
    graph: ChannelGraph, targets: Targets, worth: Worth, start: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Let units grow through their choices, always by the group that is worth most of those that
    fit, until no wider choice of any unit fits.

    With a worth that falls along each unit this is a global threshold, and then whatever room is
    left below the budget is filled. Where no single group fits, several of one unit may: a measured
    latency need not grow with the width. Those that are worth most on average are taken then.

    Args:
        graph: its units' ``choices`` are the widths they may take.
        targets: what the structure may cost.
        worth: see `Worth`.
        start: the widths to grow from, among the choices; the narrowest by default.

    Returns:
        Unit name -> width.

    Raises:
        BudgetError: the structure to grow from exceeds the budget already.
    """
    start = start or {unit.name: unit.choices[0] for unit in graph.units}
    choices = [unit.choices for unit in graph.units]
    place = [unit.choices.index(start[unit.name]) for unit in graph.units]
    widths = torch.tensor([grid[k] for grid, k in zip(choices, place, strict=True)], device="cpu")
    if not targets.met(widths[None]):
        raise BudgetError("the structure to grow from exceeds the budget already")

    def best(groups: range) -> tuple[int, int] | None:
        """The unit, with its next place, that is worth most per group of those that fit after
        growing by so many groups."""
        grown = [(u, k + n) for u, k in enumerate(place) for n in groups if k + n < len(choices[u])]
        grown.sort(key=lambda each: (-_mean(worth[each[0]][place[each[0]] : each[1]]), *each))
        candidates = widths.repeat(len(grown), 1)
        for row, (u, k) in enumerate(grown):
            candidates[row, u] = choices[u][k]
        fits = targets.met(candidates).tolist() if grown else []
        return grown[fits.index(True)] if True in fits else None

    may_fall = any(METRICS[cost.metric].measured for cost in targets.costs)
    one_group, several = range(1, 2), range(2, max(map(len, choices)) if may_fall else 0)
    while found := best(one_group) or best(several):
        u, place[u] = found
        widths[u] = choices[u][place[u]]
    return {unit.name: int(width) for unit, width in zip(graph.units, widths, strict=True)}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def grow(
    graph: ChannelGraph, targets: Targets, worth: Worth, start: Mapping[str, int] | None = None
) -> dict[str, int]:
    """As `fill`, but where more than 1 % of the budget stays unused, one unit gives up its last
    group if others then use the budget better: the group that is worth least of those that bring
    the structure within 1 %, else the one that brings it closest.
    """
    widths = fill(graph, targets, worth, start)
    if _used(targets, widths) >= CLOSE:
        return widths
    places = {u: unit.choices.index(widths[unit.name]) for u, unit in enumerate(graph.units)}
    exchanged = [widths]
    for u in sorted((u for u, k in places.items() if k > 0), key=lambda u: worth[u][places[u] - 1]):
        unit, grid = graph.units[u], graph.units[u].choices[: places[u]]
        held = [*graph.units[:u], replace(unit, choices=grid), *graph.units[u + 1 :]]
        less = {**widths, unit.name: grid[-1]}
        if not targets.met(_row(less)):
            continue  # its last leap was over a width that takes longer
        others = fill(replace(graph, units=tuple(held)), targets, worth, less)
        exchanged.append(fill(graph, targets, worth, others))
        if _used(targets, exchanged[-1]) >= CLOSE:
            return exchanged[-1]
    return max(exchanged, key=lambda each: _used(targets, each))


def _used(targets: Targets, widths: Mapping[str, int]) -> float:
    """The share of the tightest bound that a structure uses."""
    return float(targets.largest_ratio(_row(widths)))


def _row(widths: Mapping[str, int]) -> torch.Tensor:
    """A structure as costs take it: int64 [1, U]."""
    return torch.tensor([list(widths.values())], device="cpu")
