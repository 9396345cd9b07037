"""The classes of a network's modules: modules that differ in plain values only share one.

What builds a module is a tree of constructor calls (`Layer`, `Stack`, `Tensors`, `Instance`) whose
values, in one fixed order, are all that may differ between two modules of a class. The values that
do differ become the parameters of its constructor.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain, count

from dmcp.export.expression import Call, Expression, call, is_name, lines, literal
from dmcp.export.forward import Forward
from dmcp.export.layers import Layer, Value

_CHANNELS = ("channels", "features", "groups")


@dataclass(frozen=True)
class Stack:
    """``nn.Sequential(…)`` or ``nn.ModuleList([…])``."""

    function: str
    children: tuple[Tree, ...]


@dataclass(frozen=True)
class Tensors:
    """``torch.empty(8, 1)``: a parameter or buffer, whose values come from the file."""

    shape: tuple[int, ...]
    dtype: str
    trained: bool


@dataclass(frozen=True, eq=False)
class Instance:
    """``Block(24, stride=2)``: one of the classes, with all values inside it."""

    made: ModuleClass
    values: tuple[Value, ...]


Tree = Layer | Stack | Tensors | Instance


@dataclass(eq=False)
class ModuleClass:
    """A class of the generated file.

    Attributes:
        hint: the name to give it.
        members: attribute and what builds it; no attributes where they are ``nn.Sequential``'s.
        is_sequential: whether it is an ``nn.Sequential``.
        forward: None if it is never called, or called as ``nn.Sequential`` is.
        instances: the values of each module of this class.
        endings: statements that end its constructor: two tensors are one, some are not trained.
        name: a unique one, given at the end.
    """

    hint: str
    members: tuple[tuple[str, Tree], ...]
    is_sequential: bool
    forward: Forward | None
    instances: list[tuple[Value, ...]] = field(default_factory=list)
    endings: tuple[str, ...] = ()
    name: str = ""

    def parameters(self) -> dict[int, str]:
        """The places of the values that differ, with the name of each; equal ones share a name."""
        names: dict[tuple[Hashable, ...], str] = {}
        found = {}
        for place, (attribute, value) in enumerate(self._values()):
            column = tuple(values[place].value for values in self.instances)
            if len(set(column)) == 1:
                continue
            is_width = value.name.endswith(_CHANNELS)
            key = ("" if is_width else value.name, *column)
            if key not in names:
                names[key] = _unused(value.name, attribute, set(names.values()))
            found[place] = names[key]
        return found

    def _values(self) -> Iterator[tuple[str, Value]]:
        for attribute, tree in self.members:
            for value in values_of(tree):
                yield attribute, value

    def source(self) -> list[str]:
        """The lines of the class."""
        parameters = self.parameters()
        base = "nn.Sequential" if self.is_sequential else "nn.Module"
        body = [f"class {self.name}({base}):"]
        if self.members or self.forward is None:
            body += [*self._init(parameters), ""]
        if self.forward is not None:
            arguments = [("", "self"), *(("", each) for each in self.forward.parameters)]
            header = Call("forward", tuple(arguments))
            body += lines(header, 1, "def ", f" -> {self.forward.annotation}:")
            body += self.forward.body
        return body if body[-1] else body[:-1]

    def _init(self, parameters: dict[int, str]) -> list[str]:
        typed = dict.fromkeys(f"{name}: {self._types(place)}" for place, name in parameters.items())
        header = Call("__init__", tuple(("", each) for each in ("self", *typed)))
        texts = iter(self._texts(parameters))
        built = [(attribute, _source(tree, texts)) for attribute, tree in self.members]
        initial = [source for attribute, source in built if not attribute]
        body = lines(call("super().__init__", *initial), 2)
        for (attribute, source), (_, tree) in zip(built, self.members, strict=True):
            if isinstance(tree, Tensors) and not tree.trained:
                body += lines(call("self.register_buffer", literal(attribute), source), 2)
            elif attribute and not is_name(attribute):
                body += lines(call("self.add_module", literal(attribute), source), 2)
            elif attribute:
                body += lines(source, 2, f"self.{attribute} = ")
        body += [line for ending in self.endings for line in lines(ending, 2)]
        return [*lines(header, 1, "def ", " -> None:"), *body]

    def _types(self, place: int) -> str:
        """The types that a value has, of all modules of this class."""
        found = (values[place].value for values in self.instances)
        names = ("None" if each is None else type(each).__name__ for each in found)
        return " | ".join(dict.fromkeys(names))

    def _texts(self, parameters: dict[int, str]) -> list[str | None]:
        """The source of every value, None for one that can be left out."""
        texts: list[str | None] = []
        for place, value in enumerate(self.instances[0]):
            usual = all(values[place].usual for values in self.instances)
            text = parameters.get(place, literal(value.value))
            texts.append(None if usual and place not in parameters else text)
        return texts


class Classes:
    """The classes of a network, in the order in which they refer to each other."""

    def __init__(self) -> None:
        self._by_form: dict[Hashable, ModuleClass] = {}

    def add(self, made: ModuleClass) -> Instance:
        """A module of this class, or of an earlier one that is the same."""
        members = tuple((attribute, _form(tree)) for attribute, tree in made.members)
        form = (made.hint, made.is_sequential, made.forward, members)
        values = tuple(value for _, tree in made.members for value in values_of(tree))
        made = self._by_form.setdefault(form, made)
        made.instances.append(values)
        # Where it is built, what its constructor takes has no default.
        return Instance(made, tuple(replace(value, usual=False) for value in values))

    def source(self) -> list[str]:
        """The lines of all classes; the last is the network's."""
        classes = list(self._by_form.values())
        taken = {"F", "Path", "Tensor", "WEIGHTS", "load", "load_file", "nn", "torch"}
        for made in [classes[-1], *classes[:-1]]:  # the network itself keeps its name
            numbered = (f"{made.hint}{number}" for number in count(2))
            made.name = next(name for name in chain([made.hint], numbered) if name not in taken)
            taken.add(made.name)
        return [line for made in classes for line in ("", "", *made.source())]


