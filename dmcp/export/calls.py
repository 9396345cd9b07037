"""The calls of modules in a captured program."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch.fx import Graph, Node


@dataclass
class Scope:
    """One call of a module: the operators it ran itself, and the calls it made.

    Attributes:
        module: its qualified name.
        steps: what ran, in order.
    """

    module: str
    steps: list[Node | Scope] = field(default_factory=list)

    def nodes(self) -> Iterator[Node]:
        """Every operator that ran, also inside the calls."""
        for step in self.steps:
            yield from (step,) if isinstance(step, Node) else step.nodes()

    def scopes(self) -> Iterator[Scope]:
        """This call and all inside it."""
        yield self
        for step in self.steps:
            if isinstance(step, Scope):
                yield from step.scopes()

    def inputs(self) -> list[Node]:
        """The tensors from outside that it reads, in the order of their first use."""
        own = set(self.nodes())
        read = dict.fromkeys(each for node in self.nodes() for each in node.all_input_nodes)
        return [each for each in read if each not in own and not is_number(each)]

    def outputs(self) -> list[Node]:
        """The tensors that are read outside of it, in the order of their making."""
        own = set(self.nodes())
        return [node for node in self.nodes() if not own.issuperset(node.users)]


def calls_of(graph: Graph) -> Scope:
    """The call of the whole network; what does nothing, as checks of sizes do, leaves the graph."""
    for node in reversed(graph.nodes):
        if node.target is torch.ops.aten.slice.Tensor and [*node.args[2:]] == [0, sys.maxsize]:
            node.replace_all_uses_with(node.args[0])  # x[:] of every dimension before another
        if node.op == "call_function" and not node.users and not is_in_place(node):
            graph.erase_node(node)
    root = Scope("")
    stack = [("", root)]
    for node in graph.nodes:
        if node.op != "call_function" or is_number(node):
            continue
        # What belongs to no module, as constants do, is the network's own.
        frames = [*(node.meta.get("nn_module_stack") or {}).items()][1:]
        same = 0
        while same < min(len(frames), len(stack) - 1) and frames[same][0] == stack[same + 1][0]:
            same += 1
        del stack[same + 1 :]
        for key, (module, _) in frames[same:]:
            scope = Scope(module.partition("@")[0])
            stack[-1][1].steps.append(scope)
            stack.append((key, scope))
        stack[-1][1].steps.append(node)
    return root


def is_number(node: Node) -> bool:
    """Whether a value is a number, as sizes are, and no tensor."""
    numbers = torch.SymInt | torch.SymFloat | torch.SymBool | int | float
    return isinstance(node.meta.get("val"), numbers)


def is_in_place(node: Node) -> bool:
    """Whether an operator changes its first input."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
