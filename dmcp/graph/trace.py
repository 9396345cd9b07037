"""From a model and an example input to its channel units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves

from dmcp.errors import ConfigError, TraceError
from dmcp.graph.capture import capture
from dmcp.graph.channel_graph import ChannelGraph
from dmcp.graph.tensors import known_as, tensor_of, unwrapped
from dmcp.graph.units import ChannelUnit

if TYPE_CHECKING:
    from dmcp.graph.tracer import Tracer


def trace(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Any] | Mapping[str, Any],
    *,
    exclude: Sequence[str] = (),
    tied: Sequence[Sequence[str]] = (),
    min_width: int | Mapping[str, int] = 1,
) -> ChannelGraph:
    """Find the channel units of a network, and prove them on the network itself.

    The model is captured by ``torch.export`` in evaluation mode: every operator with its exact
    arguments, every parameter by name; once more in training mode if some parameter takes part in
    training only. Channels are then followed through the operators by one rule each
    (`dmcp.graph.rules`). What no rule understands keeps all channels that reach it. At the end
    networks of random widths are extracted and compared with the whole network whose dropped
    channels are zeroed (`Proof`); a unit that differs is made unsearchable. The model itself is not
    changed.

    Args:
        model: the network.
        example_inputs: one batch as the model will see it, e.g. ``torch.zeros(2, 3, 224, 224)``, a
            tuple of positional or a mapping of keyword inputs. Costs refer to this image size; the
            first dimension of the first tensor counts the images.
        exclude: patterns such as ``"head.*"``; units that a matching module (or the unit's own
            name) produces are not searchable.
        tied: groups of unit names that shall share one width.
        min_width: the smallest width of every unit, or of the units whose names match a pattern.

    Raises:
        TraceError: the model cannot be captured (its control flow depends on values; the message
            names the line), or not be checked (it cannot be copied, or run on the CPU).
        ConfigError: an option names no unit, or ties units of different sizes.
    """
    # Not with the package: the rules are a quarter of it.
    from dmcp.graph.partition import Partition
    from dmcp.graph.proof import prove

    inputs, keywords = _arguments(example_inputs)
    shapes = _shapes([*inputs, *keywords.values()])
    images = shapes[0][0]
    programs = [capture(model, inputs, keywords, training=False)]
    tracer = _follow(model, programs, images, larger=True)
    if _meets_more(model, tracer):
        with suppress(TraceError):
            programs.append(capture(model, inputs, keywords, training=True))
            tracer = _follow(model, programs, images, larger=True)

    def proven(tracer: Tracer) -> ChannelGraph:
        _tie(tracer, tied)
        graph = Partition(tracer).graph()
        graph = replace(
            graph,
            units=_chosen(graph.units, exclude, min_width),
            inputs=tuple(shape[1:] for shape in shapes),
        )
        # On the meta device there is nothing to run: costs can be asked for, not more.
        on_meta = any(tensor.is_meta for tensor in model.parameters())
        return graph if on_meta else prove(graph, inputs, keywords)

    graph = proven(tracer)
    if graph.proof is None or not (graph.proof.refuted and tracer.guessed):
        return graph
    # Perhaps the code keeps the part of a split dimension that was taken to shrink.
    other = proven(_follow(model, programs, images, larger=False))
    return max((graph, other), key=lambda graph: len(graph.searchable))


def _follow(
    model: nn.Module, programs: Sequence[ExportedProgram], images: int, *, larger: bool
) -> Tracer:
    """Run the rules over the evaluation pass, and over the training pass for what runs only there;
    its layers cost nothing later."""
    from dmcp.graph.tracer import Tracer

    tracer = Tracer(model, images, larger)
    tracer.run(programs[0])
    flow, counted = tracer.nodes, tracer.counted
    for program in programs[1:]:
        tracer.nodes, tracer.counted = [], []
        tracer.run(program)
    tracer.nodes, tracer.counted = flow, counted
    return tracer


def _arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, Tensor):
        return (example,), {}
    if isinstance(example, Mapping):
        return (), dict(example)
    if not isinstance(example, Sequence):
        raise ConfigError(
            f"example_inputs must be a tensor, a tuple or a mapping, got {type(example).__name__}"
        )
    return tuple(example), {}


def _shapes(inputs: Sequence[Any]) -> list[tuple[int, ...]]:
    """Those of the tensors that have dimensions."""
    leaves = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.ndim]
    shapes = [tuple(leaf.shape) for leaf in leaves]
    if not shapes or not shapes[0][0]:
        raise ConfigError("example_inputs must hold a tensor with a batch dimension of at least 1")
    return shapes


def _meets_more(model: nn.Module, tracer: Tracer) -> bool:
    """Whether some parameter took no part in the pass in evaluation mode."""
    met = {id(tensor_of(model, name)) for name in tracer.uses}
    return any(id(parameter) not in met for parameter in model.parameters())


def _tie(tracer: Tracer, groups: Sequence[Sequence[str]]) -> None:
    if not groups:
        return
    from dmcp.graph.partition import Partition, tie

    units = {unit.name: unit for unit in Partition(tracer).units}
    groups = [[known_as(name, units) for name in group] for group in groups]
    for group in groups:
        unknown = [name for name in group if name not in units]
        if unknown:
            raise ConfigError(f"tied: no unit is called {unknown[0]!r}; units are {list(units)}")
        if len({len(units[name].classes) for name in group}) > 1:
            sizes = {name: len(units[name].classes) for name in group}
            raise ConfigError(f"tied: units must have the same number of steps, got {sizes}")
    tie(tracer, [[units[name] for name in group] for group in groups])


def _chosen(
    units: Sequence[ChannelUnit], exclude: Sequence[str], min_width: int | Mapping[str, int]
) -> tuple[ChannelUnit, ...]:
    least = min_width if isinstance(min_width, Mapping) else {"*": min_width}
    for option, patterns in (("exclude", exclude), ("min_width", least)):
        for pattern in patterns:
            if pattern != "*" and not any(_matches(unit, pattern) for unit in units):
                raise ConfigError(f"{option}: no unit matches {pattern!r}")
    return tuple(_restricted(unit, exclude, least) for unit in units)


def _restricted(unit: ChannelUnit, exclude: Sequence[str], least: Mapping[str, int]) -> ChannelUnit:
    if not unit.searchable:
        return unit
    pattern = next((p for p in exclude if _matches(unit, p)), None)
    if pattern is not None:
        reason = f"it is excluded by {pattern!r}"
        return replace(unit, searchable=False, choices=(unit.channels,), reason=reason)
    smallest = max((width for p, width in least.items() if _matches(unit, p)), default=1)
    choices = tuple(width for width in unit.choices if width >= smallest) or (unit.channels,)
    if len(choices) > 1:
        return replace(unit, choices=choices)
    reason = f"its {unit.channels} channels are no more than min_width"
    return replace(unit, searchable=False, choices=(unit.channels,), reason=reason)


def _matches(unit: ChannelUnit, pattern: str) -> bool:
    makers = [member.module for member in unit.members if member.role == "out"]
    names = {unit.name, *makers, *map(unwrapped, makers)}
    return any(fnmatchcase(name, pattern) for name in names)
