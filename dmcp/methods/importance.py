"""What the channels of a network are worth by its weights alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dmcp.graph import ChannelGraph, ChannelUnit, Member
from dmcp.graph.tensors import tensor_of


def producers(graph: ChannelGraph, unit: ChannelUnit) -> list[str]:
    """Qualified names of the weights with which dense layers produce a unit: one, or all that a
    residual stream ties. Depthwise layers, norms and other scales only scale it."""
    names = [_qualified(member, name) for member, name, _ in _of_dense(graph, unit)]
    return [name for name in names if len(graph.tensors[name]) > 1]


def _of_dense(graph: ChannelGraph, unit: ChannelUnit) -> Iterator[tuple[Member, str, int]]:
    """Weights and biases of the dense layers that produce a unit: member, name, dimension."""
    dense = {name for node in graph.nodes if node.kind == "dense" for name in node.parameters}
    for member in unit.members:
        if member.role == "out":
            for name, dim in member.tensors:
                if _qualified(member, name) in dense:
                    yield member, name, dim


def producing_weights(graph: ChannelGraph, model: nn.Module, unit: ChannelUnit) -> Iterator[Tensor]:
    """The weights of every dense layer that produces a unit, one row for each step of the unit:
    [C // step, n]. Depthwise layers, norms and biases do not count."""
    for member, name, dim in _of_dense(graph, unit):
        weight = tensor_of(model, _qualified(member, name))
        if weight.ndim > 1:
            yield _rows(weight, dim, member.channels)


def unit_filters(graph: ChannelGraph, model: nn.Module, unit: ChannelUnit) -> Tensor:
    """`producing_weights` side by side: the filters of all layers that produce a step, as one."""
    # A unit may be produced by none.
    nothing = torch.empty(unit.channels // unit.step, 0)
    return torch.cat([nothing, *producing_weights(graph, model, unit)], 1)


def filter_places(
    graph: ChannelGraph, model: nn.Module, unit: ChannelUnit, steps: Tensor
) -> Iterator[tuple[Tensor, int, Tensor]]:
    """Where the filters that produce some steps of a unit lie, biases included: a parameter, a
    dimension of it, and positions along that."""
    for member, name, dim in _of_dense(graph, unit):
        tensor = tensor_of(model, _qualified(member, name))
        yield tensor, dim, member.channels[steps].flatten().to(tensor.device)


def consuming_weights(graph: ChannelGraph, model: nn.Module, unit: ChannelUnit) -> Iterator[Tensor]:
    """The weights of every layer that reads a unit, as `producing_weights`."""
    for member in unit.members:
        if member.role == "in":
            yield from (rows for _, rows, _ in _by_step(model, member))


def norm_scales(graph: ChannelGraph, model: nn.Module, unit: ChannelUnit) -> Iterator[Tensor]:
    """γ of every norm of a unit, as `producing_weights`."""
    for member in unit.members:
        if (axes := graph.modules.get(member.module)) is not None and axes.kind == "norm":
            yield from (rows for name, rows, _ in _by_step(model, member) if name == "weight")


def depthwise_weights(graph: ChannelGraph, model: nn.Module, unit: ChannelUnit) -> Iterator[Tensor]:
    """The weights of every depthwise layer of a unit, as `producing_weights`."""
    for member in unit.members:
        if (axes := graph.modules.get(member.module)) is not None and axes.kind == "depthwise":
            yield from (rows for _, rows, ndim in _by_step(model, member) if ndim > 1)


def l1_norms(graph: ChannelGraph, model: nn.Module) -> dict[str, Tensor]:
    """Σ|W| of the filters that produce each step of each unit ("Pruning Filters for Efficient
    ConvNets", Li et al., ICLR 2017; summed over all layers that a residual stream ties).

    Args:
        graph: of the network.
        model: the network whose weights count.

    Returns:
        Unit name -> float32 [C // step], on the CPU.
    """
    with torch.no_grad():
        return {
            unit.name: sum(
                (rows.abs().sum(1) for rows in producing_weights(graph, model, unit)),
                torch.zeros(unit.channels // unit.step),
            )
            for unit in graph.units
        }


def _by_step(model: nn.Module, member: Member) -> Iterator[tuple[str, Tensor, int]]:
    """Of every tensor a member indexes: its name, the part of each step, and its rank."""
    for name, dim in member.tensors:
        tensor = tensor_of(model, _qualified(member, name))
        yield name, _rows(tensor, dim, member.channels), tensor.ndim


def _rows(tensor: Tensor, dim: int, channels: Tensor) -> Tensor:
    """The part of a tensor that each row of ``channels`` indexes: [C // step, n], on the CPU."""
    along = tensor.detach().movedim(dim, 0)
    return along[channels.to(tensor.device)].cpu().reshape(len(channels), -1)


def _qualified(member: Member, name: str) -> str:
    return f"{member.module}.{name}" if member.module else name
