"""The costs of a traced network: MACs, parameters, activation memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from dmcp.cost.polynomial import Cost
from dmcp.errors import ConfigError
from dmcp.graph import ChannelGraph
from dmcp.graph.units import AxisMap


class _Terms:
    """Sums products of channel counts into the coefficients of a polynomial."""

    def __init__(self, units: int) -> None:
        self.units = units
        self.constant = 0
        self.linear = torch.zeros(units, dtype=torch.int64)
        self.quadratic = torch.zeros(units, units, dtype=torch.int64)

    def add(self, factor: int, axis: AxisMap) -> None:
        """Add factor * (channels of ``axis``)."""
        constant, per_unit = axis.counts(self.units)
        self.constant += factor * constant
        for unit, count in per_unit.items():
            self.linear[unit] += factor * count

    def add_product(self, factor: int, left: AxisMap, right: AxisMap) -> None:
        """Add factor * (channels of ``left``) * (channels of ``right``)."""
        left_constant, left_units = left.counts(self.units)
        self.add(factor * left_constant, right)
        right_constant, right_units = right.counts(self.units)
        for u, k in left_units.items():
            self.linear[u] += factor * k * right_constant
            for v, m in right_units.items():
                self.quadratic[min(u, v), max(u, v)] += factor * k * m


def _macs(graph: ChannelGraph, terms: _Terms) -> None:
    for layer in graph.layers:
        axes = graph.modules[layer.module]
        factor = layer.kernel * layer.positions
        if axes.kind == "depthwise":
            terms.add(factor, axes.outputs)
        else:
            terms.add_product(factor, axes.inputs, axes.outputs)


def _params(graph: ChannelGraph, terms: _Terms) -> None:
    kernels = {layer.module: layer.kernel for layer in graph.layers}
    for name, axes in graph.modules.items():
        module = graph.model.get_submodule(name)
        if axes.kind == "dense":
            terms.add_product(kernels[name], axes.inputs, axes.outputs)
        elif axes.kind == "depthwise":
            terms.add(kernels[name], axes.outputs)
        vectors = [module.bias] if axes.kind != "norm" else [module.weight, module.bias]
        terms.add(sum(isinstance(vector, nn.Parameter) for vector in vectors), axes.outputs)


def _memory(graph: ChannelGraph, terms: _Terms) -> None:
    for layer in graph.layers:
        terms.add(layer.positions, graph.modules[layer.module].outputs)


_METRICS: dict[str, Callable[[ChannelGraph, _Terms], None]] = {
    "macs": _macs,
    "params": _params,
    "memory": _memory,
}


def cost(graph: ChannelGraph, metric: str = "macs") -> Cost:
    """A cost of the traced network as an exact polynomial of its unit widths.

    Args:
        graph: what `dmcp.trace` returned.
        metric: ``"macs"``, multiply–accumulates of convolutions and linear layers per image,
            without bias, batch norm, activations and pooling, at the image size of the trace;
            ``"params"``, trainable numbers of the model; ``"memory"``, numbers written by
            convolutions and linear layers per image (the activations that training keeps).

    Raises:
        ConfigError: an unknown metric.
    """
    if metric not in _METRICS:
        raise ConfigError(f"metric must be one of {list(_METRICS)}, got {metric!r}")
    terms = _Terms(len(graph.units))
    _METRICS[metric](graph, terms)
    return Cost(metric, graph.units, terms.constant, terms.linear, terms.quadratic)
