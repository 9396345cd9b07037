"""Where in a network the soft masks belong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dmcp.graph import Node
from dmcp.graph.channel_graph import NodeKind


@dataclass(frozen=True)
class MaskSites:
    """The places at which values are scaled.

    Attributes:
        modules: qualified name of a module -> number of the node that is its output: the output is
            scaled there.
        parameters: qualified name of a parameter -> number of the node that reads it, in functional
            calls: the parameter is scaled along the dimensions that make the node's channels.
        missing: numbers of nodes whose values ought to be scaled and cannot be.
    """

    modules: dict[str, int] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    missing: set[int] = field(default_factory=set)


_State = int | None
"""Number of the node behind which a value may still be scaled; None if it is scaled, or has nothing
to scale; `_OPEN`."""

_OPEN = -1
"""The value is not scaled and need not be: a gate, whose product with a scaled value is."""


def mask_sites(nodes: Sequence[Node]) -> MaskSites:
    """The places of the masks.

    Every value that mixes with others (a dense layer's input, a residual sum, a concatenation)
    must be scaled exactly once; of the factors of a product, one. A mask in front of a norm is
    cancelled by it, so it moves past norms and past the depthwise convolutions that lead to them;
    it comes after an activation that does not commute with it (ReLU6), as retaining a channel with
    probability q scales its *activation* by q, unless that activation has no module of its own to
    attach to. What is added to scaled values (the bias of a depthwise convolution, a parameter) is
    not scaled yet: it is in its place.
    """
    calls = Counter(node.module for node in nodes)
    committed: frozenset[int] = frozenset()
    while True:
        found, sites = _walk(nodes, calls, committed)
        if found == committed:
            return sites
        committed = found


def _walk(
    nodes: Sequence[Node], calls: Mapping[str | None, int], committed: frozenset[int]
) -> tuple[frozenset[int], MaskSites]:
    """One pass in execution order. Whether a value is scaled at its site depends on all of its
    readers, so the caller repeats the pass with what the last one found; as a site depends on
    earlier ones only, this settles."""
    found: set[int] = set()
    sites = MaskSites()
    states: list[_State] = []

    def commit(number: int) -> None:
        found.add(number)
        _place(nodes[number], number, sites)

    for number, node in enumerate(nodes):
        inputs = [states[source] for source in node.inputs]
        pending = [state for state in inputs if state is not None and state != _OPEN]
        once = node.module is not None and calls[node.module] == 1
        moves = node.kind in ("depthwise", "activation") and once
        if node.kind == "linear_map" or (node.kind == "activation" and node.homogeneous):
            states.append(inputs[0])
        elif node.kind == "activation" and node.tainted and not moves:
            states.append(_OPEN)
        elif moves:
            unscaled = bool(pending) and pending[0] not in committed
            follows = unscaled or (node.kind == "depthwise" and not node.homogeneous)
            states.append(number if follows else None)
        elif node.kind == "depthwise" and node.homogeneous:
            states.append(inputs[0])
        elif node.kind == "product":
            if pending and None not in inputs and not found.intersection(pending):
                commit(pending[0])
            states.append(None)
        else:
            if node.kind not in ("norm", "output"):
                for state in pending:
                    commit(state)
            if node.kind in ("depthwise", "activation") and not node.homogeneous:
                added = node.parameters[1:] if node.kind == "depthwise" else node.parameters
                sites.parameters.update(dict.fromkeys(added, number))
                if node.computed and node.axes:
                    sites.missing.add(number)
            states.append(number if node.kind in ("dense", "norm") else None)
    return frozenset(found), sites


def _place(node: Node, number: int, sites: MaskSites) -> None:
    if not node.axes:
        return
    if len(node.axes) > 1:
        sites.missing.add(number)
    elif node.module is not None:
        sites.modules[node.module] = number
    elif node.parameters:
        sites.parameters.update(dict.fromkeys(node.parameters, number))
    else:
        sites.missing.add(number)


@dataclass(frozen=True)
class Fusable:
    """Modules that are called once and whose output only the next one reads.

    Attributes:
        norms: convolution -> the norm behind it.
        activations: norm -> the activation behind it.
    """

    norms: dict[str, str]
    activations: dict[str, str]


def fusable(nodes: Sequence[Node]) -> Fusable:
    """Where one module may compute what the next ones do."""
    calls = Counter(node.module for node in nodes)
    readers: list[list[int]] = [[] for _ in nodes]
    for number, node in enumerate(nodes):
        for source in node.inputs:
            readers[source].append(number)

    def followed(first: tuple[NodeKind, ...], second: NodeKind) -> dict[str, str]:
        found: dict[str, str] = {}
        for node, reading in zip(nodes, readers, strict=True):
            if node.kind not in first or node.module is None or len(reading) != 1:
                continue
            reader = nodes[reading[0]]
            if reader.kind != second or reader.module is None:
                continue
            if calls[node.module] == calls[reader.module] == 1:
                found[node.module] = reader.module
        return found

    return Fusable(followed(("dense", "depthwise"), "norm"), followed(("norm",), "activation"))
