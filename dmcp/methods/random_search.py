"""Random structures, the control for every search: the best of a few that meet the budget
("Revisiting Random Channel Pruning", Li et al., CVPR 2022; candidates are judged as in "EagleEye",
Li et al., ECCV 2020: filters inherited by their L1 norm, then batch norms calibrated).

EagleEye draws the shares that layers keep from [0.3, 1] for half of the MACs and throws structures
away until one meets the budget. Here drawn shares are scaled until they meet it: the shares of any
two units are in the ratio drawn, save for the grid and for units that are full or at their base;
then room below the budget is filled, as for all methods.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from dmcp.errors import ConfigError
from dmcp.graph import ChannelGraph
from dmcp.methods.contest import Contest
from dmcp.methods.growth import even_worth, kept_channels
from dmcp.methods.importance import l1_norms
from dmcp.methods.lab import Lab
from dmcp.methods.method import Pruned
from dmcp.search import Targets
from dmcp.search.growth import grow


@dataclass(frozen=True)
class RandomSearch:
    """Of random structures at the budget, the one that classifies the held-out images best with the
    pretrained network's filters.

    Attributes:
        samples: structures for each budget.
        least_share: shares of units are drawn from [least_share, 1], before all are scaled alike.

    Raises:
        ConfigError: an option is out of range.
    """

    samples: int = 20
    least_share: float = 0.3

    uses_pretrained: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ConfigError(f"samples must be at least 1, got {self.samples!r}")
        if not 0 < self.least_share <= 1:
            raise ConfigError(f"least_share must lie in (0, 1], got {self.least_share!r}")

    def find(self, lab: Lab) -> dict[str, Pruned]:
        """See `Method`."""
        model = lab.pretrained()
        norms = l1_norms(lab.graph, model)

        def network(widths: Mapping[str, int]) -> nn.Module:
            return lab.extract(model, kept=kept_channels(lab.graph, norms, widths))

        found = {}
        for label, targets in lab.targets.items():
            structures = random_structures(
                lab.graph, targets, self.samples, self.least_share, lab.generator()
            )
            contest = Contest(lab, structures, network)
            lab.run(contest, "contest", budget=label)
            details = {"structures": structures, "accuracies": contest.accuracies}
            found[label] = Pruned(contest.best, network(contest.best), details=details)
        return found


PAPER = RandomSearch(samples=1000)
"""As many as EagleEye judges; it calibrates each with more batches than `Lab.calibrate`."""


def random_structures(
    graph: ChannelGraph,
    targets: Targets,
    count: int,
    least_share: float,
    generator: torch.Generator,
) -> list[dict[str, int]]:
    """Different structures with random shares, each filling the budget.

    Returns:
        ``count`` of them; fewer if ten times as many draws did not give more.
    """
    even = even_worth(graph)
    found: list[dict[str, int]] = []
    for _ in range(10 * count):
        drawn = torch.rand(len(graph.units), generator=generator, device="cpu")
        shares = (least_share + (1 - least_share) * drawn).tolist()
        # Even worth falls with the width: divided by shares, units grow in proportion to them.
        worth = [[value / share for value in row] for row, share in zip(even, shares, strict=True)]
        widths = grow(graph, targets, worth)
        if widths not in found:
            found.append(widths)
        if len(found) == count:
            break
    return found
