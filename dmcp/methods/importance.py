"""What the channels of a network are worth by its weights alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dmcp.graph import ChannelGraph, ChannelUnit, Member
from dmcp.graph.tensors import tensor_of


def producing_weights(graph: ChannelGraph, model: nn.Module, unit: ChannelUnit) -> Iterator[Tensor]:
    """The weights of every dense layer that produces a unit, one row for each step of the unit:
    [C // step, n]. Depthwise layers, norms and biases do not count."""
    for member in unit.members:
        axes = graph.modules.get(member.module)
        if member.role == "out" and (axes is None or axes.kind == "dense"):
            yield from (rows for rows, ndim in _by_step(model, member) if ndim > 1)


def consuming_weights(graph: ChannelGraph, model: nn.Module, unit: ChannelUnit) -> Iterator[Tensor]:
    """The weights of every layer that reads a unit, as `producing_weights`."""
    for member in unit.members:
        if member.role == "in":
            yield from (rows for rows, _ in _by_step(model, member))


def l1_norms(graph: ChannelGraph, model: nn.Module) -> dict[str, Tensor]:
    """Σ|W| of the filters that produce each step of each unit ("Pruning Filters for Efficient
    ConvNets", Li et al., ICLR 2017; summed over all layers that a residual stream ties).

    Args:
        graph: of the network.
        model: the network whose weights count.

    Returns:
        Unit name -> float32 [C // step].
    """
    with torch.no_grad():
        return {
            unit.name: sum(
                (rows.abs().sum(1) for rows in producing_weights(graph, model, unit)),
                torch.zeros(unit.channels // unit.step),
            )
            for unit in graph.units
        }


def _by_step(model: nn.Module, member: Member) -> Iterator[tuple[Tensor, int]]:
    """Of every tensor a member indexes: the part of each step, [C // step, n], and its rank."""
    for name, dim in member.tensors:
        tensor = tensor_of(model, f"{member.module}.{name}" if member.module else name)
        along = tensor.detach().movedim(dim, 0)
        rows = along[member.channels.to(tensor.device)]
        yield rows.reshape(len(rows), -1), tensor.ndim
