"""A captured network cut into parts that can run, and be timed, by themselves."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from dmcp.errors import ConfigError
from dmcp.graph import ChannelGraph
from dmcp.graph.tensors import tensor_of
from dmcp.graph.units import AxisMap

Axis = tuple[tuple[int, float], ...]
"""A dimension as the searchable units on it: (unit number, weight) by number, smallest weight 1."""

_LEADING = (
    "conv",
    "linear",
    "matmul",
    "mm",
    "bmm",
    "addmm",
    "baddbmm",
    "einsum",
    "scaled_dot_product_attention",
    "lstm",
    "gru",
    "rnn",
)
"""Operators of names that begin so multiply and sum: each begins a segment."""

_MOST_AXES = 2
"""A segment depends on no more than so many widths, so that its table has no more dimensions."""


@dataclass
class Segment:
    """Neighbouring calls of a program.

    Attributes:
        calls: their places among the nodes of the program.
        axes: the dimensions that they depend on; no unit is on two of them.
    """

    calls: list[int]
    axes: tuple[Axis, ...]


def segments(graph: ChannelGraph, program: ExportedProgram) -> list[Segment]:
    """Cut the captured network: an operator that multiplies and sums begins a segment, and what
    follows joins it as long as the segment depends on two axes at most.

    An axis of several units stands for those that share a unit with it, as the parts of a
    concatenation.

    Raises:
        ConfigError: a single operator depends on more than two widths.
    """
    axes_of = _axes(graph, program)
    found: list[Segment] = []
    home: dict[fx.Node, Segment] = {}
    for place, node in enumerate(program.graph.nodes):
        if node.op != "call_function" or not _computes(node):
            continue
        near = [node, *node.all_input_nodes]
        mine = _apart(axis for other in near for axis in axes_of.get(other, ()))
        sources = [home[source] for source in node.all_input_nodes if source in home]
        last = max(sources, key=lambda segment: segment.calls[-1], default=None)
        if last is None or not _joins(node, mine, last):
            if len(mine) > _MOST_AXES:
                raise ConfigError(
                    f"latency: {_operator(node)} of {name_of([node])} depends on {len(mine)} "
                    f"widths, and a table has {_MOST_AXES} axes at most: exclude one of the units"
                )
            last = Segment([], mine)
            found.append(last)
        elif node.target is not operator.getitem:
            last.axes = _apart([*last.axes, *mine])
        last.calls.append(place)
        home[node] = last
    return found


def _joins(node: fx.Node, axes: Sequence[Axis], segment: Segment) -> bool:
    """Whether a call that depends on these axes belongs to the segment of its last input."""
    if node.target is operator.getitem:
        return True  # the segment's output is a tensor then, not a list
    joint = _apart([*segment.axes, *axes])
    return not _leads(node) and set(segment.axes) <= set(joint) and len(joint) <= _MOST_AXES


class Piece:
    """A segment of a program that runs by itself.

    Attributes:
        body: what runs, a module that takes ``inputs``.
        signature: the same for segments that compute the same operators with the same arguments on
            tensors of the same shapes, strides and types.
        inputs: tensors to run it on.
    """

    def __init__(self, program: ExportedProgram, nodes: Sequence[fx.Node]) -> None:
        stored = _stored(program)
        inside = set(nodes)
        graph, root = fx.Graph(), nn.Module()
        copies: dict[fx.Node, fx.Node] = {}
        labels: dict[fx.Node, str] = {}
        words: list[str] = []
        inputs: list[Tensor] = []
        outside = dict.fromkeys(
            source for node in nodes for source in node.all_input_nodes if source not in inside
        )
        for number, source in enumerate(outside):
            value = source.meta.get("val")
            if source in stored or not isinstance(value, Tensor):
                labels[source] = f"held{number}"
                value = stored[source] if source in stored else _attribute(program, source)
                _hold(root, labels[source], value)
            else:
                labels[source] = f"input{number}"
                inputs.append(_filled(value))
            words.append(f"{labels[source]} = {_describe(value)}")
        for source, label in labels.items():
            make = graph.get_attr if label.startswith("held") else graph.placeholder
            copies[source] = make(label)
        for number, node in enumerate(nodes):
            copies[node] = graph.node_copy(node, copies.__getitem__)
            arguments = fx.map_arg((node.args, node.kwargs), labels.__getitem__)
            labels[node] = f"value{number}"
            words.append(f"{labels[node]} = {node.target}{arguments}")
        used = [node for node in nodes if any(user not in inside for user in node.users)]
        graph.output(tuple(copies[node] for node in used or nodes[-1:]))
        self.body = fx.GraphModule(root, graph)
        self.inputs = tuple(inputs)
        self.signature = _hash(words)


def outline(program: ExportedProgram) -> list[tuple[str, str]]:
    """What has to be the same in the programs of all structures of a network."""
    return [(node.op, str(node.target)) for node in program.graph.nodes]


def signature_of(program: ExportedProgram) -> str:
    """A hash of a whole program, as `Piece.signature`."""
    words = []
    for node in program.graph.nodes:
        arguments = fx.map_arg((node.args, node.kwargs), lambda source: source.name)
        words.append(f"{node.name} = {node.target}{arguments} {_describe(node.meta.get('val'))}")
    return _hash(words)


def name_of(nodes: Iterable[fx.Node]) -> str:
    """The module that makes the first of these calls."""
    for node in nodes:
        stack = list(node.meta.get("nn_module_stack", {}).values())
        if stack and stack[-1][0]:
            return str(stack[-1][0]).partition("@")[0]
    return "the model itself"


def operators_of(nodes: Iterable[fx.Node]) -> tuple[str, ...]:
    """What the calls are called in PyTorch: ``conv2d``, ``batch_norm``, …"""
    return tuple(_operator(node) for node in nodes if node.target is not operator.getitem)


def _axes(graph: ChannelGraph, program: ExportedProgram) -> dict[fx.Node, list[Axis]]:
    """The axes of every value of the program that depends on a searchable unit."""
    named: dict[str, list[AxisMap]] = {}
    for flow in graph.nodes:
        named.setdefault(flow.call, []).extend(axis for _, axis in flow.axes)
    of_tensor = {id(tensor_of(graph.model, name)): axes for name, axes in graph.tensors.items()}
    specs = program.graph_signature.input_specs
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    found: dict[fx.Node, list[AxisMap]] = {}
    for node, spec in zip(placeholders, specs, strict=True):
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            axes = of_tensor.get(id(tensor_of(graph.model, str(spec.target))), ())
            found[node] = [axis for axis in axes if axis is not None]
    for node in program.graph.nodes:
        if node.op == "call_function":
            source = node.args[0] if node.target is operator.getitem else node
            found[node] = named.get(source.name, [])
    known = {node: [_axis(graph, axis) for axis in axes] for node, axes in found.items()}
    return {node: [axis for axis in axes if axis] for node, axes in known.items()}


def _axis(graph: ChannelGraph, axis: AxisMap) -> Axis:
    weights = {
        number: count / graph.units[number].step
        for number, count in axis.counts()[1].items()
        if graph.units[number].searchable
    }
    least = min(weights.values(), default=1.0)
    return tuple((number, weight / least) for number, weight in sorted(weights.items()))


def _apart(axes: Iterable[Axis]) -> tuple[Axis, ...]:
    """Those of the axes that share no unit; one of more units comes before one of fewer."""
    kept: list[Axis] = []
    taken: set[int] = set()
    for axis in sorted(dict.fromkeys(axes), key=len, reverse=True):
        units = {unit for unit, _ in axis}
        if not units & taken:
            kept.append(axis)
            taken |= units
    return tuple(sorted(kept))


def _computes(node: fx.Node) -> bool:
    """Whether a call makes a tensor; what ``torch.export`` asserts takes no time at run time."""
    value = node.meta.get("val")
    return isinstance(value, Tensor | list | tuple)


def _operator(node: fx.Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.partition("::")[2].rstrip("_")
    return str(node.target)


def _leads(node: fx.Node) -> bool:
    return _operator(node).startswith(_LEADING)


def _stored(program: ExportedProgram) -> dict[fx.Node, Any]:
    """The parameters, buffers and constants among the placeholders."""
    placeholders = (node for node in program.graph.nodes if node.op == "placeholder")
    held: Mapping[str, Any] = {**program.state_dict, **program.constants}
    return {
        node: held[str(spec.target)]
        for node, spec in zip(placeholders, program.graph_signature.input_specs, strict=True)
        if spec.kind is not InputKind.USER_INPUT and str(spec.target) in held
    }


def _attribute(program: ExportedProgram, node: fx.Node) -> Any:
    """What a node without a tensor stands for: a region of operators that is an operand itself."""
    if node.op == "get_attr":
        return getattr(program.graph_module, str(node.target))
    raise ConfigError(
        f"latency: {node.name} of {name_of([node])} is a {type(node.meta.get('val')).__name__}, "
        "not a tensor, and is passed between parts of the network"
    )


def _hold(root: nn.Module, name: str, value: Any) -> None:
    if isinstance(value, nn.Parameter):
        root.register_parameter(name, value)
    elif isinstance(value, Tensor):
        root.register_buffer(name, value)
    else:
        setattr(root, name, value)


def _filled(value: Tensor) -> Tensor:
    """Random numbers in the place of a captured tensor."""
    ends = ((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    # All that lies in memory, once: expanded tensors cannot be written to.
    memory = torch.zeros(1 + sum(ends), dtype=value.dtype, device=value.device)
    if memory.is_floating_point():
        memory.normal_()
    return memory.as_strided(tuple(value.shape), value.stride())


def _hash(words: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:24]


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype}{list(value.shape)}{list(value.stride())}"
    if isinstance(value, list | tuple):
        return str([_describe(item) for item in value])
    return str(value.code) if isinstance(value, fx.GraphModule) else str(value)
