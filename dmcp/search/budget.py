"""Budgets: what a structure may cost."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmcp.cost import METRICS, TABLE, Cost, LatencyTable, Metric
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
        latency_ms: milliseconds, or a share of the full network's.
        latency_table: what was measured, or the file that holds it; read at once. Without a bound
            on the latency it counts for nothing.

    Raises:
        BudgetError: no bound, or one that is malformed.
        ConfigError: the file is missing or holds something else.
    """

    macs: str | float | None = None
    params: str | float | None = None
    memory: str | float | None = None
    latency_ms: str | float | None = None
    latency_table: LatencyTable | str | Path = TABLE

    def __post_init__(self) -> None:
        if not self._bounds():
            known = ", ".join(metric.bound for metric in METRICS.values())
            raise BudgetError(f"a budget needs at least one of {known}")
        for metric, bound in self._bounds().items():
            _parse(METRICS[metric], bound, full=100)
        if self.latency_ms is not None and not isinstance(self.latency_table, LatencyTable):
            object.__setattr__(self, "latency_table", LatencyTable.read(self.latency_table))

    def _bounds(self) -> dict[str, str | float]:
        bounds = {name: getattr(self, metric.bound) for name, metric in METRICS.items()}
        return {name: bound for name, bound in bounds.items() if bound is not None}

    def to_json(self) -> dict[str, Any]:
        """The bounds as plain JSON data; of a latency table, the hash of what it holds."""
        data = {"macs": self.macs, "params": self.params, "memory": self.memory}
        if self.latency_ms is not None and isinstance(self.latency_table, LatencyTable):
            data |= {"latency_ms": self.latency_ms, "latency_table": self.latency_table.digest}
        return data

    def of(self, graph: ChannelGraph) -> Targets:
        """The bounds in units of each cost, checked against what the network can reach.

        Raises:
            BudgetError: a bound above the full cost, or below the cost of the narrowest structure.
            ConfigError: the latency table is of another network.
        """
        narrowest = {unit.name: unit.choices[0] for unit in graph.units}
        costs, bounds = [], []
        for name, bound in self._bounds().items():
            metric = METRICS[name]
            function = metric.of(graph, self.latency_table)
            full, least = function.of({}), function.of(narrowest)
            target = _parse(metric, bound, full)
            if target > full:
                raise BudgetError(
                    f"budget {metric.bound}={bound!r} is {_text(target)}, above the full network's "
                    f"{_text(full)}"
                )
            if target < least:
                raise BudgetError(
                    f"budget {metric.bound}={bound!r} is {_text(target)}, below the narrowest "
                    f"network's {_text(least)}"
                )
            costs.append(function)
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
    bounds: tuple[float, ...]

    def by_metric(self) -> dict[str, float]:
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
def _on_device(bounds: tuple[float, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # whoever asks first: autograd may save it later
        return torch.tensor(bounds, dtype=torch.float64, device=device)


def _parse(metric: Metric, bound: str | float, full: float) -> float:
    if isinstance(bound, str):
        match = re.fullmatch(r"\s*([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*([KMG%]?)\s*", bound)
        try:
            value = Fraction(match[1]) if match else None
        except ValueError:
            value = None
        if match and value is not None:
            scale = Fraction(full) / 100 if match[2] == "%" else _SUFFIXES[match[2]]
            return _positive(metric, bound, value * scale)
    elif isinstance(bound, int | float) and not isinstance(bound, bool):
        return _positive(metric, bound, bound)
    raise BudgetError(
        f"budget {metric.bound} must be a number, or a string such as '210M', '1.1G' or '50%'; "
        f"got {bound!r}"
    )


def _positive(metric: Metric, bound: str | float, value: float | Fraction) -> float:
    if not 0 < value <= sys.float_info.max:
        raise BudgetError(f"budget {metric.bound} must be positive and finite, got {bound!r}")
    return float(value) if metric.measured else int(value)


def _text(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
