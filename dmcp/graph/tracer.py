"""Running the rules over a captured program."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._C import DispatchKey
from torch.export.graph_signature import InputKind
from torch.utils._pytree import tree_leaves, tree_map_only

from dmcp.graph.channel_graph import NodeKind
from dmcp.graph.rules import find_rule
from dmcp.graph.rules.registry import unknown
from dmcp.graph.slots import Slots, SlotTable
from dmcp.graph.tensors import tensor_of
from dmcp.graph.values import Axes, Axis, Value, labelled

_FIXED_SIZES = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)
"""Modules whose own code holds on to the sizes they were built with."""


@dataclass(frozen=True)
class Call:
    """One operator call of the captured program.

    Attributes:
        operator: the ATen operator.
        node: the call itself.
        shapes: shapes of its outputs.
        several: whether it returns a list of them.
        module: qualified name of the module whose forward made the call.
        where: that name, the module's class and the line of code, for messages.
        alone: whether that module holds nothing else, and makes no other call (an activation
            module that is used once).
        sole: whether its output is the module's.
    """

    operator: Any
    node: fx.Node
    shapes: tuple[tuple[int, ...], ...]
    several: bool
    module: str
    where: str
    alone: bool
    sole: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of its only output."""
        return self.shapes[0]


@dataclass(frozen=True, eq=False)
class Visit:
    """A module's call of the operator that it stands for, with its own weights."""

    kind: NodeKind
    inputs: Slots | None
    outputs: Slots


@dataclass(frozen=True, eq=False)
class Flow:
    """A `Node` in the making."""

    kind: NodeKind
    module: str | None
    inputs: tuple[int, ...]
    homogeneous: bool = True
    operator: str = ""
    axes: tuple[tuple[int, Slots], ...] = ()
    parameters: tuple[str, ...] = ()
    tainted: bool = False
    computed: bool = False
    call: str = ""


@dataclass(frozen=True, eq=False)
class Counted:
    """One call that costs multiply–accumulates: `Tracer.count`."""

    module: str
    factor: int
    axes: tuple[Slots, ...]
    numbers: int
    outputs: tuple[Slots, ...]


@dataclass(frozen=True, eq=False)
class Size:
    """A `ModuleSize` in the making."""

    module: str
    attribute: str
    slots: Slots
    per: int = 1
    place: int | None = None


