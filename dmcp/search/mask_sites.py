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
    *activation* by q, unless that activation has no module of its own to attach to.
    """
    calls = Counter(node.module for node in nodes if node.kind == "activation")
    committed: dict[str, str] = {}
    while True:
        found = _walk(nodes, calls, committed)
        if found == committed:
            return committed
        committed = found


def _walk(
    nodes: Sequence[Node], calls: Counter[str | None], committed: dict[str, str]
) -> dict[str, str]:
    """One pass in execution order; committing a site changes what its other readers see, so the
    caller repeats it until nothing is added."""
    found = dict(committed)
    states: list[_State] = []

    def pending(site: str, owner: str) -> _State:
        return None if site in committed else _Pending(site, owner)

    for node in nodes:
        inputs = [states[number] for number in node.inputs]
        first = inputs[0] if inputs else None
        state: _State = None
        if node.kind in ("dense", "join"):
            found.update({p.site: p.owner for p in inputs if p is not None})
        if node.kind in ("dense", "norm") or (node.kind == "depthwise" and first is not None):
            assert node.module is not None
            state = pending(node.module, node.module)
        elif node.kind == "linear_map" or (node.kind == "activation" and node.homogeneous):
            state = first
        elif node.kind == "activation" and first is not None:
            if node.module is not None and calls[node.module] == 1:
                state = pending(node.module, first.owner)
            else:
                found[first.site] = first.owner
        states.append(state)
    return found
