"""The chains of a finished search, from its file alone: no model is needed to draw from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dmcp.cost.interpolation import Interpolation
from dmcp.errors import CheckpointError
from dmcp.runs import RunFolder

Widths = NDArray[np.int64]
"""[n, U], in the order of `Chains.units`."""

_DRAWS = 100_000
"""Structures drawn to find those near the budget."""


@dataclass(frozen=True)
class ChainCost:
    """A cost that has a budget.

    Attributes:
        budget: what a structure may cost.
        expected, deviation: of the cost of structures drawn from the chains, exactly.
        function: of the widths: the coefficients of a counted cost, float64 [1 + U, 1 + U], see
            `dmcp.cost.PolynomialCost.coefficients`; a table of a measured one.
    """

    budget: float
    expected: float
    deviation: float
    function: NDArray[np.float64] | Interpolation

    def of(self, widths: Widths) -> NDArray[np.float64]:
        """The costs of structures: [n]."""
        if isinstance(self.function, Interpolation):
            return self.function.of_many(torch.from_numpy(widths)).numpy()
        padded = np.concatenate([np.ones((len(widths), 1)), widths], axis=1)
        return ((padded @ np.triu(self.function)) * padded).sum(1)

    def _fits(self, units: int) -> bool:
        """Whether it is of so many units."""
        if isinstance(self.function, Interpolation):
            return self.function.weights.shape[1:] == (units,)
        return self.function.shape == (1 + units, 1 + units)


@dataclass(frozen=True)
class Chains:
    """What `dmcp.search.Search.describe` says.

    Attributes:
        units: unit -> full width, in order (U of them).
        choices: searchable unit -> its widths, ascending.
        retain: searchable unit -> retain probability of every group but the base.
        costs: metric -> cost.
    """

    units: Mapping[str, int]
    choices: Mapping[str, tuple[int, ...]]
    retain: Mapping[str, NDArray[np.float64]]
    costs: Mapping[str, ChainCost]

    @classmethod
    def read(cls, path: Path) -> Chains:
        """The chains in the file of a search.

        Raises:
            CheckpointError: the file is missing or holds something else.
        """
        data = RunFolder(path.parent).read_json(path.name)
        try:
            chains = _parse(data)
        except (KeyError, TypeError, ValueError, AttributeError):
            chains = None
        if chains is None or not chains._fit():
            raise CheckpointError(f"{path} does not hold the chains of a search")
        return chains

    def draw(self, count: int, generator: np.random.Generator) -> Widths:
        """Markov sampling: structures drawn from the chains."""
        columns = []
        for unit, full in self.units.items():
            if unit not in self.choices:
                columns.append(np.full(count, full))
                continue
            # P(groups kept >= k) is the retain probability of group k, for a walk that ends at the
            # first group it drops as for one number that is compared with all of them.
            kept = (generator.random((count, 1)) < self.retain[unit]).sum(1)
            columns.append(np.array(self.choices[unit])[kept])
        return np.stack(columns, axis=1).astype(np.int64)

    def draw_near_budget(
        self, count: int, tolerance: float, generator: np.random.Generator
    ) -> tuple[Widths, float]:
        """Structures near the budget, of several bounds the tightest.

        Returns:
            At most ``count`` structures, and the tolerance that they meet: where none meets the
            one asked for, it is doubled until one does.
        """
        widths = self.draw(_DRAWS, generator)
        ratios = np.stack([cost.of(widths) / cost.budget for cost in self.costs.values()])
        distance = np.abs(ratios.max(0) - 1)
        while not (near := distance <= tolerance).any():
            tolerance *= 2
        return widths[near][:count], tolerance

    def expected_widths(self) -> dict[str, float]:
        """The expected width of every searchable unit."""
        return {
            unit: grid[0] + float(np.diff(grid) @ self.retain[unit])
            for unit, grid in self.choices.items()
        }

    def _fit(self) -> bool:
        """Whether the parts fit each other, and the probabilities are those of a chain."""
        full = np.array([[*self.units.values()]])
        return (
            self.choices.keys() == self.retain.keys() <= self.units.keys()
            and bool(self.costs)
            and all(cost._fits(len(self.units)) for cost in self.costs.values())
            and all(cost.budget > 0 for cost in self.costs.values())
            and all(np.isfinite(cost.of(full)).all() for cost in self.costs.values())
            and all(metric.isidentifier() for metric in self.costs)  # files are named after them
            and all(_is_chain(q, self.choices[unit]) for unit, q in self.retain.items())
        )


def _parse(data: Mapping[str, Any]) -> Chains:
    costs = {
        metric: ChainCost(
            float(cost["budget"]),
            float(cost["expected"]),
            float(cost["deviation"]),
            _function(cost),
        )
        for metric, cost in data["costs"].items()
    }
    return Chains(
        units={name: int(width) for name, width in data["units"].items()},
        choices={name: tuple(map(int, grid)) for name, grid in data["choices"].items()},
        retain={name: np.array(q, dtype=np.float64) for name, q in data["retain"].items()},
        costs=costs,
    )


def _function(cost: Mapping[str, Any]) -> NDArray[np.float64] | Interpolation:
    if "interpolation" in cost:
        return Interpolation.from_json(cost["interpolation"])
    return np.array(cost["coefficients"], dtype=np.float64)


def _is_chain(retain: NDArray[np.float64], choices: tuple[int, ...]) -> bool:
    """One probability for every choice but the first, none above the one before it."""
    return retain.shape == (len(choices) - 1,) and bool(
        (np.diff(retain, prepend=1, append=0) <= 0).all()
    )
