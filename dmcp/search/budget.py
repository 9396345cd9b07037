"""Budgets: what a structure may cost."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

import torch
from torch import Tensor

from dmcp.cost import Cost, cost
from dmcp.errors import BudgetError
from dmcp.graph import ChannelGraph

_SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


@dataclass(frozen=True)
class Budget:
    """Upper bounds on costs: one or several of them.

    Each bound is a number (``2.1e8``), a string with a suffix (``"210M"``, ``"1.1G"``), or a share
    of the full network's cost (``"50%"``).

    Attributes:
        macs, params, memory: see `dmcp.cost`.
    """

    macs: str | float | None = None
    params: str | float | None = None
    memory: str | float | None = None

    def __post_init__(self) -> None:
        if not self._bounds():
            raise BudgetError("a budget needs at least one of macs, params, memory")
        for metric, bound in self._bounds().items():
            _parse(metric, bound, full=100)

    def _bounds(self) -> dict[str, str | float]:
        bounds = {"macs": self.macs, "params": self.params, "memory": self.memory}
        return {metric: bound for metric, bound in bounds.items() if bound is not None}

    def of(self, graph: ChannelGraph) -> Targets:
        """The bounds in units of each cost, checked against what the network can reach.

        Raises:
            BudgetError: a bound above the full cost, or below the cost of the narrowest structure.
        """
        narrowest = {unit.name: unit.choices[0] for unit in graph.units}
        costs, bounds = [], []
        for metric, bound in self._bounds().items():
            polynomial = cost(graph, metric)
            full, least = polynomial.of({}), polynomial.of(narrowest)
            target = _parse(metric, bound, full)
            if target > full:
                raise BudgetError(
                    f"budget {metric}={bound!r} is {target:,}, above the full network's {full:,}"
                )
            if target < least:
                raise BudgetError(
                    f"budget {metric}={bound!r} is {target:,}, below the narrowest network's "
                    f"{least:,}"
                )
            costs.append(polynomial)
            bounds.append(target)
        return Targets(tuple(costs), tuple(bounds))


@dataclass(frozen=True)
class Targets:
    """A budget of a particular network.

    Attributes:
        costs: the bounded costs (B of them).
        bounds: the largest accepted value of each.
    """

    costs: tuple[Cost, ...]
    bounds: tuple[int, ...]

    def by_metric(self) -> dict[str, int]:
        """Metric -> bound."""
        return {c.metric: bound for c, bound in zip(self.costs, self.bounds, strict=True)}

    def ratios(self, expected: Tensor) -> Tensor:
        """Expected cost over bound: float64 [B] -> [B], differentiable."""
        return expected / _on_device(self.bounds, expected.device)

    def largest_ratio(self, widths: Tensor) -> Tensor:
        """Cost over bound, the largest over the bounds: int64 [n, U] -> float64 [n]."""
        ratios = [
            cost.of_many(widths).double() / bound
            for cost, bound in zip(self.costs, self.bounds, strict=True)
        ]
        return torch.stack(ratios).amax(0)

    def met(self, widths: Tensor) -> Tensor:
        """Whether structures lie within every bound: int64 [n, U] -> bool [n]."""
        within = [
            cost.of_many(widths) <= bound
            for cost, bound in zip(self.costs, self.bounds, strict=True)
        ]
        return torch.stack(within).all(0)


@cache
def _on_device(bounds: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # whoever asks first: autograd may save it later
        return torch.tensor(bounds, dtype=torch.float64, device=device)


def _parse(metric: str, bound: str | float, full: int) -> int:
    if isinstance(bound, str):
        match = re.fullmatch(r"\s*([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*([KMG%]?)\s*", bound)
        try:
            value = Fraction(match[1]) if match else None
        except ValueError:
            value = None
        if match and value is not None:
            scale = Fraction(full, 100) if match[2] == "%" else _SUFFIXES[match[2]]
            return _positive(metric, bound, value * scale)
    elif isinstance(bound, int | float) and not isinstance(bound, bool):
        return _positive(metric, bound, bound)
    raise BudgetError(
        f"budget {metric} must be a number, or a string such as '210M', '1.1G' or '50%'; "
        f"got {bound!r}"
    )


def _positive(metric: str, bound: str | float, value: float | Fraction) -> int:
    if not 0 < value < float("inf"):
        raise BudgetError(f"budget {metric} must be positive and finite, got {bound!r}")
    return int(value)
