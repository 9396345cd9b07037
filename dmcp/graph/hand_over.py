"""Extraction in the middle of training: what the training has gathered goes on with the network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dmcp.errors import ConfigError
from dmcp.graph.channel_graph import ChannelGraph
from dmcp.graph.extract import cut, extract_steps, kept_steps
from dmcp.graph.tensors import tensor_of
from dmcp.graph.units import AxisMap

Average = nn.Module | MutableMapping[str, Tensor]


def hand_over(
    graph: ChannelGraph,
    widths: Mapping[str, int] | None = None,
    *,
    kept: Mapping[str, Tensor | Sequence[int]] | None = None,
    optimizers: Optimizer | Iterable[Optimizer] = (),
    averages: Average | Iterable[Average] = (),
) -> nn.Module:
    """Extract a network, and let the training go on with it.

    The optimizers train the extracted network from now on: in their parameter groups its parameters
    take the places of the traced model's, and what they remember of a parameter (momentum, moments)
    loses the dropped channels, too. They stay the same objects, so everything that holds them goes
    on: learning-rate schedulers, a ``GradScaler``, hooks, a trainer. Where an optimizer works
    element by element, its next step is the one it would do in the whole network with the dropped
    channels at zero.

    Call it between two steps: gradients are not handed over. A ``DistributedDataParallel`` holds
    the whole network and has to be made anew. The traced model stays as it is, but nobody trains
    it any more; if an error is raised, nothing has happened.

    Args:
        graph: what `dmcp.trace` returned, or ``net.graph`` of a `MarkovNet`.
        widths, kept: as for `extract`.
        optimizers: those of the model's parameters, e.g. ``search.optimizer``. Parameters of
            others, such as those of a loss, stay what they are.
        averages: averages of its weights (EMA, SWA): modules with a copy of the model as
            ``.module`` (``AveragedModel``, timm's ``ModelEmaV3``), which hold a small one from now
            on, or state dicts with its names, whose tensors are replaced.

    Returns:
        As `extract`.

    Raises:
        ConfigError: as `extract`; an optimizer holds no parameter of the model, or remembers
            something of a parameter that is neither a single number nor of its shape (factored
            or blockwise moments), or of several at once (L-BFGS); an average is not one of this
            model.
    """
    steps = kept_steps(graph, widths, kept)
    optimizers = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
    averages = [averages] if isinstance(averages, nn.Module | MutableMapping) else list(averages)
    small = extract_steps(graph, steps)
    axes = _axes(graph)
    successors: dict[Tensor, _Successor] = {
        parameter: _Successor(name, axes[name], small.get_parameter(name))
        for name, parameter in graph.model.named_parameters()
    }
    states = [_state(optimizer, successors, steps) for optimizer in optimizers]
    smaller = [_average(average, graph, axes, steps) for average in averages]

    for optimizer, state in zip(optimizers, states, strict=True):
        for group in optimizer.param_groups:
            group["params"][:] = [
                successors[parameter].parameter if parameter in successors else parameter
                for parameter in group["params"]
            ]
        # In place: an optimizer that wraps another shares its state.
        optimizer.state.clear()
        optimizer.state.update(state)
    for average, now in zip(averages, smaller, strict=True):
        if isinstance(average, nn.Module):
            average.module = now  # type: ignore[assignment]
        else:
            average.update(now)  # type: ignore[arg-type]
    return small


Axes = Sequence[AxisMap | None]


class _Successor(NamedTuple):
    """The parameter of the small network that takes the place of one of the whole network.

    Attributes:
        name: the name of both.
        axes: what each dimension of the larger one carries.
        parameter: the smaller one.
    """

    name: str
    axes: Axes
    parameter: nn.Parameter


def _axes(graph: ChannelGraph) -> dict[str, Axes]:
    """What each dimension of a tensor carries, by all the names of a state dict, tied ones, too."""
    known = {id(tensor_of(graph.model, name)): axes for name, axes in graph.tensors.items()}
    return {
        name: known.get(id(tensor), (None,) * tensor.ndim)
        for name, tensor in _tensors(graph.model).items()
    }


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Those of its state dict, which may hold other things (``get_extra_state``), too."""
    state = model.state_dict(keep_vars=True)
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _state(
    optimizer: Optimizer, successors: Mapping[Tensor, _Successor], steps: Mapping[int, Tensor]
) -> dict[Any, Any]:
    """What an optimizer remembers, for the parameters of the small network."""
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not any(parameter in successors for parameter in held):
        raise ConfigError(
            f"optimizers: {type(optimizer).__name__} holds no parameter of the traced model"
        )
    if any(p in successors and p.shape != successors[p].parameter.shape for p in held):
        _refuse_joint_state(optimizer)
    state: dict[Any, Any] = {}
    for parameter, remembered in optimizer.state.items():
        if parameter not in successors:
            state[parameter] = remembered
            continue
        successor = successors[parameter]
        where = f"optimizers: {type(optimizer).__name__} remembers %r of {successor.name}"
        state[successor.parameter] = {
            key: _cut_state(value, parameter, successor, steps, where % key)
            for key, value in remembered.items()
        }
    return state


def _refuse_joint_state(optimizer: Optimizer) -> None:
    """Refuse an optimizer that remembers several parameters as one vector, as L-BFGS does in the
    state of the first one, whose own shape may well stay.

    What has more dimensions, such as a matrix of a vector's second moments, is of one parameter.
    """
    for parameter, remembered in optimizer.state.items():
        for key, value in remembered.items():
            is_vector = isinstance(value, Tensor) and value.ndim == 1
            if is_vector and len(value) > max(parameter.numel(), 1):
                raise ConfigError(
                    f"optimizers: {type(optimizer).__name__} remembers {key!r}, "
                    f"of shape {[*value.shape]}, with a parameter of shape {[*parameter.shape]}: "
                    "a vector of more than this parameter cannot be handed over"
                )


def _cut_state(
    value: Any, whole: Tensor, successor: _Successor, steps: Mapping[int, Tensor], where: str
) -> Any:
    """One entry of an optimizer's state of a parameter, for what takes its place."""
    smaller = successor.parameter
    if isinstance(value, Tensor) and value.shape == whole.shape:
        # Strided like the parameter: fused optimizers walk over memory.
        like = torch.empty_like(smaller, dtype=value.dtype, device=value.device)
        return like.detach().copy_(cut(value, successor.axes, steps))
    is_number = value.numel() == 1 if isinstance(value, Tensor) else not isinstance(value, Iterable)
    if is_number or whole.shape == smaller.shape:
        return value
    what = f"of shape {[*value.shape]}" if isinstance(value, Tensor) else type(value).__name__
    raise ConfigError(
        f"{where}, {what}, not of the parameter's shape {[*whole.shape]}: it cannot be handed over"
    )


def _average(
    average: Average, graph: ChannelGraph, axes: Mapping[str, Axes], steps: Mapping[int, Tensor]
) -> nn.Module | dict[str, Tensor]:
    """What takes the place of a module's ``.module``, or of the tensors in a state dict."""
    name = f"averages: {type(average).__name__}"
    if isinstance(average, nn.Module):
        copied = getattr(average, "module", None)
        if not isinstance(copied, nn.Module) or _tensors(copied).keys() != axes.keys():
            raise ConfigError(f"{name} holds no copy of the traced model as its module")
        return extract_steps(replace(graph, model=copied), steps)
    for key, tensor in average.items():
        if key not in axes or tensor.shape != tensor_of(graph.model, key).shape:
            raise ConfigError(f"{name}: {key!r} is not a tensor of the traced model")
    return {key: cut(tensor, axes[key], steps) for key, tensor in average.items()}
