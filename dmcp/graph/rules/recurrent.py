"""Recurrent layers: they hold on to their sizes, but what they cost is counted."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

from torch.utils._pytree import tree_leaves

from dmcp.graph.rules.registry import rule, unknown
from dmcp.graph.values import Value

if TYPE_CHECKING:
    from dmcp.graph.tracer import Tracer


@rule("lstm", "gru", "rnn_tanh", "rnn_relu")
def recurrent(tracer: Tracer, x: Value, *arguments: Any) -> Any:
    """Every matrix of weights is multiplied once per step of the sequence."""
    weights = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Value) and leaf.constant]
    numbers = sum(prod(weight.shape) for weight in weights if len(weight.shape) == 2)
    tracer.count(numbers * prod(x.shape[:-1]), [])
    return unknown(tracer, x, *arguments)
