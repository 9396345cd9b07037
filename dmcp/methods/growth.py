"""From what each channel group is worth to the widths that fit a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from dmcp.errors import BudgetError
from dmcp.graph import ChannelGraph, ChannelUnit
from dmcp.search import Targets


def grow(
    graph: ChannelGraph,
    targets: Targets,
    worth: Sequence[Sequence[float]],
    start: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Let units grow through their choices, always by the group that is worth most of those that
    still fit, until no group of any unit fits.

    With a worth that falls along each unit this is a global threshold, and then whatever room is
    left below the budget is filled.

    Args:
        graph: its units' ``choices`` are the widths they may take.
        targets: what the structure may cost.
        worth: for every unit of the graph that of each growth, from choices[k] to choices[k + 1].
        start: the widths to grow from, among the choices; the narrowest by default.

    Returns:
        Unit name -> width.

    Raises:
        BudgetError: the structure to grow from exceeds the budget already.
    """
    choices = [unit.choices for unit in graph.units]
    place = [0] * len(choices)
    if start is not None:
        place = [unit.choices.index(start[unit.name]) for unit in graph.units]
    widths = torch.tensor([grid[k] for grid, k in zip(choices, place, strict=True)])
    if not targets.met(widths[None]):
        raise BudgetError("the structure to grow from exceeds the budget already")
    growing = {u for u, grid in enumerate(choices) if len(grid) > 1}
    while True:
        # What does not fit now fits never: everything only grows.
        growing = {u for u in growing if place[u] + 1 < len(choices[u])}
        order = sorted(growing, key=lambda u: (-worth[u][place[u]], u))
        candidates = widths.repeat(len(order), 1)
        for row, u in enumerate(order):
            candidates[row, u] = choices[u][place[u] + 1]
        fits = targets.met(candidates).tolist() if order else []
        growing = {u for u, fit in zip(order, fits, strict=True) if fit}
        if not growing:
            break
        best = order[fits.index(True)]
        place[best] += 1
        widths[best] = choices[best][place[best]]
    return {unit.name: int(width) for unit, width in zip(graph.units, widths, strict=True)}


def even_worth(graph: ChannelGraph) -> list[list[float]]:
    """A worth for `grow` that keeps the shares of all units as equal as it can."""
    return [
        [-(narrow + wide) / (2 * unit.channels) for narrow, wide in pairwise(unit.choices)]
        for unit in graph.units
    ]


def largest(scores: Tensor, unit: ChannelUnit, width: int) -> Tensor:
    """The channels of a unit with the largest scores.

    Args:
        scores: [C // step], one for each step of the unit.
        unit: whose channels.
        width: how many to keep, a multiple of its step.

    Returns:
        int64 [width], ascending.
    """
    steps = scores.argsort(descending=True, stable=True)[: width // unit.step].sort().values
    return (steps[:, None] * unit.step + torch.arange(unit.step, device=steps.device)).flatten()
