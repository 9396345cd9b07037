"""Operators that move numbers about without changing them: an index map each."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dmcp.graph.rules.registry import rule
from dmcp.graph.slots import Slots
from dmcp.graph.values import Axis, Value

if TYPE_CHECKING:
    from dmcp.graph.tracer import Tracer

Range = tuple[int, int]


@rule("view.default", "reshape", "_unsafe_view")
def view(tracer: Tracer, x: Value, shape: Sequence[int]) -> Value:
    return reshape(tracer, x, free=next((n for n, size in enumerate(shape) if size == -1), None))


@rule("flatten", "squeeze", "unsqueeze", "unflatten", "ravel", "view_as", "reshape_as")
def reshape(tracer: Tracer, x: Value, *_: Any, free: int | None = None) -> Value:
    """Dimensions split into the finest runs whose products agree; each run is mapped on its own.

    Args:
        free: the dimension whose size the code leaves open.
    """
    shape = tracer.call.shape
    axes: list[Axis | None] = [None] * len(shape)
    for old, new in _aligned_runs(x.shape, shape):
        for place, axis in _map_run(tracer, x, old, shape, new, free).items():
            axes[place] = axis
    return tracer.emit("linear_map", [x], axes)


def _map_run(
    tracer: Tracer, x: Value, old: Range, shape: tuple[int, ...], new: Range, free: int | None
) -> dict[int, Axis]:
    """The labelled dimensions that a run of ``x`` becomes: {dimension: axis}."""
    targets = [place for place in range(*new) if shape[place] > 1]
    known = [(place, x.axes[place]) for place in range(*old) if x.axes[place] is not None]
    firm = [(place, axis) for place, axis in known if axis is not None and not axis.wild]
    if not firm:
        alone = len(targets) == 1 and len([p for p in range(*old) if x.shape[p] > 1]) == 1
        return {targets[0]: known[0][1]} if known and known[0][1] and alone else {}
    if len(firm) > 1 or not targets:
        tracer.block([axis for _, axis in firm], "a reshape mixes several of its dimensions")
        return {}
    place, axis = firm[0]
    spread = [1] * (old[1] - old[0])
    spread[place - old[0]] = -1
    labels = np.broadcast_to(axis.slots.reshape(spread), x.shape[old[0] : old[1]])
    if len([p for p in range(*old) if x.shape[p] > 1]) > 1:
        free = None
    chosen, slots = _split(tracer, labels.reshape([shape[t] for t in targets]), targets, free)
    return {chosen: Axis(slots, axis.taint, axis.origins if len(targets) == 1 else frozenset())}


def _split(
    tracer: Tracer, labels: Slots, targets: Sequence[int], free: int | None
) -> tuple[int, Slots]:
    """The one of several dimensions that holds the channels from now on.

    Where the labels differ along several of them, the code must keep all but one of these sizes:
    the one it leaves open, else the largest (`Tracer.larger`), shrinks; channels at its places go
    together.
    """
    if len(targets) == 1:
        return targets[0], labels.reshape(-1).copy()
    for number, target in enumerate(targets):
        rows = np.moveaxis(labels, number, -1).reshape(-1, labels.shape[number])
        if (rows == rows[0]).all():
            return target, rows[0].copy()
    if free is not None and free in targets:
        chosen = free
    else:
        sizes = sorted(zip(labels.shape, targets, strict=True))
        chosen = sizes[-1 if tracer.larger else 0][1]
        tracer.guessed = True
    rows = np.moveaxis(labels, targets.index(chosen), -1)
    return chosen, tracer.table.tie_rows(rows.reshape(-1, rows.shape[-1])).copy()


def _aligned_runs(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[Range, Range]]:
    """The finest pairs of dimension ranges of ``old`` and ``new`` with equal products."""
    runs = []
    i = j = 0
    while i < len(old) or j < len(new):
        first, new_first = i, j
        i, j = min(i + 1, len(old)), min(j + 1, len(new))
        while prod(old[first:i]) != prod(new[new_first:j]):
            if prod(old[first:i]) < prod(new[new_first:j]):
                i += 1
            else:
                j += 1
        runs.append(((first, i), (new_first, j)))
    return runs


@rule("permute", "transpose", "t", "movedim.int", "movedim.intlist", "swapaxes", "numpy_T", "mT")
def permute(tracer: Tracer, x: Value, *arguments: Any) -> Value:
    """Where each dimension went is read off a tensor whose sizes name its dimensions."""
    marked = torch.empty(tuple(range(2, 2 + len(x.shape))), device="meta")
    moved = tracer.call.operator(marked, *arguments)
    return tracer.emit("linear_map", [x], [x.axes[size - 2] for size in moved.shape])


@rule("cat", "concat", "concatenate")
def cat(tracer: Tracer, parts: Sequence[Value], dim: int = 0) -> Value:
    parts = [part for part in parts if prod(part.shape) > 0] or list(parts)
    dim = parts[0].dim(dim)
    axes: list[Axis | None] = []
    for place in range(len(parts[0].shape)):
        held = [part.axes[place] for part in parts]
        if place != dim:
            axis = tracer.meet(held) if parts[0].shape[place] > 1 else None
            taint = next((a.taint for a in held if a is not None and a.taint), "")
            axes.append(axis and axis.tainted(taint))
        elif any(axis is not None for axis in held):
            axes.append(_concatenate(tracer, held, [part.shape[place] for part in parts]))
        else:
            axes.append(None)
    return tracer.emit("join", parts, axes)


def _concatenate(tracer: Tracer, held: Sequence[Axis | None], sizes: Sequence[int]) -> Axis:
    """Channels that never go stand where a part has none that do."""
    slots = [
        axis.slots if axis is not None else tracer.fixed(size, "it lies beside fixed channels")
        for axis, size in zip(held, sizes, strict=True)
    ]
    taint = next((axis.taint for axis in held if axis is not None and axis.taint), "")
    origins = frozenset[tuple[str, int]]().union(*(axis.origins for axis in held if axis))
    return Axis(np.concatenate(slots), taint, origins)


@rule("stack")
def stack(tracer: Tracer, parts: Sequence[Value], dim: int = 0) -> Value:
    places = range(len(parts[0].shape))
    axes = [
        tracer.meet([part.axes[p] for part in parts]) if parts[0].shape[p] > 1 else None
        for p in places
    ]
    for part in parts:
        for place, axis in enumerate(part.axes):
            joined = axes[place]
            if axis is not None and joined is not None and axis.taint:
                axes[place] = joined.tainted(axis.taint)
    axes.insert(dim % len(tracer.call.shape), None)
    return tracer.emit("join", parts, axes)


@rule("constant_pad_nd")
def constant_pad(tracer: Tracer, x: Value, sizes: Sequence[int], value: float = 0) -> Value:
    return pad(tracer, x, sizes, "constant", value)


@rule("pad")
def pad(
    tracer: Tracer,
    x: Value,
    sizes: Sequence[int],
    mode: str = "constant",
    value: Any = None,
) -> Value:
    axes = list(x.axes)
    for number in range(len(sizes) // 2):
        place, (before, after) = len(x.shape) - 1 - number, sizes[2 * number : 2 * number + 2]
        axis = axes[place]
        if axis is None or (before, after) == (0, 0):
            continue
        if mode != "constant" or min(before, after) < 0:
            tracer.block(axis, "it is padded by other channels")
            axes[place] = None
            continue
        reason = "the code says how many channels of zeros are padded"
        parts = [tracer.fixed(before, reason), axis.slots, tracer.fixed(after, reason)]
        axes[place] = Axis(np.concatenate(parts), axis.taint)
    if value not in (None, 0):
        taint = f"it is padded by {value} ({tracer.call.where})"
        axes = [axis and axis.tainted(taint) for axis in axes]
    return tracer.emit("linear_map", [x], axes)


@rule("expand", "expand_as", "broadcast_to", "repeat", "tile")
def repeat(tracer: Tracer, x: Value, other: Any, *_: Any) -> Value:
    """A dimension of size 1 may grow to whatever it meets; a longer one is laid side by side."""
    shape = tracer.call.shape
    held = [*([None] * (len(shape) - len(x.shape))), *x.axes]
    sizes = [*([1] * (len(shape) - len(x.shape))), *x.shape]
    lead = len(shape) - len(other.shape) if isinstance(other, Value) else 0
    taint = f"it is the same in every channel ({tracer.call.where})"
    axes: list[Axis | None] = []
    for place, (axis, size, target) in enumerate(zip(held, sizes, shape, strict=True)):
        if size == target:
            axes.append(axis)
        elif size != 1:
            axes.append(axis and axis.carrying(np.tile(axis.slots, target // size)))
        elif isinstance(other, Value):
            like = other.axes[place - lead] if place >= lead else None
            axes.append(like and Axis(like.slots, taint))
        else:
            axes.append(tracer.axis(target, taint, wild=True))
    return tracer.emit("linear_map", [x], axes)


@rule("repeat_interleave.self_int")
def repeat_interleave(tracer: Tracer, x: Value, count: int, dim: int | None, *_: Any) -> Value:
    if dim is None:
        tracer.block(x.axes, "repeat_interleave flattens it")
        return tracer.emit("linear_map", [x], [None])
    axes = list(x.axes)
    axis = axes[x.dim(dim)]
    axes[x.dim(dim)] = axis and axis.carrying(np.repeat(axis.slots, count))
    return tracer.emit("linear_map", [x], axes)


@rule("flip")
def flip(tracer: Tracer, x: Value, dims: Sequence[int]) -> Value:
    flipped = {x.dim(dim) for dim in dims}
    axes = [
        axis.carrying(axis.slots[::-1].copy()) if axis is not None and place in flipped else axis
        for place, axis in enumerate(x.axes)
    ]
    return tracer.emit("linear_map", [x], axes)


@rule("roll")
def roll(tracer: Tracer, x: Value, shifts: Sequence[int], dims: Sequence[int]) -> Value:
    moved = {x.dim(dim) for dim in dims} if dims else set(range(len(x.shape)))
    tracer.block([x.axes[dim] for dim in moved], "roll shifts it by a fixed number of channels")
    return tracer.emit("linear_map", [x], x.axes)


def axes_without(axes: Sequence[Axis | None], dim: int) -> list[Axis | None]:
    """All axes but one."""
    return [axis for place, axis in enumerate(axes) if place != dim]
