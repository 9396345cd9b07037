"""Which sub-networks a sandwich step trains."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dmcp.search.markov_net import MarkovNet
from dmcp.search.sampling import draw_widths

Widths = dict[str, int]


def narrowest(net: MarkovNet) -> Widths:
    """Every unit at its base."""
    return {unit.name: unit.choices[0] for unit in net.graph.units}


def random_uniform(net: MarkovNet, generator: torch.Generator) -> Widths:
    """Every unit at one of its choices, all equally likely."""
    drawn = torch.rand(len(net.graph.units), generator=generator).tolist()
    return {
        unit.name: unit.choices[int(u * len(unit.choices))]
        for unit, u in zip(net.graph.units, drawn, strict=True)
    }


def random_subnets(
    net: MarkovNet, count: int, uniform_share: float, generator: torch.Generator
) -> Iterator[Widths]:
    """``count`` sub-networks, each uniform with probability ``uniform_share``, else drawn from the
    chains (DMCP, section 3.3: the variant sandwich rule)."""
    for _ in range(count):
        if uniform_share >= 1 or float(torch.rand((), generator=generator)) < uniform_share:
            yield random_uniform(net, generator)
        else:
            yield draw_widths(net, 1, generator)[0]
