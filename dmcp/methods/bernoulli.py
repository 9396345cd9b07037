"""Independent Bernoulli gates: the ablation of DMCP's Markov chains (DMCP, Guo et al., CVPR 2020).

A gate decides on each channel group alone, p_g = σ(α_g), where a chain multiplies the p of all
groups before. The paper does not say whether the sub-networks of its ablation were prefixes, so
both readings are here. Where the paper says nothing or this departs from it:

- Gates start where every unit's expected width is that of the Markov chain; α = 0 for both, as in
  the paper, would start the Bernoulli net much wider and leave open which difference counts.
- A sub-network that gates draw for a prefix sandwich is the prefix of as many groups.
- A structure keeps the base and the groups with the highest p; where groups differ in size the last
  of them may be kept in part, so that widths are on the same grid as those of all methods.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dmcp.errors import ConfigError
from dmcp.methods.dmcp import DMCP, closest_expected_widths
from dmcp.methods.growth import kept_channels
from dmcp.methods.lab import Lab
from dmcp.methods.method import Pruned
from dmcp.search import MarkovNet, Search
from dmcp.search.bernoulli_net import BernoulliNet
from dmcp.train.readback import HostCopy


@dataclass(frozen=True)
class Bernoulli(DMCP):
    """DMCP with independent gates in place of chains, and nothing else changed.

    Attributes:
        subsets: the random sub-networks of sandwich steps are random subsets of groups, a supernet
            that is not nested; else prefixes as in DMCP, and only the gates differ.

    Raises:
        ConfigError: an option is out of range, or ``sampling`` is not ``"expected"``.
    """

    subsets: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sampling != "expected":
            raise ConfigError(f"sampling must be 'expected' with gates, got {self.sampling!r}")

    def _net(self, lab: Lab, model: nn.Module) -> BernoulliNet:
        recipe, graph = lab.recipe, replace(lab.graph, model=model)
        return BernoulliNet(model, None, recipe.groups, recipe.divisor, graph=graph)

    def _search(self, lab: Lab, net: MarkovNet, label: str) -> Search:
        kind = SubsetSearch if self.subsets else Search
        recipe = lab.recipe
        steps = lab.steps(recipe.search_epochs)
        return kind(net, lab.budgets[label], steps, recipe.search, seed=lab.seed)

    def _pruned(self, lab: Lab, search: Search, label: str) -> Pruned:
        net = search.net
        widths = closest_expected_widths(net, lab.targets[label])
        with torch.no_grad():
            scores = {
                unit.name: net.chain(unit.name).channel_retain()[:: unit.step]
                for unit in net.graph.searchable
            }
        kept = kept_channels(net.graph, scores, widths)
        network = lab.extract(net.graph.model, kept=kept)
        return Pruned(widths, network, kept, search.describe())


class SubsetSearch(Search):
    """A search of a `BernoulliNet` whose random sub-networks are subsets of groups."""

    def _random_subnets(self) -> Iterator[Mapping[str, Any]]:
        assert isinstance(self.net, BernoulliNet)
        count = self.options.random_subnets
        return random_subsets(self.net, count, self._uniform_share(), self.generator)


def random_subsets(
    net: BernoulliNet, count: int, uniform_share: float, generator: torch.Generator
) -> Iterator[dict[str, Tensor]]:
    """``count`` sub-networks, each uniform with probability ``uniform_share``, else drawn from the
    gates as they are now; see `random_subnets`. In a uniform one all widths of a unit are equally
    likely, as among prefixes, and so are all subsets of as many groups."""
    gates = HostCopy(net.transitions())
    groups = torch.tensor([len(unit.choices) - 1 for unit in net.graph.units], device="cpu")
    uniform = (torch.rand(count, generator=generator, device="cpu") < uniform_share).tolist()

    def draw(is_uniform: bool) -> Tensor:
        # A probability that is itself uniform makes the number of groups uniform.
        shares = torch.rand(len(groups), generator=generator, device="cpu").repeat_interleave(
            groups
        )
        p = shares if is_uniform else gates.wait()
        return torch.rand(len(p), generator=generator, device="cpu") < p

    return (net.subset(draw(is_uniform)) for is_uniform in uniform)
