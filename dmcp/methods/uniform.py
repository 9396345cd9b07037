"""The baseline every method must beat: the same share of every unit."""

from __future__ import annotations

import torch

from dmcp.errors import BudgetError
from dmcp.graph import ChannelGraph
from dmcp.search import Targets

_HALVINGS = 40


def uniform_widths(graph: ChannelGraph, targets: Targets) -> dict[str, int]:
    """The widest structure that keeps the same share of every searchable unit inside the budget.

    Widths are rounded to whole channels, not to a grid, so that the structure meets the budget
    closely; the share is found by bisection.

    Raises:
        BudgetError: one channel per unit is too much already.
    """

    def structure(share: float) -> dict[str, int]:
        widths = {u.name: max(1, round(share * u.channels)) for u in graph.searchable}
        return graph.widths() | widths

    def fits(share: float) -> bool:
        widths = list(structure(share).values())
        return bool(targets.met(torch.tensor([widths], dtype=torch.int64)))

    if fits(1.0):
        return structure(1.0)
    if not fits(0.0):
        raise BudgetError("one channel per unit exceeds the budget already")
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return structure(low)
