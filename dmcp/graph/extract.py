"""Build the plain, smaller network for given widths."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from dmcp.errors import ConfigError
from dmcp.graph.channel_graph import ChannelGraph
from dmcp.graph.tensors import known_as, tensor_of
from dmcp.graph.units import AxisMap, check_widths


def extract(
    graph: ChannelGraph,
    widths: Mapping[str, int] | None = None,
    *,
    kept: Mapping[str, Tensor | Sequence[int]] | None = None,
) -> nn.Module:
    """The plain network that keeps only some channels, with the traced model's current weights.

    It equals the traced model with the dropped channels zeroed (output weights, biases, weights and
    biases of norms). Modules keep their names, classes and code; the result does not need ``dmcp``.

    Args:
        graph: what `dmcp.trace` returned.
        widths: unit name -> channels to keep, a prefix; units left out stay whole.
        kept: unit name -> indices of the channels to keep, in any order, instead of ``widths``;
            channels of one step are kept together.

    Returns:
        A new module in the training mode of the model; no memory is shared with it.

    Raises:
        ConfigError: both or neither of ``widths`` and ``kept``; unknown units, widths or indices
            out of range, a change of an unsearchable unit; or the model is no longer the one that
            was traced.
    """
    return extract_steps(graph, kept_steps(graph, widths, kept))


def kept_steps(
    graph: ChannelGraph,
    widths: Mapping[str, int] | None,
    kept: Mapping[str, Tensor | Sequence[int]] | None,
) -> dict[int, Tensor]:
    """The arguments of `extract` as `extract_steps` takes them."""
    if (widths is None) == (kept is None):
        raise ConfigError("extract: give either widths or kept")
    return _prefixes(graph, widths) if widths is not None else _subsets(graph, kept or {})


def extract_steps(graph: ChannelGraph, steps: Mapping[int, Tensor]) -> nn.Module:
    """As `extract`, for unit number -> BoolTensor [C // step] of the steps that stay."""
    copies: dict[int, object] = {}
    for name, axes in graph.tensors.items():
        tensor = tensor_of(graph.model, name)
        _check_shape(name, tensor, axes)
        # In the memo of the copy: so tied parameters stay tied, and nothing is copied whole.
        copies[id(tensor)] = cut(tensor, axes, steps)
    small = copy.deepcopy(graph.model, copies)
    for size in graph.sizes:
        length = len(size.axis.kept(steps))
        size.set(small.get_submodule(size.module), length)
    return small


def _check_shape(name: str, tensor: Tensor, axes: Sequence[AxisMap | None]) -> None:
    same = len(axes) == tensor.ndim and all(
        axis is None or len(axis.unit) == size
        for axis, size in zip(axes, tensor.shape, strict=True)
    )
    if not same:
        raise ConfigError(f"{name} has shape {[*tensor.shape]} now: trace the model again")


def cut(tensor: Tensor, axes: Sequence[AxisMap | None], steps: Mapping[int, Tensor]) -> Tensor:
    """A copy of a parameter or buffer with the channels that stay."""
    smaller = tensor.detach()
    for dim, axis in enumerate(axes):
        if axis is None:
            continue
        positions = axis.kept(steps)
        if len(positions) < smaller.shape[dim]:
            smaller = smaller.index_select(dim, positions.to(tensor.device))
    if smaller.data_ptr() == tensor.data_ptr():
        smaller = smaller.clone()
    elif tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        smaller = smaller.contiguous(memory_format=torch.channels_last)
    if not isinstance(tensor, nn.Parameter):
        return smaller
    return nn.Parameter(smaller, requires_grad=tensor.requires_grad)


def _prefixes(graph: ChannelGraph, widths: Mapping[str, int]) -> dict[int, Tensor]:
    full = check_widths(graph.units, widths)
    return {
        number: torch.arange(0, unit.channels, unit.step, device="cpu") < full[unit.name]
        for number, unit in enumerate(graph.units)
        if full[unit.name] < unit.channels
    }


def _subsets(graph: ChannelGraph, kept: Mapping[str, Tensor | Sequence[int]]) -> dict[int, Tensor]:
    steps = {}
    numbers = {unit.name: number for number, unit in enumerate(graph.units)}
    for name, indices in ((known_as(name, numbers), indices) for name, indices in kept.items()):
        index = torch.as_tensor(indices, device="cpu").unique()
        check_widths(graph.units, {name: len(index)})
        unit = graph.units[numbers[name]]
        is_integer = not index.is_floating_point() and index.dtype != torch.bool
        if not (is_integer and ((index >= 0) & (index < unit.channels)).all()):
            raise ConfigError(f"kept[{name!r}]: indices must be integers in 0..{unit.channels - 1}")
        mask = torch.zeros(unit.channels, dtype=torch.bool, device="cpu")
        mask[index] = True
        rows = mask.view(-1, unit.step)
        if not torch.equal(rows.all(1), rows.any(1)):
            raise ConfigError(
                f"kept[{name!r}]: {unit.step} consecutive channels are kept or dropped together"
            )
        steps[numbers[name]] = rows.all(1)
    return steps