@dataclass
class Tracer:
    """Collects what the rules declare: the vocabulary in which they are written.

    Attributes:
        model: the network.
        images: size of the example batch; costs are per image.
        larger: of the parts that a dimension is split into, the largest is taken to shrink, else
            the smallest.
        guessed: whether that mattered.
        table: the slots and what is declared about them.
        tensors: qualified name -> axes of every parameter and buffer that was met.
        visits, counted, sizes, nodes: see their types.
        consumed: (parameter, dimension) pairs that are summed over: the channels they read.
        produced: such pairs that decide how many channels there are.
        uses, own: how often operators took a parameter or buffer, and how often that was the
            operator which its own module stands for.
    """

    model: nn.Module
    images: int
    larger: bool = True
    guessed: bool = False
    table: SlotTable = field(default_factory=SlotTable)
    tensors: dict[str, Axes] = field(default_factory=dict)
    visits: dict[str, Visit] = field(default_factory=dict)
    counted: list[Counted] = field(default_factory=list)
    sizes: list[Size] = field(default_factory=list)
    nodes: list[Flow] = field(default_factory=list)
    consumed: set[tuple[str, int]] = field(default_factory=set)
    produced: set[tuple[str, int]] = field(default_factory=set)
    uses: Counter[str] = field(default_factory=Counter)
    own: Counter[str] = field(default_factory=Counter)
    call: Call = field(init=False)
    _parameters: set[str] = field(default_factory=set)
    _memory: dict[fx.Node, fx.Node] = field(default_factory=dict)
    _stored: dict[int, str] = field(default_factory=dict)
    _names: dict[int, str] = field(default_factory=dict)
    _targets: dict[fx.Node, str] = field(default_factory=dict)

    # What rules declare about axes

    def axis(self, size: int, taint: str = "", *, wild: bool = False) -> Axis | None:
        """A dimension of fresh channels; None where there is only one, which is never dropped."""
        return Axis(self.table.new(size), taint, wild=wild) if size > 1 else None

    def block(self, axes: Axis | Iterable[Axis | None] | None, reason: str) -> None:
        """Never drop a channel of these axes."""
        for axis in [axes] if axes is None or isinstance(axes, Axis) else axes:
            if axis is not None:
                self.table.block(axis.slots, f"{reason} ({self.call.where})")

    def equate(self, left: Axis | None, right: Axis | None) -> None:
        """Keep or drop the channels of two equally long axes together."""
        if left is None or right is None:
            self.block([left, right], "its channels meet a dimension whose size stays")
        elif len(left.slots) != len(right.slots):
            self.block([left, right], "axes of different lengths meet")
        else:
            self.table.equate(left.slots, right.slots)

    def fixed(self, size: int, reason: str) -> Slots:
        """Positions that are never dropped, amid others that may be."""
        slots = self.table.new(size)
        self.table.block(slots, f"{reason} ({self.call.where})")
        return slots

    def meet(self, axes: Sequence[Axis | None]) -> Axis | None:
        """Equate all of these axes, of one length; returns one that stands for all of them."""
        known = [axis for axis in axes if axis is not None]
        firm = [axis for axis in known if not axis.wild]
        if len(known) < len(axes):
            self.block(firm, "its channels meet a dimension whose size stays")
            return None
        if not known:
            return None
        first = firm[0] if firm else known[0]
        for axis in known:
            self.equate(first, axis)
        origins = frozenset[tuple[str, int]]().union(*(axis.origins for axis in known))
        return replace(first, origins=origins)

    def produce(self, axis: Axis | None) -> None:
        """This call decides how many channels the axis has."""
        if axis is None:
            return
        name = self.call.module
        if list(self.model.get_submodule(name).children()) or not name:
            # A parameter that a whole block uses by itself names the unit.
            name = min((origin for origin, _ in axis.origins), default=name) or self.call.node.name
        self.table.produce(axis.slots, name)
        self.produced.update(axis.origins)

    def sum_over(
        self, read: Sequence[Axis | None], weights: Sequence[Axis | None] = ()
    ) -> Axis | None:
        """The product of activations and weights with these axes, of one length, is summed over
        them: dropping a channel equals zeroing it if any of the activations is zero then. Returns
        the axis, None if it never shrinks."""
        for axis in weights:
            self.consumed.update(axis.origins if axis is not None else ())
        axis = self.meet([*read, *weights])
        if axis is not None and all(a is None or a.taint for a in read):
            reason = next((a.taint for a in read if a is not None), "its weights are mixed")
            self.table.block(axis.slots, f"a dropped channel would still count: {reason}")
        return axis

    # What rules declare about modules and costs

    def size(self, attribute: str, axis: Axis | None, per: int = 1) -> None:
        """The calling module's ``attribute`` is the length of ``axis`` divided by ``per``."""
        value = getattr(self.model.get_submodule(self.call.module), attribute, None)
        if axis is None or type(value) is not int:
            return
        if value * per == len(axis.slots):
            self.sizes.append(Size(self.call.module, attribute, axis.slots, per))

    def sizes_held(self, sizes: Sequence[int]) -> str | None:
        """The attribute of the calling module that is a list of these sizes, if there is one."""
        for name, value in vars(self.model.get_submodule(self.call.module)).items():
            if type(value) in (list, tuple) and list(value) == list(sizes):
                return name
        return None

    def size_of_part(self, attribute: str, place: int, axis: Axis | None) -> None:
        """An item of a list that the calling module holds is the length of ``axis``."""
        if axis is not None:
            self.sizes.append(Size(self.call.module, attribute, axis.slots, 1, place))

    def visit(
        self, kind: NodeKind, weights: Sequence[Value], inputs: Axis | None, outputs: Axis | None
    ) -> str | None:
        """The call is its module's own operator if the weights are the module's own and its output
        the module's; returns the module's name then."""
        name = self.call.module
        owner = self.model.get_submodule(name)
        own = {id(t) for t in (*owner._parameters.values(), *owner._buffers.values())}
        stored = [self._name_of(weight) for weight in weights]
        if not self.call.sole:
            return None
        if any(key is None or id(tensor_of(self.model, key)) not in own for key in stored):
            return None
        self.own.update(key for key in stored if key is not None)
        if outputs is not None and stored:
            read = inputs.slots if inputs is not None else None
            self.visits.setdefault(name, Visit(kind, read, outputs.slots))
        return name

    def _name_of(self, weight: Value) -> str | None:
        """The name of the parameter or buffer that a value is, if it is one as it is stored."""
        return self._stored.get(id(weight.axes))

    def count(self, factor: int, axes: Sequence[Axis | None], output: Value | None = None) -> None:
        """The call costs ``factor`` times the lengths of ``axes`` multiply–accumulates for the
        whole batch; ``output`` is what it makes."""
        known = [axis for axis in axes if axis is not None and not axis.wild]
        factor *= prod(len(axis.slots) for axis in axes if axis is not None and axis.wild)
        # The first ones are positions rather than channels.
        for axis in known[:-2]:
            self.block(axis, "its cost would be a product of more than two widths")
            factor *= len(axis.slots)
        known = known[-2:]
        outputs = labelled([output]) if output is not None else []
        numbers = prod(output.shape) if output is not None else 0
        numbers //= prod(len(axis.slots) for axis in outputs)
        self.counted.append(
            Counted(
                self.call.module,
                self._per_image(factor),
                tuple(axis.slots for axis in known),
                self._per_image(numbers),
                tuple(axis.slots for axis in outputs),
            )
        )

    def _per_image(self, number: int) -> int:
        """What does not grow with the batch is counted as if it were one image's."""
        return number // self.images if number % self.images == 0 else number

    def emit(
        self,
        kind: NodeKind,
        inputs: Sequence[Any],
        axes: Sequence[Axis | None],
        *,
        shape: tuple[int, ...] | None = None,
        module: str | None = None,
        homogeneous: bool = True,
    ) -> Value:
        """The call's output: a value with these axes, and a node unless it is a constant."""
        shape = self.call.shape if shape is None else shape
        assert len(axes) == len(shape), (self.call.operator, axes, shape)
        known = tuple(axis if size > 1 else None for axis, size in zip(axes, shape, strict=True))
        sources = tuple(
            value.node for value in inputs if isinstance(value, Value) and value.node is not None
        )
        if not sources:
            return Value(shape, known)
        known = tuple(axis and replace(axis, origins=frozenset()) for axis in known)
        firm = tuple((n, a.slots) for n, a in enumerate(known) if a is not None and not a.wild)
        tainted = any(axis is not None and axis.taint for axis in known)
        stored = [self._name_of(v) for v in inputs if isinstance(v, Value) and v.constant]
        parameters = tuple(n for n in stored if n is not None and n in self._parameters)
        computed = any(
            isinstance(v, Value) and v.constant and labelled([v]) and name not in self._parameters
            for v in inputs
            for name in [self._stored.get(id(v.axes)) if isinstance(v, Value) else None]
        )
        parameters = () if None in stored else parameters  # one is computed: it is not all of them
        self.nodes.append(
            Flow(
                kind,
                module,
                sources,
                homogeneous,
                str(self.call.operator),
                firm,
                parameters,
                tainted,
                computed,
                self.call.node.name,
            )
        )
        return Value(shape, known, len(self.nodes) - 1)

    # Running a program

    def run(self, program: torch.export.ExportedProgram) -> None:
        values = self._placeholders(program)
        calls = Counter(_calling_module(node) for node in program.graph.nodes)
        for node in program.graph.nodes:
            if node.op == "call_function":
                values[node] = self._run_call(node, values, calls)
            elif node.op == "output":
                self._finish(node, values)

    def _run_call(self, node: fx.Node, values: dict[fx.Node, Any], calls: Counter[str]) -> Any:
        if node.target is operator.getitem:
            source: Any = values[node.args[0]]  # type: ignore[index]
            number: Any = node.args[1]
            self._memory[node] = self._memory.get(node.args[0], node.args[0])  # type: ignore[arg-type, assignment]
            return source[number] if isinstance(source, (list, tuple)) else None
        if any(self._region(argument) is not None for argument in node.args):
            return self._run_region(node, values, calls)
        self.call = self._describe(node, calls)
        known = {key: values.get(key) for key in node.all_input_nodes}
        arguments = tree_map_only(fx.Node, known.__getitem__, _all_arguments(node))
        inputs = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Value)]
        self.uses.update(self._targets[n] for n in known if n in self._targets)
        result = self._apply(node.target, arguments)
        self._block_fixed_sizes([*inputs, *tree_leaves(result)])
        target = node.args[0] if node.args else None
        if isinstance(target, fx.Node) and _may_share(node.target):
            self._memory[node] = self._memory.get(target, target)
        if isinstance(target, fx.Node) and _is_in_place(node.target) and isinstance(result, Value):
            self._write(target, result, values)
        return result

    def _apply(self, target: Any, arguments: Sequence[Any]) -> Any:
        try:
            return find_rule(target)(self, *arguments)
        except Exception as error:  # a use of the operator that its rule did not foresee
            reason = f"{type(error).__name__} in the rule of {target}"
            values = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Value)]
            self.block(labelled(values), reason)
            return unknown(self, *arguments)

    def _run_region(self, node: fx.Node, values: dict[fx.Node, Any], calls: Counter[str]) -> Any:
        """Operators that run without gradients or in another precision are a program in itself."""
        place = next(n for n, arg in enumerate(node.args) if self._region(arg) is not None)
        region = self._region(node.args[place])
        assert region is not None
        inside = [inner for inner in region.graph.nodes if inner.op == "placeholder"]
        for inner, outer in zip(inside, node.args[place + 1 :], strict=True):
            values[inner] = values.get(outer) if isinstance(outer, fx.Node) else None
            if outer in self._targets:
                self._targets[inner] = self._targets[outer]  # type: ignore[index]
        for inner in region.graph.nodes:
            if inner.op == "call_function":
                values[inner] = self._run_call(inner, values, calls)
            elif inner.op == "output":
                results = inner.args[0]
                return tree_map_only(fx.Node, values.get, results)
        return None

    def _region(self, argument: Any) -> fx.GraphModule | None:
        if not isinstance(argument, fx.Node) or argument.op != "get_attr":
            return None
        found = getattr(argument.graph.owning_module, str(argument.target), None)
        return found if isinstance(found, fx.GraphModule) else None

    def _write(self, target: fx.Node, result: Value, values: dict[fx.Node, Any]) -> None:
        """``target`` was written on: so were all values that share its memory."""
        memory = self._memory.get(target, target)
        taint = next((axis.taint for axis in labelled([result]) if axis.taint), "")
        for node, value in values.items():
            if taint and isinstance(value, Value) and self._memory.get(node, node) is memory:
                axes = tuple(axis and axis.tainted(taint) for axis in value.axes)
                values[node] = replace(value, axes=axes)
        values[target] = result

    def _block_fixed_sizes(self, values: Sequence[Any]) -> None:
        name = self.call.module
        while True:
            module = self.model.get_submodule(name)
            if isinstance(module, _FIXED_SIZES):
                axes = labelled(v for v in values if isinstance(v, Value))
                self.block(axes, f"{type(module).__name__} holds on to its sizes")
                return
            if not name:
                return
            name = name.rpartition(".")[0]

    def _placeholders(self, program: torch.export.ExportedProgram) -> dict[fx.Node, Any]:
        values: dict[fx.Node, Any] = {}
        self._targets = {}
        nodes = [node for node in program.graph.nodes if node.op == "placeholder"]
        for node, spec in zip(nodes, program.graph_signature.input_specs, strict=True):
            value = node.meta.get("val")
            if not isinstance(value, Tensor):
                values[node] = None
            elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
                values[node] = self._tensor(str(spec.target), tuple(value.shape))
                self._targets[node] = self._canonical(str(spec.target))
            elif spec.kind is InputKind.USER_INPUT:
                self.nodes.append(Flow("input", None, (), operator=node.name))
                none = (None,) * value.ndim
                values[node] = Value(tuple(value.shape), none, len(self.nodes) - 1)
            else:
                values[node] = Value(tuple(value.shape), (None,) * value.ndim)
        return values

    def _tensor(self, name: str, shape: tuple[int, ...]) -> Value:
        """A parameter or buffer: the same slots in every program, and under all of its names."""
        name = self._canonical(name)
        if isinstance(tensor_of(self.model, name), nn.Parameter):
            self._parameters.add(name)
        if name not in self.tensors:
            fresh = [self.axis(size) for size in shape]
            self.tensors[name] = tuple(
                axis and replace(axis, origins=frozenset({(name, dim)}))
                for dim, axis in enumerate(fresh)
            )
            if shape:
                self._stored[id(self.tensors[name])] = name
        return Value(shape, self.tensors[name])

    def _canonical(self, name: str) -> str:
        """The first of the names of a tied parameter."""
        return self._names.setdefault(id(tensor_of(self.model, name)), name)

    def _finish(self, node: fx.Node, values: dict[fx.Node, Any]) -> None:
        results = [values.get(leaf) for leaf in tree_leaves(node.args) if isinstance(leaf, fx.Node)]
        found = [value for value in results if isinstance(value, Value)]
        for axis in labelled(value for value in found if not value.constant):
            self.table.block(axis.slots, "its channels are the model's outputs")
        sources = tuple(value.node for value in found if value.node is not None)
        self.nodes.append(Flow("output", None, sources))

    def _describe(self, node: fx.Node, calls: Counter[str]) -> Call:
        name = _calling_module(node)
        module = self.model.get_submodule(name)
        line = _line(node)
        where = f"{name or 'the model itself'}, {type(module).__name__}{line and f', {line}'}"
        leaf = name != "" and not list(module.children())
        alone = leaf and calls[name] == 1
        # A class of PyTorch's own that computes one operator, however often it is called.
        plain = leaf and type(module).forward.__module__.startswith("torch.nn.modules")
        results = node.meta.get("val")
        several = isinstance(results, (list, tuple))
        leaves = list(results) if isinstance(results, (list, tuple)) else [results]
        shapes = tuple(_sizes(leaf) for leaf in leaves if isinstance(leaf, Tensor))
        return Call(node.target, node, shapes, several, name, where, alone, alone or plain)


