"""A cost as a polynomial of the unit widths, and its exact mean and variance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dmcp.cost.cost import Cost
from dmcp.graph import ChannelUnit


@dataclass(frozen=True)
class PolynomialCost(Cost):
    """``constant + linear · n + Σ_{u ≤ v} quadratic[u, v] n_u n_v`` of the numbers n of steps that
    the units keep, ``width // step``: the widths themselves where nothing ties channels together.

    Attributes:
        metric: ``"macs"``, ``"params"`` or ``"memory"``.
        units: the units whose widths are the variables, in order (U of them).
        constant: what no width changes.
        linear: int64 [U].
        quadratic: int64 [U, U], upper triangular; the diagonal holds the layers that a unit both
            feeds and is produced by.
    """

    metric: str
    units: tuple[ChannelUnit, ...]
    constant: int
    linear: Tensor
    quadratic: Tensor

    def of(self, widths: Mapping[str, int]) -> int:
        """The exact cost of a structure; units left out of ``widths`` stay whole.

        Raises:
            ConfigError: see `dmcp.graph.check_widths`.
        """
        return int(super().of(widths))

    def of_many(self, widths: Tensor) -> Tensor:
        """The exact costs of many structures: int64 [n, U] -> int64 [n]."""
        self._check_many(widths)
        cpu = widths.cpu()
        cpu = cpu // cpu.new_tensor([unit.step for unit in self.units])
        pairs = (cpu @ self.quadratic * cpu).sum(1)
        return (self.constant + cpu @ self.linear + pairs).to(widths.device)

    def coefficients(self) -> Tensor:
        """The polynomial of the widths as a symmetric matrix K, float64 [1 + U, 1 + U]: with
        c_0 = 1 it is Σ_{i<=j} K_ij c_i c_j. What `dmcp.ops.CostTable` is made of."""
        size = 1 + len(self.units)
        upper = torch.zeros(size, size, dtype=torch.float64, device="cpu")
        upper[0, 0] = self.constant
        upper[0, 1:], upper[1:, 1:] = self._of_widths(torch.float64)
        return upper + upper.triu(1).T

    def describe(self) -> dict[str, Any]:
        """``coefficients``: see `coefficients`."""
        return {"coefficients": self.coefficients().tolist()}

    def _of_widths(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The coefficients of widths rather than steps."""
        steps = torch.tensor([unit.step for unit in self.units], dtype=dtype, device="cpu")
        return self.linear.to(dtype) / steps, self.quadratic.to(dtype) / torch.outer(steps, steps)

    def mean(self, moments: Tensor) -> Tensor:
        """The expected cost of structures whose widths are independent, of any distribution; that
        of Markov chains comes with its gradient from `dmcp.ops.expected_cost`.

        A unit at both ends of a layer enters through E[c²], not E[c]², so this is the mean over all
        structures exactly.

        Args:
            moments: [U, k >= 2] float, E[c_u^(j+1)] in column j.

        Returns:
            0-d tensor of the moments' dtype, differentiable.
        """
        linear, quadratic = self._coefficients(moments)
        first, second = moments[:, 0], moments[:, 1]
        cross = first @ quadratic.triu(1) @ first
        return self.constant + linear @ first + cross + quadratic.diagonal() @ second

    def variance(self, moments: Tensor) -> Tensor:
        """The variance of the cost of structures whose widths are independent.

        With centred widths d_u = c_u - E[c_u] the cost is a constant plus one function of each
        single d_u plus products d_u d_v (u < v), and all of these are uncorrelated.

        Args:
            moments: [U, 4] float, E[c_u^(j+1)] in column j.

        Returns:
            0-d tensor of the moments' dtype, differentiable.
        """
        linear, quadratic = self._coefficients(moments)
        m1, m2, m3, m4 = moments.unbind(1)
        pairs = quadratic.triu(1)
        slope = linear + (pairs + pairs.T) @ m1
        square = quadratic.diagonal()
        variance = m2 - m1**2
        single = (
            slope**2 * variance + 2 * slope * square * (m3 - m1 * m2) + square**2 * (m4 - m2**2)
        )
        return single.sum() + variance @ pairs**2 @ variance

    def _coefficients(self, moments: Tensor) -> tuple[Tensor, Tensor]:
        linear, quadratic = self._of_widths(moments.dtype)
        return linear.to(moments.device), quadratic.to(moments.device)

    def __repr__(self) -> str:
        full = self.of({})
        return f"PolynomialCost({self.metric!r}, {len(self.units)} units, full {full:,})"
