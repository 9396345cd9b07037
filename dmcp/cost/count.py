"""The costs of a traced network that are counted: MACs, parameters, activation memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import torch

from dmcp.cost.polynomial import PolynomialCost
from dmcp.graph import ChannelGraph
from dmcp.graph.tensors import tensor_of
from dmcp.graph.units import AxisMap


class _Terms:
    """Sums products of channel counts into the coefficients of a polynomial in the numbers of
    steps, width // step, of the units."""

    def __init__(self, units: int) -> None:
        self.constant = 0
        self.linear = torch.zeros(units, dtype=torch.int64, device="cpu")
        self.quadratic = torch.zeros(units, units, dtype=torch.int64, device="cpu")

    def add(self, factor: int, axes: Sequence[AxisMap]) -> None:
        """Add factor times the lengths of at most two axes."""
        fixed, shrinking = factor, []
        for axis in axes:
            if axis.units:
                shrinking.append(axis.counts())
            else:
                fixed *= len(axis.unit)
        constant, units = shrinking[0] if shrinking else (1, {})
        other, others = shrinking[1] if len(shrinking) > 1 else (1, {})
        self.constant += fixed * constant * other
        for u, k in units.items():
            self.linear[u] += fixed * k * other
            for v, m in others.items():
                self.quadratic[min(u, v), max(u, v)] += fixed * k * m
        for v, m in others.items():
            self.linear[v] += fixed * m * constant


def _macs(graph: ChannelGraph, terms: _Terms) -> None:
    for layer in graph.layers:
        terms.add(layer.factor, layer.axes)


def _params(graph: ChannelGraph, terms: _Terms) -> None:
    followed = {id(tensor_of(graph.model, name)): axes for name, axes in graph.tensors.items()}
    for parameter in graph.model.parameters():
        axes = followed.get(id(parameter), (None,) * parameter.ndim)
        sizes = zip(axes, parameter.shape, strict=True)
        fixed = prod(size for axis, size in sizes if axis is None)
        terms.add(fixed, [axis for axis in axes if axis is not None])


def _memory(graph: ChannelGraph, terms: _Terms) -> None:
    for layer in graph.layers:
        terms.add(layer.numbers, layer.outputs)


_COUNTS: dict[str, Callable[[ChannelGraph, _Terms], None]] = {
    "macs": _macs,
    "params": _params,
    "memory": _memory,
}


def count(graph: ChannelGraph, metric: str) -> PolynomialCost:
    """A counted cost as an exact polynomial of the unit widths, see `dmcp.cost.cost`."""
    terms = _Terms(len(graph.units))
    _COUNTS[metric](graph, terms)
    return PolynomialCost(metric, graph.units, terms.constant, terms.linear, terms.quadratic)
