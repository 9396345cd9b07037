"""Widths that follow the hardware's steps."""

from __future__ import annotations

from dataclasses import replace

import torch

from dmcp.cost import Cost
from dmcp.graph import ChannelGraph, ChannelUnit


def on_steps(graph: ChannelGraph, cost: Cost) -> ChannelGraph:
    """The graph with only those choices left for which no wider one is as fast.

    Each unit is looked at by itself, with all others whole. Steps can only be seen between widths
    that were measured, so measure many: ``dmcp bench latency --divisor 1 --groups 64 --points 16``,
    say; the networks to measure grow with the square of the points.
    ``MarkovNet(model, graph=graph, groups=None)`` searches on exactly these widths.

    Args:
        graph: what `dmcp.trace` returned.
        cost: of the same units, as ``dmcp.cost(graph, "latency", table)``.
    """
    full = torch.tensor([unit.channels for unit in graph.units], device="cpu")
    return replace(
        graph,
        units=tuple(_stepped(number, unit, full, cost) for number, unit in enumerate(graph.units)),
    )


def _stepped(number: int, unit: ChannelUnit, full: torch.Tensor, cost: Cost) -> ChannelUnit:
    structures = full.repeat(len(unit.choices), 1)
    structures[:, number] = torch.tensor(unit.choices, device="cpu")
    values = cost.of_many(structures).tolist()
    fastest, kept = float("inf"), []
    for width, value in zip(reversed(unit.choices), reversed(values), strict=True):
        if value < fastest:
            kept.append(width)
            fastest = value
    choices = tuple(reversed(kept))
    if unit.searchable and len(choices) == 1:
        reason = "no narrower width is faster"
        return replace(unit, choices=choices, searchable=False, reason=reason)
    return replace(unit, choices=choices)
