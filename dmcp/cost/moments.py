"""Moments of the widths that a set of Markov chains draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ChainLayout:
    """Where the chains of several units lie in one concatenated vector.

    Attributes:
        offsets: int32 [U + 1], chain u holds the groups offsets[u] … offsets[u + 1] - 1.
        unit: int64 [T], the unit of each group.
        base: float64 [U], the width that is always kept.
        below: float64 [T], the unit's width without the group (and those above it).
        above: float64 [T], the unit's width with the group.
    """

    offsets: Tensor
    unit: Tensor
    base: Tensor
    below: Tensor
    above: Tensor

    @staticmethod
    def of(choices: Sequence[Sequence[int]]) -> ChainLayout:
        """The layout of chains over these width grids: base first, full width last. A unit with one
        choice has an empty chain."""
        lengths = torch.tensor([len(grid) - 1 for grid in choices])
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        below = [float(width) for grid in choices for width in grid[:-1]]
        above = [float(width) for grid in choices for width in grid[1:]]
        return ChainLayout(
            offsets=offsets.to(torch.int32),
            unit=torch.arange(len(choices)).repeat_interleave(lengths),
            base=torch.tensor([float(grid[0]) for grid in choices], dtype=torch.float64),
            below=torch.tensor(below, dtype=torch.float64),
            above=torch.tensor(above, dtype=torch.float64),
        )

    def to(self, device: torch.device) -> ChainLayout:
        """The same layout on another device."""
        return ChainLayout(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


def width_moments(q: Tensor, layout: ChainLayout, orders: int = 2) -> Tensor:
    """E[c], E[c²], … of every unit's width under its chain, in closed form.

    Retained groups are a prefix, so c^j telescopes: E[c^j] = b^j + Σ_k q_k (above_k^j - below_k^j);
    j = 1 is the paper's expected width b + Σ s_k q_k.

    Args:
        q: retain probabilities of all chains, concatenated: [T], float.
        layout: of the same chains.
        orders: how many moments.

    Returns:
        float64 [U, orders], differentiable in ``q``.
    """
    powers = torch.arange(1, orders + 1, device=q.device)
    steps = layout.above[:, None] ** powers - layout.below[:, None] ** powers
    terms = q.double()[:, None] * steps
    return (layout.base[:, None] ** powers).index_add(0, layout.unit, terms)
