"""Counted and measured costs of one network, together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dmcp.cost import Cost, PolynomialCost, TableCost
from dmcp.cost.expectation import Expectation
from dmcp.errors import ConfigError
from dmcp.ops import CostTable, ExpectedCost


@dataclass(frozen=True, eq=False)
class NetCosts:
    """What `MarkovNet.expected_cost` needs to know about costs of which some were measured.

    Attributes:
        polynomials: those that were counted, for the operator.
        measured: those that were measured.
        order: int64 [B], the places of the costs as they were asked for among the polynomials and
            the measured ones behind them.
    """

    polynomials: CostTable
    measured: tuple[Expectation, ...]
    order: Tensor

    def complete(self, expected: ExpectedCost) -> ExpectedCost:
        """What the operator computed, with the measured costs as well."""
        found = [each(expected.q) for each in self.measured]
        means, variances = (torch.stack(values) for values in zip(*found, strict=True))
        return expected._replace(
            cost=torch.cat([expected.cost, means])[self.order],
            variance=torch.cat([expected.variance, variances])[self.order],
        )


def net_costs(
    choices: Sequence[Sequence[int]], costs: Sequence[Cost], device: torch.device
) -> CostTable | NetCosts:
    """The costs of units with these widths; a plain table where all of them were counted."""
    counted = [cost for cost in costs if isinstance(cost, PolynomialCost)]
    measured = [cost for cost in costs if isinstance(cost, TableCost)]
    if len(counted) + len(measured) < len(costs):
        raise ConfigError(f"costs must be polynomials or tables, got {[*map(type, costs)]}")
    table = CostTable.of(choices, [cost.coefficients() for cost in counted], device)
    if not measured:
        return table
    place = {id(cost): number for number, cost in enumerate([*counted, *measured])}
    return NetCosts(
        table,
        tuple(cost.expectation(choices, device) for cost in measured),
        torch.tensor([place[id(cost)] for cost in costs], device=device),
    )
