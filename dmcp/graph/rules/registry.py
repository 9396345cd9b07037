"""Which rule follows which operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_leaves

from dmcp.graph.values import Value, labelled

if TYPE_CHECKING:
    from dmcp.graph.tracer import Tracer

Rule = Callable[..., Any]
"""Takes the tracer and all arguments of the operator in the order of its schema, tensors as
`Value` (None for what is no tensor); returns a `Value`, or a list of them."""

_RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operators of ``torch.ops.aten``, by names such as ``"relu"`` (every
    overload, in place or not) or ``"add.Tensor"``."""

    def register(function: Rule) -> Rule:
        _RULES.update(dict.fromkeys(names, function))
        return function

    return register


def find_rule(target: Any) -> Rule:
    """The rule of an operator; `unknown` where there is none."""
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return unknown
    name = target._schema.name.removeprefix("aten::")
    overload = target._overloadname
    for key in (f"{name}.{overload}", name, name.rstrip("_")):
        if key in _RULES:
            return _RULES[key]
    if torch.Tag.pointwise in target.tags:
        return _RULES["pointwise"]
    return unknown


@rule("_assert_tensor_metadata", "_assert_async", "_assert_scalar")
def assertion(_tracer: Tracer, *_: Any) -> None:
    """What ``torch.export`` checks beside the computation."""


def unknown(tracer: Tracer, *arguments: Any) -> Any:
    """An operator that nobody wrote a rule for: whatever reaches it stays."""
    values = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Value)]
    name = str(tracer.call.operator).removeprefix("aten.")
    tracer.block(labelled(values), f"the operator {name} is not understood")
    results = [
        tracer.emit("join", values, [None] * len(shape), shape=shape)
        for shape in tracer.call.shapes
    ]
    if tracer.call.several:
        return results
    return results[0] if results else None
