"""The baseline every method must beat: the same share of every unit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from dmcp.errors import BudgetError
from dmcp.graph import ChannelGraph
from dmcp.methods.growth import even_worth
from dmcp.methods.lab import Lab
from dmcp.methods.method import Pruned
from dmcp.search import Targets
from dmcp.search.growth import grow


@dataclass(frozen=True)
class Uniform:
    """Equal shares of all units."""

    uses_pretrained: ClassVar[bool] = False

    def find(self, lab: Lab) -> dict[str, Pruned]:
        """See `Method`."""
        return {
            label: Pruned(even_widths(lab.graph, targets)) for label, targets in lab.targets.items()
        }


def even_widths(graph: ChannelGraph, targets: Targets) -> dict[str, int]:
    """`uniform_widths`, but closer to the budget where a coarse grid leaves room below it: units
    may be wider by one group, the narrowest shares first, and one of them narrower by one.

    Raises:
        BudgetError: see `uniform_widths`.
    """
    widths = uniform_widths(graph, targets)
    near = []
    for unit in graph.units:
        place = unit.choices.index(widths[unit.name])
        near.append(replace(unit, choices=unit.choices[max(place - 1, 0) : place + 2]))
    graph = replace(graph, units=tuple(near))
    return grow(graph, targets, even_worth(graph), widths)


def uniform_widths(graph: ChannelGraph, targets: Targets) -> dict[str, int]:
    """The widest structure inside the budget that keeps the same share of every searchable unit.

    Units grow through their ``choices``, always the one whose share is furthest behind, until the
    next growth exceeds the budget; then units that were rounded down are rounded up where that
    fits. So shares are equal but for rounding: to whole channels in a graph as traced, to the grid
    in the graph of a `MarkovNet`.

    Raises:
        BudgetError: every unit at its smallest choice is too much already.
    """
    growths = sorted(
        ((narrower + wider) / (2 * unit.channels), number, wider)
        for number, unit in enumerate(graph.units)
        for narrower, wider in zip(unit.choices, unit.choices[1:], strict=False)
    )

    def grown(count: int) -> list[int]:
        widths = [unit.choices[0] for unit in graph.units]
        for _, number, wider in growths[:count]:
            widths[number] = wider
        return widths

    def fits(widths: list[int]) -> bool:
        return bool(targets.met(torch.tensor([widths], dtype=torch.int64, device="cpu")))

    if not fits(grown(0)):
        raise BudgetError("the narrowest structure exceeds the budget already")
    fitting, exceeding = 0, len(growths) + 1
    while exceeding - fitting > 1:
        middle = (fitting + exceeding) // 2
        if fits(grown(middle)):
            fitting = middle
        else:
            exceeding = middle
    widths = grown(fitting)
    for _, number, wider in growths[fitting:]:
        rounded_down = widths[number] < growths[fitting][0] * graph.units[number].channels
        if rounded_down and fits([*widths[:number], wider, *widths[number + 1 :]]):
            widths[number] = wider
    return {unit.name: width for unit, width in zip(graph.units, widths, strict=True)}