def values_of(tree: Tree) -> tuple[Value, ...]:
    """The values of a tree, in order."""
    if isinstance(tree, Stack):
        return tuple(value for child in tree.children for value in values_of(child))
    if isinstance(tree, Tensors):
        return (Value("shape", tree.shape),)
    return tree.values


def _form(tree: Tree) -> Hashable:
    """What two trees of one class have in common."""
    if isinstance(tree, Stack):
        return (tree.function, *map(_form, tree.children))
    if isinstance(tree, Tensors):
        return (tree.dtype, tree.trained)
    if isinstance(tree, Instance):
        return id(tree.made)
    return (tree.function, *(value.name for value in tree.values))


def _source(tree: Tree, texts: Iterator[str | None]) -> Expression:
    """The call that builds a tree, with these sources of its values."""
    if isinstance(tree, Stack):
        children = [_source(child, texts) for child in tree.children]
        if tree.function == "nn.ModuleList":
            return call(tree.function, Call("", tuple(("", each) for each in children), "[]"))
        return call(tree.function, *children)
    if isinstance(tree, Tensors):
        shape = next(texts) or ""
        sizes = [size.strip() for size in shape.strip("()").split(",") if size.strip()]
        dtype = {} if tree.dtype == "torch.float32" else {"dtype": tree.dtype}
        empty = call("torch.empty", *(sizes or ["()"]), **dtype)
        return call("nn.Parameter", empty) if tree.trained else empty
    own = [next(texts) for _ in tree.values]
    if isinstance(tree, Instance):
        arguments = {name: own[place] for place, name in tree.made.parameters().items()}
        return call(tree.made.name, **{name: text or "" for name, text in arguments.items()})
    return Call(
        tree.function,
        tuple(
            ("" if value.positional else f"{value.name}=", text)
            for value, text in zip(tree.values, own, strict=True)
            if text is not None
        ),
    )


def _unused(name: str, attribute: str, taken: set[str]) -> str:
    """A name for a parameter: ``in_channels``, ``conv1_channels``, ``stride``."""
    place = re.sub(r"\W|^(?=\d)", "_", attribute) or "layer"
    kind = name.removeprefix("out_")
    choices = [name] if kind == name else []
    choices += [f"{place}_{kind}", *(f"{place}_{kind}{number}" for number in range(2, 1000))]
    return next(each for each in choices if each not in taken)
