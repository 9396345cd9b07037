"""Which sub-networks a sandwich step trains."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dmcp.search.markov_net import MarkovNet
from dmcp.search.sampling import walk_chains
from dmcp.train.readback import HostCopy

Widths = dict[str, int]


def narrowest(net: MarkovNet) -> Widths:
    """Every unit at its base."""
    return {unit.name: unit.choices[0] for unit in net.graph.units}


def random_uniform(net: MarkovNet, generator: torch.Generator) -> Widths:
    """Every unit at one of its choices, all equally likely."""
    drawn = torch.rand(len(net.graph.units), generator=generator, device="cpu").tolist()
    return {
        unit.name: unit.choices[int(u * len(unit.choices))]
        for unit, u in zip(net.graph.units, drawn, strict=True)
    }


def random_subnets(
    net: MarkovNet, count: int, uniform_share: float, generator: torch.Generator
) -> Iterator[Widths]:
    """``count`` sub-networks, each uniform with probability ``uniform_share``, else drawn from the
    chains as they are now (DMCP, section 3.3: the variant sandwich rule).

    The chains are read from the device when the first sub-network that needs them is asked for;
    until then a copy is on its way, and nobody has waited for it.
    """
    drawn = torch.rand(count, generator=generator, device="cpu").tolist()
    uniform = [uniform_share >= 1 or u < uniform_share for u in drawn]
    transitions = None if all(uniform) else HostCopy(net.transitions())

    def draw() -> Iterator[Widths]:
        for is_uniform in uniform:
            if is_uniform or transitions is None:
                yield random_uniform(net, generator)
            else:
                yield walk_chains(net, transitions.wait(), 1, generator)[0]

    return draw()
