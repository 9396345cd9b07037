"""The source of a network: a module of plain PyTorch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node
from torch.utils import _pytree as pytree

from dmcp.errors import ExportError
from dmcp.export.calls import Scope, calls_of
from dmcp.export.classes import Classes, Instance, ModuleClass, Stack, Tensors, Tree
from dmcp.export.expression import is_name
from dmcp.export.forward import Forward, Program, forward_of
from dmcp.export.layers import Layer, layer_of

_STATE = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


@dataclass(frozen=True)
class Source:
    """A network in Python.

    Attributes:
        title: the name of its class.
        classes: the lines of all classes.
        state: what they need to be loaded with, by qualified name: the network's state dict and
            whatever tensors it keeps outside of that.
        tied: whether some of these are one tensor.
    """

    title: str
    classes: list[str]
    state: dict[str, Tensor]
    tied: bool


def source_of(model: nn.Module, program: ExportedProgram) -> Source:
    """The source of a network, from its program.

    Raises:
        ExportError: something in it has no form in Python; the message names it and its place.
    """
    return _Writer(model, program).write()


class _Writer:
    def __init__(self, model: nn.Module, program: ExportedProgram) -> None:
        self.model = model
        graph = program.graph_module.graph
        root = calls_of(graph)
        self.calls: dict[str, list[Scope]] = {}
        for scope in root.scopes():
            self.calls.setdefault(scope.module, []).append(scope)
        values = {node.name: node for node in graph.nodes}
        state: dict[Node, list[str]] = {}
        held = {
            **dict(model.named_parameters(remove_duplicate=False)),
            **dict(model.named_buffers(remove_duplicate=False)),
        }
        names: dict[int, list[str]] = {}
        for name, tensor in held.items():
            names.setdefault(id(tensor), []).append(name)
        self.held, self.names = held, names.values()
        self.constants: dict[str, Tensor] = {}
        inputs = tuple(values[name] for name in program.graph_signature.user_inputs)
        for spec in program.graph_signature.input_specs:
            name = str(spec.target)
            if spec.kind in _STATE:
                state[values[spec.arg.name]] = names[id(held[name])] if name in held else [name]
            if spec.kind is InputKind.CONSTANT_TENSOR:
                self.constants[name] = program.constants[name]
        every = dict(model.named_modules(remove_duplicate=False))
        numbered = frozenset(name for name, module in every.items() if _is_numbered(module))
        of_calls = Program(state, frozenset(), numbered, inputs)
        self.layers = {
            name: layer
            for name, module in every.items()
            if name and self._is_called_plainly(name, of_calls) and (layer := layer_of(module))
        }
        self.program = replace(of_calls, layers=frozenset(self.layers))
        (output,) = (node for node in graph.nodes if node.op == "output")
        assert program.call_spec.out_spec is not None
        self.result = pytree.tree_unflatten(output.args[0], program.call_spec.out_spec)
        self.classes = Classes()

    def write(self) -> Source:
        ties = {name: first for first, *others in self.names for name in others}
        made = self._class("", self.model).made
        access = partial(self.program.access, "")
        tied = (f"{access(name)} = {access(other)}" for name, other in ties.items())
        made.endings = (*tied, *self._untrained("", self.model))
        lines = self.classes.source()
        return Source(made.name, lines, {**self.held, **self.constants}, bool(ties))

    def _untrained(self, name: str, module: nn.Module) -> Iterator[str]:
        """Statements that freeze the parameters that are frozen, whole modules where they are."""
        if all(parameter.requires_grad for parameter in module.parameters()):
            return
        if not any(parameter.requires_grad for parameter in module.parameters()):
            yield f"{self.program.access('', name) if name else 'self'}.requires_grad_(False)"
            return
        prefix = f"{name}." if name else ""
        for key, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                yield f"{self.program.access('', prefix + key)}.requires_grad_(False)"
        for key, child in module.named_children():
            yield from self._untrained(prefix + key, child)

    def _is_called_plainly(self, name: str, program: Program) -> bool:
        """Whether every call takes one tensor and gives one."""
        return all(
            len(program.inputs(scope)) == 1 and len(scope.outputs()) == 1
            for scope in self.calls.get(name, [])
        )

    def _tree(self, name: str, module: nn.Module) -> Tree:
        if name in self.layers:
            return self.layers[name]
        if type(module) is nn.ModuleList and name not in self.calls:
            return Stack("nn.ModuleList", self._numbered(name, module))
        if _is_numbered(module) and self._is_chain(name, module):
            return Stack("nn.Sequential", self._numbered(name, module))
        return self._class(name, module)

    def _class(self, name: str, module: nn.Module) -> Instance:
        members: list[tuple[str, Tree]] = []
        is_sequential = bool(module._modules) and _is_numbered(module)
        if is_sequential:
            members = [("", tree) for tree in self._numbered(name, module)]
        for key, tensor in {**module._parameters, **module._buffers, **self._held(name)}.items():
            if tensor is not None:
                if not is_name(key):
                    raise ExportError(
                        f"{name or 'the network'} holds a tensor named {key!r}, no name in Python"
                    )
                shape, dtype = tuple(tensor.shape), str(tensor.dtype)
                members.append((key, Tensors(shape, dtype, isinstance(tensor, nn.Parameter))))
        for key, child in module._modules.items():
            full = f"{name}.{key}" if name else key
            if not is_sequential and child is not None and self._is_needed(full, child):
                members.append((key, self._tree(full, child)))
        forward = None
        if not (is_sequential and self._is_chain(name, module)):
            forward = self._forward(name)
        made = ModuleClass(_title(name, module), tuple(members), is_sequential, forward)
        return self.classes.add(made)

    def _forward(self, name: str) -> Forward | None:
        result = None if name else self.result
        found = [forward_of(scope, self.program, result) for scope in self.calls.get(name, [])]
        if any(each != found[0] for each in found):
            raise ExportError(
                f"module {name} is called in different ways, which one class cannot have"
            )
        return found[0] if found else None

    def _numbered(self, name: str, module: nn.Module) -> tuple[Tree, ...]:
        children = []
        for key, child in module._modules.items():
            full = f"{name}.{key}" if name else key
            assert child is not None
            needed = self._is_needed(full, child)
            children.append(self._tree(full, child) if needed else Layer("nn.Identity", ()))
        return tuple(children)

    def _is_needed(self, name: str, module: nn.Module) -> bool:
        return bool(module.state_dict()) or any(
            call == name or call.startswith(f"{name}.") for call in self.calls
        )

    def _is_chain(self, name: str, module: nn.Module) -> bool:
        """Whether every call passes one tensor from child to child, in their order."""
        prefix = f"{name}." if name else ""
        order = [f"{prefix}{key}" for key in module._modules]
        return bool(self.calls.get(name)) and all(
            self._passes(scope, order) for scope in self.calls[name]
        )

    def _passes(self, scope: Scope, order: list[str]) -> bool:
        called = {step.module for step in scope.steps if isinstance(step, Scope)}
        if any(self._is_needed(each, self.model.get_submodule(each)) for each in {*order} - called):
            return False
        inputs = self.program.inputs(scope)
        steps = [step for step in scope.steps if isinstance(step, Scope)]
        places = [order.index(step.module) for step in steps if step.module in order]
        if len(inputs) != 1 or len(places) != len(scope.steps) or sorted(set(places)) != places:
            return False
        value = inputs
        for step in steps:
            if self.program.inputs(step) != value:
                return False
            value = step.outputs()
        given = scope.outputs() if scope.module else [self.result]
        return value == given

    def _held(self, name: str) -> dict[str, Tensor]:
        """The tensors that a module holds, but not as parameters or buffers."""
        places = {each: each.rpartition(".") for each in self.constants}
        return {key: self.constants[each] for each, (at, _, key) in places.items() if at == name}


def _is_numbered(module: nn.Module) -> bool:
    return list(module._modules) == [str(place) for place in range(len(module._modules))]


def _title(name: str, module: nn.Module) -> str:
    """A name for a module's class: its own, or that of its place if it has none."""
    kind = type(module)
    if not kind.__module__.startswith("torch."):
        title = kind.__name__.lstrip("_")
        title = title[:1].upper() + title[1:]
    elif name:
        place = next((part for part in reversed(name.split(".")) if not part.isdigit()), "")
        title = "".join(part[:1].upper() + part[1:] for part in re.split(r"[\W_]+", place))
    else:
        title = "Network"
    return title if is_name(title) else "Block"
