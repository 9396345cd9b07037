"""The statements of a ``forward``, from one call of a module."""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils import _pytree as pytree

from dmcp.errors import ExportError
from dmcp.export.calls import Scope, is_number
from dmcp.export.expression import Expression, call, is_name, lines, literal, sequence
from dmcp.export.operators import Read, Training, assignment, express, is_light, name_of

_GLOBALS = {"F", "batch", "float", "nn", "torch"}
_RESERVED = {*_GLOBALS, "inputs", "out", "self"}
_DEPTH = 2


@dataclass(frozen=True)
class Program:
    """What the calls of a network refer to.

    Attributes:
        state: qualified names of the parameters and buffers, by the value that holds one; several
            where they are shared.
        layers: qualified names of the modules that are called as layers of ``torch.nn``.
        numbered: qualified names of the modules whose children are read by their places.
        inputs_of_network: in the order of its signature.
    """

    state: Mapping[Node, Sequence[str]]
    layers: frozenset[str]
    numbered: frozenset[str]
    inputs_of_network: tuple[Node, ...]

    def inputs(self, scope: Scope) -> list[Node]:
        """The tensors that a module is called with: all but its own parameters and buffers."""
        if not scope.module:
            return [*self.inputs_of_network]
        return [each for each in scope.inputs() if self.path(each, scope) is None]

    def path(self, node: Node, scope: Scope) -> str | None:
        """``self.bias``: how a module reads a parameter or buffer of its own."""
        paths = (self.access(scope.module, name) for name in self.state.get(node, ()))
        return next((path for path in paths if path is not None), None)

    def access(self, owner: str, name: str) -> str | None:
        """``self.blocks[0].bias``: how a module reads what has this qualified name; None if it is
        not inside of it."""
        prefix = f"{owner}." if owner else ""
        if not name.startswith(prefix):
            return None
        source, at = "self", owner
        for part in name.removeprefix(prefix).split("."):
            if at in self.numbered and part.isdigit():
                source += f"[{part}]"
            else:
                source += f".{part}" if is_name(part) else f".get_submodule({literal(part)})"
            at = f"{at}.{part}" if at else part
        return source


@dataclass
class _Step:
    """A statement to be, or a part of one.

    Attributes:
        reads: the tensors it takes, in order, as often as it takes them.
        writes: the tensors it gives.
        express: gives its source.
        light: whether it is written around what it takes.
        label: a name for what it gives.
        assigns: ``+=`` and the operand, if it is such a statement.
    """

    reads: list[Node]
    writes: list[Node | None]
    express: Callable[[Read], Expression]
    light: bool
    label: str = "out"
    assigns: tuple[str, Any] | None = None


@dataclass(frozen=True)
class Forward:
    """The source of a ``forward``: its parameters without ``self``, what it gives, its lines."""

    parameters: tuple[str, ...]
    annotation: str
    body: tuple[str, ...]


def forward_of(scope: Scope, program: Program, result: object = None) -> Forward:
    """The source of one call.

    Args:
        scope: the call.
        program: what it refers to.
        result: the structure of its outputs, with values as leaves; those that are read outside
            if it is None.

    Raises:
        ExportError: an operator has no source.
    """
    return _Writer(scope, program, result).write()


