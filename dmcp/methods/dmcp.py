"""Differentiable Markov channel pruning (DMCP, Guo et al., CVPR 2020), at several budgets from one
warmed-up network."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from dmcp.errors import ConfigError
from dmcp.methods.contest import Contest
from dmcp.methods.lab import Lab
from dmcp.methods.method import Pruned
from dmcp.search import MarkovNet, Search, Targets
from dmcp.search.growth import grow
from dmcp.search.sampling import expected_widths, retain_by_unit, sample_within


@dataclass(frozen=True)
class DMCP:
    """Stage 1 once, then stage 2 for every budget from the same weights.

    Attributes:
        warm_up: ``"sandwich"``, the paper's stage 1; ``"pretrained"``, its ablation (supplement,
            section C): stage 2 starts from the pretrained network.
        sampling: ``"expected"``, the widths nearest to their expectation; ``"markov"``, of
            ``samples`` structures drawn from the chains within ``tolerance`` of the budget the one
            that classifies the held-out images best.
        single_search: search at the largest budget alone and use its chains for all others too:
            groups go by their retain probability until a budget is met.
        samples, tolerance: of Markov sampling.

    Raises:
        ConfigError: an option is out of range.
    """

    warm_up: Literal["sandwich", "pretrained"] = "sandwich"
    sampling: Literal["expected", "markov"] = "expected"
    single_search: bool = False
    samples: int = 5
    tolerance: float = 0.01

    def __post_init__(self) -> None:
        if self.warm_up not in ("sandwich", "pretrained"):
            raise ConfigError(f"warm_up must be 'sandwich' or 'pretrained', got {self.warm_up!r}")
        if self.sampling not in ("expected", "markov"):
            raise ConfigError(f"sampling must be 'expected' or 'markov', got {self.sampling!r}")
        if self.samples < 1:
            raise ConfigError(f"samples must be at least 1, got {self.samples!r}")
        if not 0 < self.tolerance < 1:
            raise ConfigError(f"tolerance must lie in (0, 1), got {self.tolerance!r}")

    @property
    def uses_pretrained(self) -> bool:
        """Whether the pretrained network takes the place of stage 1."""
        return self.warm_up == "pretrained"

    def find(self, lab: Lab) -> dict[str, Pruned]:
        """See `Method`."""
        net = self._net(lab, lab.pretrained() if self.uses_pretrained else lab.fresh())
        warm = self._warm_up(lab, net)
        found: dict[str, Pruned] = {}
        search = None
        for label in lab.budgets:
            if search is None or not self.single_search:
                search = self._search(lab, net, label)
                search.load_state_dict(warm)
                served = None if self.single_search else label
                lab.train(search, "search", passes=search.options.sandwich + 1, budget=served)
            found[label] = self._pruned(lab, search, label)
        return found

    def _net(self, lab: Lab, model: nn.Module) -> MarkovNet:
        return lab.net(model)

    def _search(self, lab: Lab, net: MarkovNet, label: str) -> Search:
        recipe = lab.recipe
        steps = lab.steps(recipe.search_epochs)
        return Search(net, lab.budgets[label], steps, recipe.search, seed=lab.seed)

    def _warm_up(self, lab: Lab, net: MarkovNet) -> dict[str, Any]:
        """The state of a search after stage 1, in which no budget has had a part yet."""
        search = self._search(lab, net, next(iter(lab.budgets)))
        if self.uses_pretrained:
            search.step_index = search.warmup_steps
        else:
            lab.train(WarmUp(search), "warm-up", passes=search.options.sandwich)
        return copy.deepcopy(search.state_dict())

    def _pruned(self, lab: Lab, search: Search, label: str) -> Pruned:
        net, targets = search.net, lab.targets[label]
        if self.sampling == "markov":
            contest = Contest(lab, self._samples(lab, net, targets), partial(_inherit, lab, net))
            lab.run(contest, "samples", budget=label)
            widths = dict(contest.best)
        else:
            widths = closest_expected_widths(net, targets)
        return Pruned(widths, _inherit(lab, net, widths), chains=search.describe(targets))

    def _samples(self, lab: Lab, net: MarkovNet, targets: Targets) -> list[dict[str, int]]:
        # Within the tolerance, but on the inner side of the budget.
        centre = [int(bound * (1 - self.tolerance / 2)) for bound in targets.bounds]
        samples = sample_within(
            net,
            replace(targets, bounds=tuple(centre)),
            self.samples,
            self.tolerance / 2,
            lab.generator(),
        )
        drawn = [samples[number] for number in range(len(samples))]
        return [widths for number, widths in enumerate(drawn) if widths not in drawn[:number]]


def closest_expected_widths(net: MarkovNet, targets: Targets) -> dict[str, int]:
    """`expected_widths`, brought as close to the budget as the structures of other methods."""
    return grow(net.graph, targets, retain_by_unit(net), expected_widths(net, targets))


def _inherit(lab: Lab, net: MarkovNet, widths: Mapping[str, int]) -> nn.Module:
    """The network of these widths with the weights of the search."""
    return lab.extract(net.graph.model, widths)


class WarmUp:
    """Stage 1 of a search as a stage of its own."""

    def __init__(self, search: Search) -> None:
        self.search = search
        self.steps = search.warmup_steps

    @property
    def step_index(self) -> int:
        return self.search.step_index

    def step(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return self.search.step(images, labels)

    def state_dict(self) -> dict[str, Any]:
        return self.search.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.search.load_state_dict(state)
