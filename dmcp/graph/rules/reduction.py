"""Operators that reduce dimensions, or run along one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dmcp.graph.channel_graph import NodeKind
from dmcp.graph.rules.registry import rule
from dmcp.graph.values import Axis, Value

if TYPE_CHECKING:
    from dmcp.graph.tracer import Tracer

_ADDITIVE = ("sum", "linalg_vector_norm", "norm", "nansum")
_KEEP_ZERO = (*_ADDITIVE, "mean", "amax", "amin", "max", "min", "prod", "std", "var", "median")


@rule(
    "all",
    "amax",
    "amin",
    "any",
    "argmax",
    "argmin",
    "linalg_vector_norm",
    "logsumexp",
    "max.dim",
    "max.default",
    "mean",
    "median.dim",
    "min.dim",
    "min.default",
    "norm",
    "prod",
    "std",
    "sum",
    "var",
    "var_mean",
    "std_mean",
)
def reduce(tracer: Tracer, x: Value, *arguments: Any) -> Any:
    """A sum of channels that are zero is the same without them; nothing else is."""
    schema = [argument.name for argument in tracer.call.operator._schema.arguments[1:]]
    options = dict(zip(schema, arguments, strict=False))
    name = tracer.call.operator._schema.name.removeprefix("aten::")
    given = options.get("dim")
    every = [given] if isinstance(given, int) else given or range(len(x.shape))
    dims = {x.dim(dim) for dim in every}
    for dim in dims:
        _reduce(tracer, x, dim, name)
    is_zero = name in _KEEP_ZERO
    reason = f"{name} of zeros need not be zero ({tracer.call.where})"
    axes = [axis if is_zero else axis and axis.tainted(reason) for axis in x.axes]
    kept: Sequence[Axis | None] = [axis for dim, axis in enumerate(axes) if dim not in dims]
    if options.get("keepdim"):
        kept = [None if dim in dims else axis for dim, axis in enumerate(axes)]
    kind: NodeKind = "linear_map" if name in ("sum", "mean", "amax", "max") else "join"
    results = [tracer.emit(kind, [x], kept, shape=shape) for shape in tracer.call.shapes]
    return results if tracer.call.several else results[0]


def _reduce(tracer: Tracer, x: Value, dim: int, name: str) -> None:
    axis = x.axes[dim]
    if x.constant or name not in _ADDITIVE:
        words = "weights" if x.constant else "channels"
        tracer.block(axis, f"{name} runs over its {words}")
    elif axis is not None:
        tracer.sum_over([axis])


@rule("softmax", "log_softmax", "_softmax", "cumsum", "cumprod", "sort", "topk", "logcumsumexp")
def along(tracer: Tracer, x: Value, *arguments: Any) -> Any:
    """Every position depends on all others along one dimension."""
    schema = [argument.name for argument in tracer.call.operator._schema.arguments[1:]]
    dim = x.dim(dict(zip(schema, arguments, strict=False)).get("dim", -1))
    name = tracer.call.operator._schema.name.removeprefix("aten::")
    tracer.block(x.axes[dim], f"{name} runs over its channels")
    reason = f"{name} of zeros is not zero ({tracer.call.where})"
    is_zero = name.startswith("cum")
    axes = [axis if is_zero else axis and axis.tainted(reason) for axis in x.axes]
    axes[dim] = None
    results = [tracer.emit("join", [x], axes, shape=shape) for shape in tracer.call.shapes]
    return results if tracer.call.several else results[0]


@rule("_weight_norm")
def weight_norm(tracer: Tracer, direction: Value, length: Value, dim: int = 0) -> Value:
    """direction / |direction| * length, the norm running over all dimensions but one."""
    kept = direction.dim(dim)
    rest = [axis for place, axis in enumerate(direction.axes) if place != kept]
    tracer.block(rest, "a norm runs over the weights that read its channels")
    axes = list(direction.axes)
    # A dropped channel's length is zero; its direction must not be, or it would be 0 / 0.
    axis = axes[kept]
    tracer.consumed.update(axis.origins if axis is not None else ())
    tracer.meet([axis, length.axes[kept]])
    axes[kept] = length.axes[kept]
    return tracer.emit("join", [direction, length], axes)
