"""From a model and an example input to its channel units."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind
from torch.utils._pytree import tree_leaves

from dmcp.errors import TraceError
from dmcp.graph.channel_graph import ChannelGraph, LayerCall, ModuleAxes, Node, NodeKind
from dmcp.graph.extract import extract
from dmcp.graph.rules import RULES, Parameter, UnsupportedError, Value
from dmcp.graph.slots import Slots, SlotTable
from dmcp.graph.units import FIXED, AxisMap, ChannelUnit, Member

Kind = Literal["dense", "depthwise", "norm"]


def trace(model: nn.Module, example_inputs: Tensor | tuple[Tensor, ...]) -> ChannelGraph:
    """Find the channel units of a feed-forward CNN.

    The model is captured by ``torch.export`` in evaluation mode: every operator with its exact
    arguments, every parameter by name. Channels are then followed through the operators by one
    rule each (`dmcp.graph.rules`), and the narrowest network is run once on the example, which
    finds channel counts that are written into the code. The model itself is not changed.

    Args:
        model: the network; its first input holds channels on dimension 1.
        example_inputs: one batch of the shape the model will see, e.g. ``torch.zeros(2, 3, 224,
            224)``, or a tuple of positional inputs. Costs refer to this image size.

    Raises:
        TraceError: the model cannot be captured, holds an operator, a layer or a shared parameter
            that is not understood (the message names the module), or fails once channels are
            removed (it names the model and the failure).
    """
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    _refuse_tied_parameters(model)
    program = _capture(model, inputs)
    tracer = Tracer(model)
    tracer.run(program)
    _refuse_unvisited_parameters(model, tracer)
    graph = tracer.graph()
    _refuse_fixed_sizes(graph, inputs)
    return graph


@dataclass(frozen=True)
class Call:
    """One operator call of the captured program.

    Attributes:
        operator: the ATen operator.
        shape: shape of its output.
        module: qualified name of the module whose forward made the call.
        where: that name and the module's class, for messages.
        alone: whether that module holds nothing else, and makes no other call (an activation
            module that is used once).
    """

    operator: Any
    shape: tuple[int, ...]
    module: str
    where: str
    alone: bool


@dataclass
class _Visit:
    kind: Kind
    inputs: Slots
    outputs: Slots


@dataclass
class Tracer:
    """Runs the rules over a captured program and collects what they find."""

    model: nn.Module
    table: SlotTable = field(default_factory=SlotTable)
    visits: dict[str, _Visit] = field(default_factory=dict)
    layers: list[LayerCall] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    sources: list[Slots] = field(default_factory=list)
    results: list[Slots] = field(default_factory=list)

    def module(self, name: str) -> nn.Module:
        return self.model.get_submodule(name)

    def slots_of(self, name: str, role: Literal["in", "out"], size: int) -> Slots:
        """The slots of a module's axis: the same ones at every call of the module."""
        visit = self.visits.get(name)
        if visit is None:
            return self.table.new(size)
        return visit.outputs if role == "out" else visit.inputs

    def visit_layer(
        self, name: str, kind: Kind, inputs: Slots, outputs: Slots, kernel: int, positions: int
    ) -> None:
        """Record a call of a convolution or linear layer."""
        self._visit(name, kind, inputs, outputs)
        self.layers.append(LayerCall(name, kernel, positions))

    def visit_norm(self, name: str, slots: Slots) -> None:
        """Record a call of a normalisation layer."""
        self._visit(name, "norm", slots, slots)

    def _visit(self, name: str, kind: Kind, inputs: Slots, outputs: Slots) -> None:
        seen = self.visits.setdefault(name, _Visit(kind, inputs, outputs))
        self.table.equate(seen.inputs, inputs)
        self.table.equate(seen.outputs, outputs)

    def emit(
        self,
        call: Call,
        kind: NodeKind,
        inputs: Sequence[Value],
        axis: int,
        slots: Slots,
        *,
        module: str | None = None,
        homogeneous: bool = True,
    ) -> Value:
        """Append a node and return the value it produces."""
        sources = tuple(value.node for value in inputs)
        self.nodes.append(Node(kind, module, sources, homogeneous))
        return Value(call.shape, axis, slots, len(self.nodes) - 1)

    def run(self, program: torch.export.ExportedProgram) -> None:
        values = _placeholders(self, program)
        calls = Counter(_calling_module(node) for node in program.graph.nodes)
        for node in program.graph.nodes:
            if node.op == "call_function":
                call = _describe(node, self.model, calls)
                values[node] = self._call(call, node, values)
            elif node.op == "output":
                self._finish(node, values)

    def _call(self, call: Call, node: fx.Node, values: dict[fx.Node, Any]) -> Value:
        function = RULES.get(node.target)
        if function is None:
            raise TraceError(f"{call.where}: operator {node.target} is not supported")
        args = fx.map_arg(_all_arguments(node), values.__getitem__)
        try:
            return function(self, call, args)
        except UnsupportedError as reason:
            raise TraceError(f"{call.where}: {node.target}: {reason}") from None

    def _finish(self, node: fx.Node, values: dict[fx.Node, Any]) -> None:
        results = [values[argument] for argument in node.all_input_nodes]
        for value in results:
            if isinstance(value, Value):
                self.results.append(value.slots)
        sources = tuple(value.node for value in results if isinstance(value, Value))
        self.nodes.append(Node("output", None, sources))

    def graph(self) -> ChannelGraph:
        classes = self.table.classes()
        unit_of, index_of, names = _partition(self, classes)
        maps = {
            name: ModuleAxes(
                visit.kind,
                _axis_map(classes[visit.inputs], unit_of, index_of),
                _axis_map(classes[visit.outputs], unit_of, index_of),
            )
            for name, visit in self.visits.items()
        }
        reasons = {}
        for ends, reason in ((self.sources, "inputs"), (self.results, "outputs")):
            for number in {int(unit_of[label]) for slots in ends for label in classes[slots]}:
                reasons[number] = f"its channels are the model's {reason}"
        units = tuple(
            _unit(number, name, maps, reasons.get(number, "")) for number, name in enumerate(names)
        )
        return ChannelGraph(self.model, units, maps, tuple(self.layers), tuple(self.nodes))


