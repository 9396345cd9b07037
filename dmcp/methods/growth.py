"""From what channels are worth to the widths and channels that fit a budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from dmcp.graph import ChannelGraph, ChannelUnit
from dmcp.search import Targets
from dmcp.search.growth import grow


def even_worth(graph: ChannelGraph) -> list[list[float]]:
    """A worth for `grow` that keeps the shares of all units as equal as it can."""
    return [
        [-(narrow + wide) / (2 * unit.channels) for narrow, wide in pairwise(unit.choices)]
        for unit in graph.units
    ]


def held(graph: ChannelGraph, widths: Mapping[str, int]) -> ChannelGraph:
    """The graph with some units held at one width: the others alone are left to grow."""
    units = (
        replace(unit, choices=(widths[unit.name],)) if unit.name in widths else unit
        for unit in graph.units
    )
    return replace(graph, units=tuple(units))


def ranked(
    graph: ChannelGraph, targets: Targets, scores: Mapping[str, Tensor]
) -> tuple[dict[str, int], dict[str, Tensor]]:
    """One ranking of the channels of all units: those with the largest scores stay.

    A group of channels is worth the mean score of those that it adds, taken in falling order.

    Args:
        graph: its units' ``choices`` are the widths they may take.
        targets: what the structure may cost.
        scores: unit name -> [C // step], every searchable unit, comparable between units.

    Returns:
        Unit name -> width, and unit name -> the channels kept, as `kept_channels`.

    Raises:
        BudgetError: see `grow`.
    """
    worth = [_falling_worth(u, scores[u.name]) if u.searchable else [] for u in graph.units]
    widths = grow(graph, targets, worth)
    return widths, kept_channels(graph, scores, widths)


def _falling_worth(unit: ChannelUnit, scores: Tensor) -> list[float]:
    falling = scores.sort(descending=True).values
    return [
        falling[narrow // unit.step : wide // unit.step].mean().item()
        for narrow, wide in pairwise(unit.choices)
    ]


def kept_channels(
    graph: ChannelGraph, scores: Mapping[str, Tensor], widths: Mapping[str, int]
) -> dict[str, Tensor]:
    """The channels with the largest scores of every searchable unit: unit name -> int64 [width],
    ascending."""
    return {
        unit.name: largest(scores[unit.name], unit, widths[unit.name]) for unit in graph.searchable
    }


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
