"""What every search does with the chains of a net, whoever trains the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dmcp.errors import ConfigError
from dmcp.ops import ExpectedCost
from dmcp.search.budget import Budget, Targets
from dmcp.search.budget_loss import BudgetLoss
from dmcp.search.markov_net import MarkovNet
from dmcp.search.options import SearchOptions
from dmcp.search.sampling import Samples, draw_widths, expected_widths, sample_within
from dmcp.search.subnets import random_subnets
from dmcp.train.optim import set_lr
from dmcp.train.readback import Snapshot


class ChainSearch:
    """The chains of a `MarkovNet`, their budget, optimizer and schedules, and what they say.

    Args:
        net: what to search.
        budget: what the structure may cost.
        steps: length of the search, which the schedules refer to.
        options: see `SearchOptions`.
        seed: of the sub-networks.

    Raises:
        BudgetError: the network cannot meet the budget, or is below it anyway.
        ConfigError: steps below 1.
    """

    def __init__(
        self, net: MarkovNet, budget: Budget, steps: int, options: SearchOptions | None, seed: int
    ) -> None:
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ConfigError(f"steps must be an int of at least 1, got {steps!r}")
        self.net = net
        self.options = options = options or SearchOptions()
        self.targets: Targets = budget.of(net.graph)
        self.steps = steps
        self.step_index = 0
        self.generator = torch.Generator().manual_seed(seed)
        self.arch_optimizer = _arch_optimizer(net.architecture_parameters(), options)
        self.budget_loss = BudgetLoss(
            options.budget_loss,
            options.budget_weight,
            options.tolerance,
            len(self.targets.bounds),
            net.architecture_parameters()[0].device,
        )
        self._table = net.cost_table(self.targets.costs)
        for chain in net.chains.values():
            chain.reset(options.start)  # type: ignore[operator]
        with torch.no_grad():
            self._first_ratios = self.targets.ratios(self.expected_cost().cost)

    @property
    def warmup_steps(self) -> int:
        """Steps before the first architecture step."""
        return min(round(self.options.warmup * self.steps), self.steps - 1)

    def expected_cost(self) -> ExpectedCost:
        """What the chains say now, with mean and variance of every cost that has a bound; see
        `dmcp.ops.expected_cost`."""
        return self.net.expected_cost(self._table)

    def expected_widths(self) -> dict[str, int]:
        """Expected sampling: on the grid, inside the budget; see `dmcp.search.expected_widths`."""
        return expected_widths(self.net, self.targets)

    def sample_widths(
        self,
        count: int,
        generator: torch.Generator | None = None,
        *,
        tolerance: float | None = None,
        max_draws: int = 1_000_000,
    ) -> Samples:
        """Markov sampling; with a tolerance, only structures that close to the budget.

        Raises:
            SamplingError: no structure within the tolerance was found in ``max_draws`` draws.
        """
        if tolerance is None:
            return draw_widths(self.net, count, generator)
        return sample_within(self.net, self.targets, count, tolerance, generator, max_draws)

    @torch.no_grad()
    def describe(self, targets: Targets | None = None) -> dict[str, Any]:
        """What the chains say, as plain JSON data.

        Args:
            targets: the bounds to hold their costs against, by default those of the search.

        Returns:
            ``costs``: metric -> budget, expected value, standard deviation, and the cost as a
            function of the widths of all units, see `Cost.describe`; ``units``: unit -> full width,
            in that order; ``choices`` and ``retain``: searchable unit -> widths, retain
            probabilities.
        """
        targets = targets or self.targets
        expected = self.net.expected_cost(self.net.cost_table(targets.costs))
        values = zip(expected.cost.tolist(), expected.variance.tolist(), strict=True)
        costs = {
            cost.metric: {
                "budget": bound,
                "expected": mean,
                "deviation": variance**0.5,
                **cost.describe(),
            }
            for cost, bound, (mean, variance) in zip(
                targets.costs, targets.bounds, values, strict=True
            )
        }
        chains = {unit.name: self.net.chain(unit.name) for unit in self.net.graph.searchable}
        return {
            "costs": costs,
            "units": self.net.graph.widths(),
            "choices": {name: chain.choices for name, chain in chains.items()},
            "retain": {name: chain.retain().tolist() for name, chain in chains.items()},
        }

    @torch.no_grad()
    def snapshot(self) -> Snapshot:
        """The chains as they are now, without waiting for the device."""
        choices = {unit.name: unit.choices for unit in self.net.graph.searchable}
        return Snapshot(choices, self.net.retain())

    @contextmanager
    def _architecture_pass(self) -> Iterator[Tensor]:
        """While it is open the net is masked, its weights are frozen, and the gradients of α of
        the last step are gone; gives the budget loss."""
        self.arch_optimizer.zero_grad(set_to_none=True)
        with self._masked_pass(self._begin_architecture_step()) as budget:
            yield budget

    def _begin_architecture_step(self) -> Tensor:
        """Set the learning rate of α; returns by how much the bounds are relaxed now: [B]."""
        done = (self.step_index - self.warmup_steps) / (self.steps - self.warmup_steps)
        set_lr(self.arch_optimizer, self.options.arch_lr.at(done))
        return self._slack(done)

    @contextmanager
    def _masked_pass(self, slack: Tensor) -> Iterator[Tensor]:
        """What is the same in every step: while it is open the net is masked and its weights are
        frozen; gives the budget loss."""
        with _frozen(self.net.weight_parameters()), self.net.masked(self._table) as expected:
            ratios = self.targets.ratios(expected.cost) / slack
            yield self.budget_loss(ratios)
        self.budget_loss.update(ratios)

    def _random_subnets(self) -> Iterator[Mapping[str, Any]]:
        """The random sub-networks of a sandwich step, as ``net.at`` takes them."""
        count = self.options.random_subnets
        return random_subnets(self.net, count, self._uniform_share(), self.generator)

    def _slack(self, done: float) -> Tensor:
        """By how much the bounds are still relaxed: [B], from E / bound at the start down to 1."""
        if done >= self.options.anneal:
            return torch.ones_like(self._first_ratios)
        return self._first_ratios.clamp(min=1) ** (1 - done / self.options.anneal)

    def _uniform_share(self) -> float:
        """The chance that a random sub-network is uniform: 1, then geometric down to the option."""
        done = (self.step_index - self.warmup_steps) / (self.steps - self.warmup_steps)
        return float(self.options.uniform_share ** max(0.0, done))


def _arch_optimizer(
    parameters: Sequence[nn.Parameter], options: SearchOptions
) -> torch.optim.Optimizer:
    lr = options.arch_lr.at(0.0)
    if options.arch_optimizer == "adam":
        return torch.optim.Adam(parameters, lr=lr, fused=True)
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9, nesterov=True, fused=True)


@contextmanager
def _frozen(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """No gradient for these parameters while the context is open, so none is computed."""
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
