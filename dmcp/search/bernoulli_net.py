"""The user's network with an independent gate on every channel group in place of Markov chains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dmcp.errors import ConfigError
from dmcp.nn import MarkovChain
from dmcp.ops import CostTable, ExpectedCost
from dmcp.search.markov_net import MarkovNet
from dmcp.search.net_costs import NetCosts


class BernoulliChain(MarkovChain):
    """Channel groups that are retained independently, group k with probability sigmoid(alpha_k).

    No group needs the one before it, so what a unit keeps is a subset of its groups, and the base.
    Where a prefix stands for it (`sample`, ``width``), it has as many groups.

    Attributes:
        selection: the channels computed now, int64 on the CPU, ascending; None for a prefix.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.selection: Tensor | None = None

    def reset(self, start: float) -> None:
        """Set every probability to the one with which the expected width is that of a Markov chain
        whose transition probabilities are ``start``."""
        sizes = [wide - narrow for narrow, wide in pairwise(self.choices)]
        expected = sum(size * start**k for k, size in enumerate(sizes, 1))
        super().reset(expected / sum(sizes))

    def keep(self) -> slice | Tensor | None:
        return super().keep() if self.selection is None else self.selection

    def retain(self) -> Tensor:
        """p [G]: probability that a group is retained."""
        return self.transition()

    @staticmethod
    def walk(passed: Tensor) -> Tensor:
        """Every group that passes is retained."""
        return passed

    def channels_of(self, groups: Tensor) -> Tensor:
        """The channels of the base and of some groups: bool [G] -> int64, ascending; on the CPU."""
        kept = torch.cat([groups.new_ones(1), groups])
        sizes = torch.tensor([0, *self.choices], device="cpu").diff()
        return kept.repeat_interleave(sizes).nonzero().flatten()


class BernoulliNet(MarkovNet):
    """A `MarkovNet` whose groups have independent gates.

    With group sizes s_g and probabilities p_g a width has the mean b + Σ s_g p_g and the variance
    Σ s_g² p_g (1 - p_g). Cumulants of independent variables add up; the first four give the moments
    and with them mean and variance of every cost exactly, as in `dmcp.ops.expected_cost`. In plain
    PyTorch and float64: a baseline needs no kernel of its own.

    Args:
        arguments, options: as `MarkovNet`.
    """

    chain_class = BernoulliChain
    _group_sizes: Tensor
    _bases: Tensor
    _group_of: Tensor

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        units = self.graph.units
        sizes = [torch.tensor(unit.choices, device="cpu").diff()[None] for unit in units]
        first, group_of = 0, []
        for unit in units:
            channels = torch.arange(unit.channels, device="cpu")
            choice = torch.searchsorted(
                torch.tensor(unit.choices, device="cpu"), channels, right=True
            )
            group_of.append(torch.where(choice == 0, 0, first + choice))
            first += len(unit.choices) - 1
        device = self.architecture_parameters()[0].device
        buffers = {
            "_group_sizes": torch.block_diag(*sizes),
            "_bases": torch.tensor([unit.choices[0] for unit in units], device="cpu"),
            "_group_of": torch.cat(group_of),
        }
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer.to(device), persistent=False)

    @contextmanager
    def at(self, widths: Mapping[str, int | Tensor] | None = None) -> Iterator[None]:
        """As `MarkovNet.at`; a unit may also be given the channels that it keeps, as
        `BernoulliChain.channels_of` returns them."""
        structure = widths or {}
        counts = {n: len(k) if isinstance(k, Tensor) else k for n, k in structure.items()}
        before = {name: chain.selection for name, chain in self._gates()}
        with super().at(counts):
            try:
                self._select({n: k for n, k in structure.items() if isinstance(k, Tensor)})
                yield
            finally:
                self._select(before)

    def expected_cost(self, table: CostTable | NetCosts | None = None) -> ExpectedCost:
        """See `MarkovNet.expected_cost`; ``q`` and ``scale`` are probabilities of gates here.

        Raises:
            ConfigError: a measured cost: the kept groups of a unit need not be the first ones.
        """
        if isinstance(table, NetCosts):
            raise ConfigError("a budget of latency needs Markov chains, not Bernoulli gates")
        coefficients = (table or self._table).coefficients
        alpha = torch.cat([*self.architecture_parameters()])
        p, dropped = alpha.double().sigmoid(), (-alpha.double()).sigmoid()
        spread = p * dropped
        sizes = self._group_sizes.double()
        mean = self._bases + sizes @ p
        k2 = sizes**2 @ spread
        k3 = sizes**3 @ (spread * (dropped - p))
        k4 = sizes**4 @ (spread * (1 - 6 * spread))

        leading = torch.cat([mean.new_ones(1), mean])
        diagonal = coefficients.diagonal(dim1=1, dim2=2)
        gradient = (coefficients * leading).sum(2) + diagonal * leading
        slope, square = gradient[:, 1:], diagonal[:, 1:]
        pairs = (coefficients - torch.diag_embed(diagonal))[:, 1:, 1:]
        # E[(s d + K (d² - E[d²]))²] of each unit, where E[d⁴] = k4 + 3 k2².
        single = slope**2 * k2 + 2 * slope * square * k3 + square**2 * (k4 + 2 * k2**2)
        variance = single.sum(1) + 0.5 * (pairs**2 * k2 * k2[:, None]).sum((1, 2))
        return ExpectedCost(
            q=p.to(alpha.dtype),
            scale=torch.cat([p.new_ones(1), p])[self._group_of].to(alpha.dtype),
            moments=torch.stack(
                [
                    mean,
                    k2 + mean**2,
                    k3 + 3 * k2 * mean + mean**3,
                    k4 + 3 * k2**2 + 4 * k3 * mean + 6 * k2 * mean**2 + mean**4,
                ]
            ),
            cost=0.5 * (gradient * leading).sum(1) + (square * k2).sum(1),
            variance=variance.clamp(min=0),
        )

    def retain(self) -> Tensor:
        """p of all groups in the order of the units: [T], differentiable."""
        return torch.cat([*self.architecture_parameters()]).sigmoid()

    def subset(self, groups: Tensor) -> dict[str, Tensor]:
        """The sub-network of some groups, as `at` takes it: bool [T] on the CPU, in the order of
        the units -> unit name -> channels."""
        parts = groups.split([len(chain.choices) - 1 for _, chain in self._gates()])
        return {
            name: chain.channels_of(part)
            for (name, chain), part in zip(self._gates(), parts, strict=True)
        }

    def _gates(self) -> Iterator[tuple[str, BernoulliChain]]:
        for name, chain in self._named_chains():
            assert isinstance(chain, BernoulliChain)
            yield name, chain

    def _select(self, selections: Mapping[str, Tensor | None]) -> None:
        for name, chain in self._gates():
            chain.selection = _unless_prefix(selections.get(name))
        self._set_tracking()


def _unless_prefix(kept: Tensor | None) -> Tensor | None:
    """A prefix is what a width says, and costs no copies of weights."""
    return None if kept is None or int(kept[-1]) == len(kept) - 1 else kept
