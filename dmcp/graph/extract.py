"""Build the plain, smaller network for given widths."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from dmcp.errors import ConfigError
from dmcp.graph.channel_graph import ChannelGraph, ModuleAxes
from dmcp.graph.units import check_widths


def extract(
    graph: ChannelGraph,
    widths: Mapping[str, int] | None = None,
    *,
    kept: Mapping[str, Tensor | Sequence[int]] | None = None,
) -> nn.Module:
    """The plain network that keeps only some channels, with the traced model's current weights.

    It equals the traced model with the dropped channels zeroed (output weights, biases, weights and
    biases of batch norms). Modules keep their names and classes; the result does not need ``dmcp``.

    Args:
        graph: what `dmcp.trace` returned.
        widths: unit name -> channels to keep, a prefix; units left out stay whole.
        kept: unit name -> indices of the channels to keep, in any order, instead of ``widths``.

    Returns:
        A new module in the training mode of the model; no memory is shared with it.

    Raises:
        ConfigError: both or neither of ``widths`` and ``kept``; unknown units, widths or indices
            out of range, or a change of an unsearchable unit.
    """
    if (widths is None) == (kept is None):
        raise ConfigError("extract: give either widths or kept")
    masks = _prefixes(graph, widths) if widths is not None else _subsets(graph, kept or {})
    model = copy.deepcopy(graph.model)
    for name, axes in graph.modules.items():
        _shrink(model.get_submodule(name), axes, masks)
    return model


def _prefixes(graph: ChannelGraph, widths: Mapping[str, int]) -> dict[int, Tensor]:
    full = check_widths(graph.units, widths)
    return {
        number: torch.arange(unit.channels) < full[unit.name]
        for number, unit in enumerate(graph.units)
    }


def _subsets(graph: ChannelGraph, kept: Mapping[str, Tensor | Sequence[int]]) -> dict[int, Tensor]:
    masks = {}
    numbers = {unit.name: number for number, unit in enumerate(graph.units)}
    for name, indices in kept.items():
        index = torch.as_tensor(indices)
        check_widths(graph.units, {name: len(index.unique())})
        unit = graph.units[numbers[name]]
        is_integer = not index.is_floating_point() and index.dtype != torch.bool
        if not (is_integer and ((index >= 0) & (index < unit.channels)).all()):
            raise ConfigError(f"kept[{name!r}]: indices must be integers in 0..{unit.channels - 1}")
        mask = torch.zeros(unit.channels, dtype=torch.bool)
        mask[index] = True
        masks[numbers[name]] = mask
    return masks


def _shrink(module: nn.Module, axes: ModuleAxes, masks: Mapping[int, Tensor]) -> None:
    """Cut one module's parameters and buffers, in place, to the channels that stay."""
    outputs = axes.outputs.kept(masks)
    if isinstance(module, nn.BatchNorm2d):
        for name in ("weight", "bias", "running_mean", "running_var"):
            _select(module, name, outputs, 0)
        module.num_features = len(outputs)
        return
    _select(module, "weight", outputs, 0)
    _select(module, "bias", outputs, 0)
    inputs = axes.inputs.kept(masks)
    if axes.kind == "dense":
        _select(module, "weight", inputs, 1)
    if isinstance(module, nn.Linear):
        module.in_features, module.out_features = len(inputs), len(outputs)
    elif isinstance(module, nn.Conv2d):
        module.in_channels, module.out_channels = len(inputs), len(outputs)
        module.groups = len(inputs) if axes.kind == "depthwise" else 1


def _select(module: nn.Module, name: str, positions: Tensor, dim: int) -> None:
    tensor = getattr(module, name)
    if tensor is None or tensor.shape[dim] == len(positions):
        return
    smaller = tensor.detach().index_select(dim, positions.to(tensor.device))
    if isinstance(tensor, nn.Parameter):
        setattr(module, name, nn.Parameter(smaller, requires_grad=tensor.requires_grad))
    else:
        setattr(module, name, smaller)
