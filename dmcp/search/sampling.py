"""From trained chains to structures: expected sampling and Markov sampling (DMCP, section 3.4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dmcp.errors import ConfigError, SamplingError
from dmcp.search.budget import Targets
from dmcp.search.growth import fill
from dmcp.search.markov_net import MarkovNet

_CHUNK = 4096
"""Structures drawn at a time by rejection sampling."""


@dataclass(frozen=True)
class Samples:
    """Structures drawn from the chains.

    Attributes:
        units: names of the units, in order (U of them).
        widths: int64 [n, U].
        draws: how many structures were drawn to find them.
    """

    units: tuple[str, ...]
    widths: Tensor
    draws: int

    def __len__(self) -> int:
        return len(self.widths)

    def __getitem__(self, number: int) -> dict[str, int]:
        """One structure, unit name -> width."""
        return dict(zip(self.units, self.widths[number].tolist(), strict=True))


@torch.no_grad()
def expected_widths(net: MarkovNet, targets: Targets) -> dict[str, int]:
    """Expected sampling, on the grid and inside the budget.

    Every unit takes the choice nearest to its expected width. Then groups go, the one with the
    lowest retain probability first, until the structure lies within every bound; then groups
    come back, the one with the highest retain probability first, see `fill`.
    """
    choices = [unit.choices for unit in net.graph.units]
    means = net.expected_widths().values()
    q = retain_by_unit(net)
    place = [_nearest(grid, mean) for grid, mean in zip(choices, means, strict=True)]

    def widths(place: list[int]) -> list[int]:
        return [grid[k] for grid, k in zip(choices, place, strict=True)]

    while not targets.met(torch.tensor([widths(place)], dtype=torch.int64, device="cpu")):
        last = [(q[u][k - 1], u) for u, k in enumerate(place) if k > 0]
        place[min(last)[1]] -= 1
    names = [unit.name for unit in net.graph.units]
    return fill(net.graph, targets, q, dict(zip(names, widths(place), strict=True)))


@torch.no_grad()
def draw_widths(net: MarkovNet, count: int, generator: torch.Generator | None = None) -> Samples:
    """Markov sampling: every chain is walked from its base to the first group that is not retained.

    Args:
        net: the chains.
        count: structures to draw.
        generator: on the CPU; the default generator if None.
    """
    return walk_chains(net, net.transitions().cpu(), count, generator)


@torch.no_grad()
def walk_chains(
    net: MarkovNet, transitions: Tensor, count: int, generator: torch.Generator | None = None
) -> Samples:
    """`draw_widths` from what `MarkovNet.transitions` was, on the CPU."""
    choices = [unit.choices for unit in net.graph.units]
    # The zeros after the last group end every chain.
    p = pad_sequence(transitions.split([len(grid) - 1 for grid in choices]), batch_first=True)
    widths_of = [p.new_tensor(widths, dtype=torch.int64) for widths in choices]
    grid = pad_sequence(widths_of, batch_first=True)
    drawn = torch.rand(count, *p.shape, generator=generator, device="cpu")
    kept = net.chain_class.walk(drawn < p).sum(2)
    widths = grid.expand(count, -1, -1).gather(2, kept[:, :, None]).squeeze(2)
    return Samples(tuple(unit.name for unit in net.graph.units), widths, count)


@torch.no_grad()
def sample_within(
    net: MarkovNet,
    targets: Targets,
    count: int,
    tolerance: float,
    generator: torch.Generator | None = None,
    max_draws: int = 1_000_000,
) -> Samples:
    """Markov sampling until ``count`` structures lie within ``tolerance`` of the budget.

    With several bounds the tightest one counts.

    Returns:
        The structures; fewer than ``count`` if ``max_draws`` structures did not hold more.

    Raises:
        SamplingError: none was found; the message says what was.
        ConfigError: ``count`` or ``max_draws`` below 1.
    """
    if count < 1 or max_draws < 1:
        raise ConfigError(f"count and max_draws must be at least 1, got {count} and {max_draws}")
    found: list[Tensor] = []
    closest, draws = float("inf"), 0
    while sum(map(len, found)) < count and draws < max_draws:
        drawn = draw_widths(net, min(_CHUNK, max_draws - draws), generator)
        ratio = targets.largest_ratio(drawn.widths)
        found.append(drawn.widths[(ratio - 1).abs() <= tolerance])
        closest = min(closest, float((ratio - 1).abs().min()))
        draws += len(drawn)
    widths = torch.cat(found)[:count]
    if not len(widths):
        expected = net.expected_cost(net.cost_table(targets.costs))
        mean = float(targets.ratios(expected.cost).max())
        raise SamplingError(
            f"none of {draws:,} sampled structures lies within {tolerance:.1%} of the budget: the "
            f"closest is {closest:.1%} away and their mean is {mean:.1%} of it"
        )
    return Samples(drawn.units, widths, draws)


def _nearest(grid: Sequence[int], mean: float) -> int:
    return min(range(len(grid)), key=lambda place: abs(grid[place] - mean))


def retain_by_unit(net: MarkovNet) -> list[list[float]]:
    """The retain probabilities of every unit's groups, the highest first: the order in which groups
    are kept. Along a chain they fall anyway."""
    lengths = [len(unit.choices) - 1 for unit in net.graph.units]
    return [sorted(part.tolist(), reverse=True) for part in net.retain().split(lengths)]
