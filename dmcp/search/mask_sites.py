"""Where in a network the soft masks belong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from dmcp.graph import Node


@dataclass(frozen=True)
class _Pending:
    """A value that is not scaled yet and may still be, at ``site``.

    Attributes:
        site: module at whose output the mask would sit.
        owner: module that holds parameters and whose output axis the mask follows.
    """

    site: str
    owner: str


_State = _Pending | None
"""None: the value is scaled, or has nothing to scale."""


def mask_sites(nodes: Sequence[Node]) -> dict[str, str]:
    """The modules whose outputs are masked, each with the module whose output axis it follows.

    Every value that mixes with others (a dense layer's input, a residual sum, a concatenation)
    must be scaled exactly once. A mask in front of a norm is cancelled by it, so it moves past
    norms and past the depthwise convolutions that lead to them; it comes after an activation that
    does not commute with it (ReLU6), as retaining a channel with probability q scales its
    *activation* by q, unless that activation has no module of its own to attach to. The bias of a
    depthwise convolution that reads scaled values is not scaled yet, so its output is masked too.
    """
    calls = Counter(node.module for node in nodes)
    committed: dict[str, str] = {}
    while True:
        found = _walk(nodes, calls, committed)
        if found == committed:
            return committed
        committed = found


def _walk(
    nodes: Sequence[Node], calls: Counter[str | None], committed: dict[str, str]
) -> dict[str, str]:
    """One pass in execution order. Whether a value is scaled at its site depends on all of its
    readers, so the caller repeats the pass with what the last one found; as a site depends on
    earlier ones only, this settles."""
    found: dict[str, str] = {}
    states: list[_State] = []
    for node in nodes:
        inputs = [states[number] for number in node.inputs]
        once = node.module is not None and calls[node.module] == 1
        if node.kind == "linear_map" or (node.kind == "activation" and node.homogeneous):
            states.append(inputs[0])
        elif node.kind in ("depthwise", "activation") and once:
            states.append(_moved(node, inputs[0], committed))
        else:
            if node.kind not in ("norm", "output"):
                found.update({value.site: value.owner for value in inputs if value is not None})
            states.append(_produced(node))
    return found


def _produced(node: Node) -> _State:
    """The value that a dense layer or a norm makes; those of other nodes are scaled already."""
    if node.kind not in ("dense", "norm"):
        return None
    assert node.module is not None
    return _Pending(node.module, node.module)


def _moved(node: Node, value: _State, committed: dict[str, str]) -> _State:
    """The value behind a depthwise convolution or an activation that a mask may move past."""
    assert node.module is not None
    unscaled = value if value is not None and value.site not in committed else None
    if node.kind == "activation":
        return None if unscaled is None else _Pending(node.module, unscaled.owner)
    return None if unscaled is None and node.homogeneous else _Pending(node.module, node.module)


def fusable_activations(nodes: Sequence[Node]) -> dict[str, str]:
    """Norm modules, each with the activation module that alone reads what the norm makes; both are
    called once, so that the norm may compute the activation too."""
    calls = Counter(node.module for node in nodes)
    readers = [[n for n, node in enumerate(nodes) if i in node.inputs] for i in range(len(nodes))]
    found: dict[str, str] = {}
    for node, reading in zip(nodes, readers, strict=True):
        if node.kind != "norm" or node.module is None or len(reading) != 1:
            continue
        reader = nodes[reading[0]]
        if reader.kind != "activation" or reader.module is None:
            continue
        if calls[node.module] == calls[reader.module] == 1:
            found[node.module] = reader.module
    return found