def _sizes(tensor: Tensor) -> tuple[int, ...]:
    """Its shape; a size that depends on values counts as 1, which never shrinks."""
    return tuple(size if isinstance(size, int) else 1 for size in tensor.shape)


def _calling_module(node: fx.Node) -> str:
    stack = list(node.meta.get("nn_module_stack", {}).values())
    # A module that is called again carries a suffix: conv, conv@1, …
    return str(stack[-1][0]).partition("@")[0] if stack else ""


def _line(node: fx.Node) -> str:
    """``file.py:12`` of the innermost line that is not PyTorch's own."""
    frames = [
        frame.split('"')
        for frame in str(node.meta.get("stack_trace") or "").splitlines()
        if frame.lstrip().startswith('File "')
    ]
    torch_folder = str(Path(torch.__file__).parent)
    own = [frame for frame in frames if not frame[1].startswith(torch_folder)]
    if not own:
        return ""
    _, path, rest = own[-1][:3]
    return f"{Path(path).name}:{rest.split('line ')[1].split(',')[0]}"


def _all_arguments(node: fx.Node) -> list[Any]:
    """Every argument of the operator in the order of its schema, defaults filled in."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return [*node.args, *node.kwargs.values()]
    rest = node.target._schema.arguments[len(node.args) :]
    return [*node.args, *(node.kwargs.get(arg.name, arg.default_value) for arg in rest)]


def _may_share(target: Any) -> bool:
    """Whether the output may be a view of the first argument, or that itself."""
    if not isinstance(target, torch._ops.OpOverload):
        return True
    # Composite operators do not tell: they may return views, or what they were given.
    composite = target.has_kernel_for_dispatch_key(DispatchKey.CompositeImplicitAutograd)
    return composite or any(value.alias_info is not None for value in target._schema.returns)


def _is_in_place(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.inplace in target.tags