class _Writer:
    def __init__(self, scope: Scope, program: Program, result: object) -> None:
        self.scope = scope
        self.program = program
        self.inputs = program.inputs(scope)
        if result is None:
            outputs = scope.outputs()
            result = outputs[0] if len(outputs) == 1 else tuple(outputs)
        self.result = result
        self.returned = [each for each in pytree.tree_leaves(result) if isinstance(each, Node)]
        self.steps = [step for each in scope.steps for step in self._step(each)]
        self.uses = Counter(node for step in self.steps for node in step.reads)
        self.uses.update(self.returned)
        self.names: dict[Node, str] = {}
        self.inlined: dict[Node, _Step] = {}
        self.takes_list = self._takes_list()
        self.reads_batch = False

    def write(self) -> Forward:
        parameters = self._parameters()
        hosts = self._hosts()
        last: dict[Node, int] = {}  # statement that reads a value last
        for step, host in zip(self.steps, hosts, strict=True):
            last.update(dict.fromkeys(step.reads, host))
        last.update(dict.fromkeys(self.returned, len(self.steps)))
        body: list[str] = []
        for index, step in enumerate(self.steps):
            if hosts[index] != index:
                (node,) = step.writes
                assert node is not None
                self.inlined[node] = step
            elif self._is_returned(index):
                expression = step.express(self.read)
                return self._forward(parameters, [*body, *lines(expression, _DEPTH, "return ")])
            else:
                body += self._statement(index, step, last)
        leaves = pytree.tree_map(lambda leaf: str(self.read(leaf)), self.result)
        source = _structure(leaves)
        if isinstance(leaves, tuple) and len(leaves) > 1:
            source = source[1:-1]
        return self._forward(parameters, [*body, *lines(source, _DEPTH, "return ")])

    def _forward(self, parameters: Sequence[str], body: list[str]) -> Forward:
        if self.reads_batch:
            body = [f"{'    ' * _DEPTH}batch = {self._batch()}", *body]
        return Forward(tuple(parameters), _annotation(self.result), tuple(body))

    def _step(self, step: Node | Scope) -> list[_Step]:
        if isinstance(step, Scope):
            return self._call(step)
        if step.target is operator.getitem:
            return []  # a part of the operator before it
        reads: list[Node] = []
        torch.fx.map_arg((step.args, step.kwargs), reads.append)
        own = [node for node in reads if not is_number(node)]
        own = [node for node in own if self.program.path(node, self.scope) is None]
        # A parameter or buffer is no variable that could be assigned to.
        symbol = assignment(step) if own[:1] == [step.args[0]] else None
        return [
            _Step(
                own,
                self._results(step),
                lambda read: self._express(step, read),
                is_light(step),
                assigns=(symbol, step.args[1]) if symbol else None,
            )
        ]

    def _results(self, node: Node) -> list[Node | None]:
        """The tensors that an operator gives; None where nothing reads one."""
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            return [node]
        if not isinstance(value, list | tuple):
            raise self._refusal(node)
        parts = {user.args[1]: user for user in node.users if user.target is operator.getitem}
        if len(parts) < len(node.users):
            raise self._refusal(node)
        return [parts.get(place) for place in range(len(value))]

    def _call(self, scope: Scope) -> list[_Step]:
        reads, writes = self.program.inputs(scope), scope.outputs()
        if not writes and not reads:
            return []
        function = self.program.access(self.scope.module, scope.module)
        if function is None:
            raise ExportError(
                f"{scope.module or 'the network'} is called by {self.scope.module}, which does not "
                "hold it: that has no form in Python"
            )
        is_layer = scope.module in self.program.layers
        light = is_layer and all(is_light(node) for node in scope.nodes())
        label = scope.module.rpartition(".")[2]
        label = "out" if is_layer or not is_name(label) else label
        return [
            _Step(reads, [*writes], lambda read: call(function, *map(read, reads)), light, label)
        ]

    def _express(self, node: Node, read: Read) -> Expression:
        try:
            source = express(node, read)
        except (KeyError, TypeError, ValueError) as error:
            raise self._refusal(node) from error
        if source is None:
            raise self._refusal(node)
        return source

    def _refusal(self, node: Node) -> ExportError:
        place = f"module {self.scope.module}" if self.scope.module else "the network's forward"
        return ExportError(
            f"operator {node.target} in {place} has no form in Python that needs torch only"
        )

    def _hosts(self) -> list[int]:
        """For every step, the one that it is written inside of: itself, or a later one."""
        hosts = list(range(len(self.steps)))
        for index in reversed(range(len(self.steps) - 1)):
            step, following = self.steps[index], self.steps[index + 1]
            inside = (
                following.light
                and step.assigns is None
                and following.reads[:1] == step.writes
                and self.uses[following.reads[0]] == 1
            )
            if inside:
                hosts[index] = hosts[index + 1]
        return hosts

    def _is_returned(self, index: int) -> bool:
        """Whether a statement gives what the call gives, and nothing else reads it."""
        step = self.steps[index]
        is_last = index == len(self.steps) - 1 and step.assigns is None
        return is_last and step.writes == [self.result] and self.uses[self.returned[0]] == 1

    def _statement(self, index: int, step: _Step, last: Mapping[Node, int]) -> list[str]:
        dying = [node for node in self._reads(step) if last[node] <= index and node in self.names]
        dying.sort(key=lambda node: self.names[node] != "x")
        reused = next((node for node in dying if self._may_reuse(node)), None)
        if step.assigns is not None and step.reads[0] in dying and step.writes[0] is not None:
            symbol, operand = step.assigns
            target = self.names[step.writes[0]] = self.names[step.reads[0]]
            return lines(self.read(operand), _DEPTH, f"{target} {symbol} ")
        expression = step.express(self.read)
        live = {name for node, name in self.names.items() if last.get(node, -1) > index}
        targets = []
        for node in step.writes:
            if node is None or node not in last:  # nothing reads it
                targets.append("_")
                continue
            name = self.names[reused] if reused else self._fresh(step.label, live)
            reused = None
            self.names[node] = name
            live.add(name)
            targets.append(name)
        if set(targets) <= {"_"}:  # an operator in place
            return lines(expression, _DEPTH)
        return lines(expression, _DEPTH, f"{', '.join(targets)} = ")

    def _reads(self, step: _Step) -> list[Node]:
        """What a statement reads, with all that is written inside of it."""
        return [
            each
            for node in step.reads
            for each in (self._reads(self.inlined[node]) if node in self.inlined else [node])
        ]

    def _may_reuse(self, node: Node) -> bool:
        return node not in self.inputs or self.names[node] == "x"

    def _fresh(self, label: str, live: set[str]) -> str:
        taken = live | {self.names[node] for node in self.inputs if node in self.names}
        if label in _RESERVED:
            label = "out"
        numbered = (f"{label}{number}" for number in count(2))
        return next(name for name in chain(["x", label], numbered) if name not in taken)

    def _parameters(self) -> list[str]:
        if self.takes_list:
            return ["*inputs: Tensor"]
        if not self.scope.module:
            names = [str(node.target) for node in self.inputs]
            names = [f"{name}_" if name in _GLOBALS else name for name in names]
        elif len(self.inputs) <= len("xyz"):
            names = list("xyz")[: len(self.inputs)]
        else:
            names = [f"x{number}" for number, _ in enumerate(self.inputs, 1)]
        self.names = dict(zip(self.inputs, names, strict=True))
        return [f"{name}: Tensor" for name in names]

    def _takes_list(self) -> bool:
        """Whether all it does with its inputs is to concatenate them."""
        first = next(iter(self.scope.steps), None)
        return (
            bool(self.scope.module)
            and isinstance(first, Node)
            and name_of(first) == "cat"
            and first.args[0] == self.inputs
            and all(self.uses[node] == 1 for node in self.inputs)
        )

    def read(self, value: Any) -> Expression:
        """The source of an argument."""
        if isinstance(value, Training):
            return "self.training"
        if isinstance(value, list | tuple):
            if self.takes_list and value == self.inputs:
                return "inputs"
            return sequence(value, [str(self.read(each)) for each in value])
        if isinstance(value, torch.device):
            return f"{self._input()}.device"
        if not isinstance(value, Node):
            return literal(value)
        if is_number(value):
            return self._number(value)
        if value in self.inlined:
            return self.inlined[value].express(self.read)
        return self.program.path(value, self.scope) or self.names[value]

    def _number(self, node: Node) -> str:
        value = node.meta["val"]
        if isinstance(value, int | float):
            return literal(value)
        symbols = list(value.node.expr.free_symbols)
        if len(symbols) != 1 or str(symbols[0]).startswith("u"):
            raise ExportError(
                f"{node.target} in {self.scope.module or 'the network'} depends on values: "
                "that has no form in Python"
            )
        self.reads_batch = True
        text = str(value.node.expr).replace(str(symbols[0]), "batch")
        return re.sub(r"\s*(\*\*|//|\*)\s*", r" \1 ", text)

    def _batch(self) -> str:
        for node in self.inputs:
            for place, size in enumerate(node.meta["val"].shape):
                if isinstance(size, torch.SymInt) and size.node.expr.is_symbol:
                    return f"{self._input(node)}.shape[{place}]"
        raise ExportError(f"nothing that {self.scope.module} takes tells it the batch size")

    def _input(self, node: Node | None = None) -> str:
        """One of the inputs, at the beginning."""
        if not self.inputs:
            raise ExportError(f"{self.scope.module} takes no tensor, and makes one")
        return "inputs[0]" if self.takes_list else self.names[node or self.inputs[0]]


def _structure(value: Any) -> str:
    """A structure of sources, as source."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        entries = (f"{literal(key)}: {_structure(each)}" for key, each in value.items())
        return "{" + ", ".join(entries) + "}"
    if type(value) not in (tuple, list):
        raise ExportError(f"the network gives a {type(value).__name__}: that has no plain form")
    return sequence(value, [_structure(each) for each in value])


def _annotation(result: Any) -> str:
    """The type of a structure of tensors."""
    if isinstance(result, Node):
        return "Tensor"
    if not isinstance(result, tuple | list | dict):
        return "object"
    parts = [
        _annotation(each) for each in (result.values() if isinstance(result, dict) else result)
    ]
    if isinstance(result, tuple):
        return f"tuple[{', '.join(parts)}]"
    kinds = " | ".join(dict.fromkeys(parts))
    return f"dict[str, {kinds}]" if isinstance(result, dict) else f"list[{kinds}]"
