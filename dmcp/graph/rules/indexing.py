"""Operators that pick positions. Positions named by the code must all be there."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from dmcp.graph.rules.registry import rule, unknown
from dmcp.graph.rules.shape import axes_without
from dmcp.graph.values import Axis, Value

if TYPE_CHECKING:
    from dmcp.graph.tracer import Tracer

_FIXED = "the code names places among its channels"


def _part(tracer: Tracer, x: Value, dim: int, start: int, end: int) -> list[Axis | None]:
    """The axes of positions start … end of a dimension."""
    axes = list(x.axes)
    axis = axes[dim]
    axes[dim] = axis.carrying(axis.slots[start:end]) if axis and end - start > 1 else None
    if axis is not None and end - start == 1:
        tracer.block(axis.carrying(axis.slots[start:end]), _FIXED)
    return axes


def _pin(tracer: Tracer, axis: Axis | None, start: int, end: int) -> None:
    """Positions start … end are never dropped."""
    if axis is not None and end > start:
        tracer.block(axis.carrying(axis.slots[start:end]), _FIXED)


@rule("narrow")
def narrow(tracer: Tracer, x: Value, dim: int, start: int, length: int) -> Value:
    first = start % x.shape[dim]
    return slice_(tracer, x, dim, first, first + length)


@rule("slice.Tensor")
def slice_(
    tracer: Tracer, x: Value, dim: int, start: int | None, end: int | None, step: int = 1
) -> Value:
    """Counted from the front, everything up to a bound stays; from the back, everything after."""
    dim, start = x.dim(dim), start or 0
    size, axis = x.shape[dim], x.axes[dim]
    end = size if end is None else end
    if axis is None:
        return tracer.emit("linear_map", [x], x.axes)
    if step != 1:
        tracer.block(axis, _FIXED)
        return tracer.emit("linear_map", [x], [*x.axes[:dim], None, *x.axes[dim + 1 :]])
    for bound in (start, end):
        if bound < 0:
            _pin(tracer, axis, max(size + bound, 0), size)
        elif bound < size:
            _pin(tracer, axis, 0, bound)
    first = min(max(start + size if start < 0 else start, 0), size)
    last = min(max(end + size if end < 0 else end, first), size)
    return tracer.emit("linear_map", [x], _part(tracer, x, dim, first, last))


@rule("select.int")
def select(tracer: Tracer, x: Value, dim: int, index: int) -> Value:
    dim = x.dim(dim)
    size = x.shape[dim]
    first, last = (size + index, size) if index < 0 else (0, index + 1)
    _pin(tracer, x.axes[dim], first, last)
    return tracer.emit("linear_map", [x], axes_without(x.axes, dim))


@rule("unbind")
def unbind(tracer: Tracer, x: Value, dim: int = 0) -> list[Value]:
    dim = x.dim(dim)
    tracer.block(x.axes[dim], _FIXED)
    axes = axes_without(x.axes, dim)
    return [tracer.emit("linear_map", [x], axes, shape=shape) for shape in tracer.call.shapes]


@rule("chunk", "tensor_split.sections")
def chunk(tracer: Tracer, x: Value, count: int, dim: int = 0) -> list[Value]:
    """Parts shrink alike: channels at the same place of each part go together."""
    dim = x.dim(dim)
    axis, size = x.axes[dim], x.shape[dim]
    if axis is not None and size % count:
        tracer.block(axis, f"its {size} channels do not split evenly into {count}")
    elif axis is not None:
        tracer.table.tie_rows(axis.slots.reshape(count, -1))
    return _pieces(tracer, x, dim)


@rule("split", "split_with_sizes", "tensor_split.indices")
def split(tracer: Tracer, x: Value, sizes: int | Sequence[int], dim: int = 0) -> list[Value]:
    """Sizes are taken to be written into the code, unless they are a list that the module holds,
    which can follow. Of parts of one size the last may shrink."""
    dim = x.dim(dim)
    axis = x.axes[dim]
    attribute = None if isinstance(sizes, int) else tracer.sizes_held(sizes)
    if attribute is not None:
        pieces = _pieces(tracer, x, dim)
        for place, piece in enumerate(pieces):
            tracer.size_of_part(attribute, place, piece.axes[dim])
        return pieces
    last = tracer.call.shapes[-1][dim] if isinstance(sizes, int) else 0
    _pin(tracer, axis, 0, x.shape[dim] - last)
    return _pieces(tracer, x, dim)


def _pieces(tracer: Tracer, x: Value, dim: int) -> list[Value]:
    shapes = tracer.call.shapes
    ends = list(accumulate(shape[dim] for shape in shapes))
    return [
        tracer.emit("linear_map", [x], _part(tracer, x, dim, end - shape[dim], end), shape=shape)
        for shape, end in zip(shapes, ends, strict=True)
    ]


@rule("index_select")
def index_select(tracer: Tracer, x: Value, dim: int, _index: Value) -> Value:
    axes, dim = list(x.axes), x.dim(dim)
    tracer.block(axes[dim], _FIXED)
    axes[dim] = None
    return tracer.emit("linear_map", [x], axes)


@rule("index.Tensor")
def index(tracer: Tracer, x: Value, indices: Sequence[Value | None]) -> Value:
    """One index vector keeps all dimensions in their places."""
    used = [dim for dim, given in enumerate(indices) if given is not None]
    vector = indices[used[0]] if len(used) == 1 else None
    if vector is None or len(vector.shape) != 1:
        result: Value = unknown(tracer, x, *[given for given in indices if given is not None])
        return result
    return index_select(tracer, x, used[0], vector)


@rule("embedding")
def embedding(tracer: Tracer, weight: Value, indices: Value, *_: Any) -> Value:
    tracer.block([weight.axes[0], *indices.axes], _FIXED)
    return tracer.emit("join", [weight, indices], [*indices.axes, weight.axes[1]])