def _capture(model: nn.Module, inputs: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    try:
        with _evaluating(model):
            return torch.export.export(model, inputs, strict=False)
    except Exception as error:
        raise TraceError(
            f"{type(model).__name__} cannot be captured by torch.export: {_first_line(error)}"
        ) from error


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _refuse_fixed_sizes(graph: ChannelGraph, inputs: tuple[Tensor, ...]) -> None:
    """Run the network with one channel per unit: sizes in a captured program are numbers, so only
    this tells whether they were computed or written into the code."""
    name = type(graph.model).__name__
    narrowest = extract(graph, {unit.name: 1 for unit in graph.searchable}).eval()
    with torch.no_grad(), _evaluating(graph.model):
        expected = _shapes(graph.model(*inputs))
        try:
            shapes = _shapes(narrowest(*inputs))
        except Exception as error:
            raise TraceError(
                f"{name}: the forward pass fails once channels are removed ({_first_line(error)}): "
                "is a channel count written into it, in a reshape for example?"
            ) from error
    if shapes != expected:
        raise TraceError(
            f"{name}: the outputs change from {expected} to {shapes} once channels are removed: "
            "is a channel count written into a reshape?"
        )


def _shapes(outputs: Any) -> list[tuple[int, ...]]:
    return [tuple(leaf.shape) for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]


def _refuse_tied_parameters(model: nn.Module) -> None:
    owner: dict[int, str] = {}
    parameters = model.named_parameters(remove_duplicate=False)
    for name, tensor in chain(parameters, model.named_buffers(remove_duplicate=False)):
        first = owner.setdefault(id(tensor), name)
        if first != name:
            raise TraceError(f"{name}: the parameter is tied to {first}, which is not supported")


def _refuse_unvisited_parameters(model: nn.Module, tracer: Tracer) -> None:
    for name, _ in model.named_parameters():
        module, _, key = name.rpartition(".")
        if module not in tracer.visits or key not in ("weight", "bias"):
            kind = type(model.get_submodule(module)).__name__
            raise TraceError(
                f"{module or 'the model itself'} ({kind}): parameter {name} takes no part in the "
                f"traced forward pass"
            )


def _placeholders(tracer: Tracer, program: torch.export.ExportedProgram) -> dict[fx.Node, Any]:
    values: dict[fx.Node, Any] = {}
    nodes = [node for node in program.graph.nodes if node.op == "placeholder"]
    for node, spec in zip(nodes, program.graph_signature.input_specs, strict=True):
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            module, _, name = str(spec.target).rpartition(".")
            values[node] = Parameter(module, name)
        elif spec.kind is InputKind.USER_INPUT and isinstance(node.meta.get("val"), Tensor):
            shape = tuple(node.meta["val"].shape)
            if len(shape) < 2:
                raise TraceError(f"input {node.name}: shape {shape} has no channel dimension")
            tracer.nodes.append(Node("input", None, ()))
            slots = tracer.table.new(shape[1])
            tracer.sources.append(slots)
            values[node] = Value(shape, 1, slots, len(tracer.nodes) - 1)
        else:
            values[node] = None
    return values


def _calling_module(node: fx.Node) -> str:
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return str(stack[-1][0]) if stack else ""


def _describe(node: fx.Node, model: nn.Module, calls: Counter[str]) -> Call:
    name = _calling_module(node)
    module = model.get_submodule(name)
    where = f"{name or 'the model itself'} ({type(module).__name__})"
    alone = name != "" and not list(module.children()) and calls[name] == 1
    value = node.meta.get("val")
    shape = tuple(value.shape) if isinstance(value, Tensor) else ()
    return Call(node.target, shape, name, where, alone)


def _all_arguments(node: fx.Node) -> list[Any]:
    """Every argument of the operator in the order of its schema, defaults filled in."""
    rest = node.target._schema.arguments[len(node.args) :]  # type: ignore[union-attr]
    return [*node.args, *(node.kwargs.get(arg.name, arg.default_value) for arg in rest)]


def _partition(tracer: Tracer, classes: Slots) -> tuple[Slots, Slots, list[str]]:
    """Group slot classes into units.

    Two classes belong together if they appear the same number of times on the same module axes;
    the order inside a unit is that of the first axis that produces it.

    Returns:
        unit number per class label (``FIXED`` where no module produces it), place inside the unit,
        names of the units.
    """
    signature: dict[int, list[tuple[int, int]]] = defaultdict(list)
    producer: dict[int, str] = {}
    axes = [(name, visit.inputs, False) for name, visit in tracer.visits.items()]
    axes += [(name, visit.outputs, visit.kind == "dense") for name, visit in tracer.visits.items()]
    axes += [("", slots, False) for slots in (*tracer.sources, *tracer.results)]
    for number, (name, slots, produces) in enumerate(axes):
        labels, counts = np.unique(classes[slots], return_counts=True)
        for label, count in zip(labels.tolist(), counts.tolist(), strict=True):
            signature[label].append((number, count))
            if produces:
                producer.setdefault(label, name)

    unit_of = np.full(tracer.table.count, FIXED, dtype=np.int64)
    index_of = np.zeros(tracer.table.count, dtype=np.int64)
    numbers: dict[tuple[tuple[int, int], ...], int] = {}
    sizes: list[int] = []
    names: list[str] = []
    for visit in tracer.visits.values():
        if visit.kind != "dense":
            continue
        for label in classes[visit.outputs].tolist():
            if unit_of[label] != FIXED:
                continue
            number = numbers.setdefault(tuple(signature[label]), len(numbers))
            if number == len(names):
                names.append(_unique(producer[label], names))
                sizes.append(0)
            unit_of[label], index_of[label] = number, sizes[number]
            sizes[number] += 1
    return unit_of, index_of, names


def _unique(name: str, taken: Sequence[str]) -> str:
    """``name``, or ``name#1``, ``name#2`` … for further units of the same producer."""
    candidates = [name, *(f"{name}#{number}" for number in range(1, len(taken) + 1))]
    return next(candidate for candidate in candidates if candidate not in taken)


def _axis_map(labels: Slots, unit_of: Slots, index_of: Slots) -> AxisMap:
    return AxisMap(torch.from_numpy(unit_of[labels]), torch.from_numpy(index_of[labels]))


def _unit(number: int, name: str, maps: dict[str, ModuleAxes], reason: str) -> ChannelUnit:
    members = []
    for module, axes in maps.items():
        inputs = _member_channels(axes.inputs, number) if axes.kind == "dense" else None
        outputs = _member_channels(axes.outputs, number)
        if inputs is not None:
            members.append(Member(module, "in", inputs))
        if outputs is not None:
            members.append(Member(module, "out", outputs))
    size = len(members[0].channels)
    choices = (size,) if reason else tuple(range(1, size + 1))
    return ChannelUnit(name, size, choices, not reason, reason, tuple(members))


def _member_channels(axis: AxisMap, number: int) -> Tensor | None:
    positions = (axis.unit == number).nonzero().flatten()
    if not len(positions):
        return None
    order = axis.index[positions].argsort(stable=True)
    size = int(axis.index[positions].max()) + 1
    return positions[order].reshape(size, -1).squeeze(1)
