"""Operators that multiply and sum: convolutions, linear layers, matrix products, attention."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from string import ascii_lowercase
from typing import TYPE_CHECKING, Any

import numpy as np

from dmcp.graph.channel_graph import NodeKind
from dmcp.graph.rules.registry import rule, unknown
from dmcp.graph.values import Axis, Value

if TYPE_CHECKING:
    from dmcp.graph.tracer import Tracer

Term = tuple[Value, str]
"""A tensor and the letters of its dimensions."""


def contract(tracer: Tracer, terms: Sequence[Term], out: str) -> list[Axis | None]:
    """The axes of a product of tensors summed over the letters that ``out`` does not name."""
    axes: dict[str, Axis | None] = {}
    letters = dict.fromkeys(letter for _, dims in terms for letter in dims)
    sizes = dict.fromkeys(letters, 1)
    variable = {letter for value, dims in terms if not value.constant for letter in dims}
    for letter in letters:
        holders = [(value, dims.index(letter)) for value, dims in terms if letter in dims]
        size = sizes[letter] = max(value.shape[place] for value, place in holders)
        holders = [(v, place) for v, place in holders if v.shape[place] == size > 1]
        held = [value.axes[place] for value, place in holders]
        if letter in out:
            axes[letter] = _keep(tracer, held)
            if letter not in variable and variable:
                tracer.produce(axes[letter])
        else:
            axes[letter] = tracer.sum_over(
                [value.axes[place] for value, place in holders if not value.constant],
                [value.axes[place] for value, place in holders if value.constant],
            )
    result = [axes[letter] for letter in out]
    # What a single factor sums over is summed first; without a common sum it is elementwise.
    common = [c for c in letters if c in out or sum(c in dims for _, dims in terms) > 1]
    fixed = prod(sizes[letter] for letter in common if axes[letter] is None)
    output = Value(tuple(sizes[letter] for letter in out), tuple(result))
    is_vector = any(len(dims) < 2 for _, dims in terms)  # its product is no matrix product
    if not is_vector and set(common) - set(out):
        tracer.count(fixed, [axes[letter] for letter in common], output)
    return result


def _keep(tracer: Tracer, held: Sequence[Axis | None]) -> Axis | None:
    """A dimension that the product keeps: zero where any factor is."""
    axis = tracer.meet(held)
    if axis is None or any(a is not None and not a.taint for a in held):
        return axis and Axis(axis.slots, "", axis.origins)
    return axis


def _emit(tracer: Tracer, terms: Sequence[Term], axes: Sequence[Axis | None]) -> Value:
    """A dense layer where one factor is an activation, else a meeting of several."""
    operands = [value for value, _ in terms]
    weights = [value for value in operands if value.constant]
    module = tracer.visit("dense", weights, _last(operands[0]), axes[-1]) if weights else None
    kind: NodeKind = "dense" if len(operands) - len(weights) == 1 else "join"
    return tracer.emit(kind, operands, axes, module=module)


def _last(value: Value) -> Axis | None:
    return value.axes[-1]


@rule("linear")
def linear(tracer: Tracer, x: Value, weight: Value, bias: Value | None) -> Value:
    lead = ascii_lowercase[: len(x.shape) - 1]
    terms = [(x, f"{lead}y"), (weight, "zy"[: len(weight.shape)])]
    axes = contract(tracer, terms, f"{lead}z" if len(weight.shape) == 2 else lead)
    if len(weight.shape) == 2:
        tracer.size("in_features", x.axes[-1])
        tracer.size("out_features", weight.axes[0])
    if bias is not None and bias.shape != (1,):
        tracer.equate(axes[-1], bias.axes[-1])
        added = bias.axes[-1]
        reason = f"a bias is added to every channel ({tracer.call.where})"
        axes[:-1] = [axis and axis.tainted(reason) for axis in axes[:-1]]
        axes[-1] = axes[-1] and axes[-1].tainted(added.taint if added is not None else "")
    operands = [x, weight, *([bias] if bias is not None else [])]
    module = tracer.visit("dense", operands[1:], x.axes[-1], axes[-1])
    kind: NodeKind = "dense" if weight.constant else "join"
    return tracer.emit(kind, operands, axes, module=module)


@rule("matmul", "mm", "bmm", "mv", "dot")
def matmul(tracer: Tracer, left: Value, right: Value) -> Value:
    """Batch dimensions broadcast; a vector has no letter of its own in the result."""
    rows = "y" if len(left.shape) > 1 else ""
    columns = "z" if len(right.shape) > 1 else ""
    batch = ascii_lowercase[: max(len(left.shape), len(right.shape), 2) - 2]
    left_letters = (batch + rows + "x")[-len(left.shape) :]
    right_letters = (batch + "x" + columns)[-len(right.shape) :]
    out = batch + rows + columns
    terms = [(left, left_letters), (right, right_letters)]
    return _emit(tracer, terms, contract(tracer, terms, out))


@rule("addmm", "baddbmm")
def addmm(tracer: Tracer, bias: Value, left: Value, right: Value, *_: Any) -> Value:
    batch = "a" if len(left.shape) == 3 else ""
    terms: list[Term] = [(left, f"{batch}yx"), (right, f"{batch}xz")]
    axes = contract(tracer, terms, f"{batch}yz")
    for place, axis in enumerate(axes):
        offset = place - len(axes) + len(bias.shape)
        if offset < 0 or bias.shape[offset] == 1:
            axes[place] = axis and axis.tainted("the same number is added to every channel")
        else:
            tracer.equate(axis, bias.axes[offset])
    return _emit(tracer, [*terms, (bias, "")], axes)


@rule("einsum")
def einsum(tracer: Tracer, equation: str, operands: Sequence[Value], *_: Any) -> Value:
    left, _arrow, out = equation.replace(" ", "").partition("->")
    sides = left.split(",")
    if "->" not in equation:
        out = "".join(sorted(c for c in set(left) - set(",.") if left.count(c) == 1))
        out = ("..." if "..." in left else "") + out
    repeated = any(len(set(side) - {"."}) != len(side.replace(".", "")) for side in sides)
    if repeated:
        result: Value = unknown(tracer, *operands)
        return result
    free = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in equation]
    widest = max(
        len(value.shape) - len(side.replace("...", ""))
        for value, side in zip(operands, sides, strict=True)
    )
    batch = "".join(free[:widest])
    terms: list[Term] = []
    for value, side in zip(operands, sides, strict=True):
        count = len(value.shape) - len(side.replace("...", ""))
        terms.append((value, side.replace("...", batch[len(batch) - count :])))
    out = out.replace("...", batch)
    while len(terms) > 2:  # PyTorch multiplies two at a time, from the left
        rest = terms[2:]
        terms = [_pair(tracer, terms[:2], {*out, *(c for _, dims in rest for c in dims)}), *rest]
    return _emit(tracer, terms, contract(tracer, terms, out))


def _pair(tracer: Tracer, terms: Sequence[Term], needed: set[str]) -> Term:
    """The product of two tensors, summed over what nothing else needs."""
    sizes = {c: n for value, dims in terms for c, n in zip(dims, value.shape, strict=True) if n > 1}
    out = "".join(c for c in dict.fromkeys(terms[0][1] + terms[1][1]) if c in needed)
    shape = tuple(sizes.get(c, 1) for c in out)
    axes = contract(tracer, terms, out)
    return tracer.emit("join", [value for value, _ in terms], axes, shape=shape), out


@rule("scaled_dot_product_attention")
def attention(
    tracer: Tracer,
    query: Value,
    key: Value,
    value: Value,
    mask: Value | None,
    _dropout: float,
    _causal: bool,
    scale: float | None,
    *_: Any,
) -> Value:
    batch = ascii_lowercase[: len(query.shape) - 2]
    scores = [(query, f"{batch}xz"), (key, f"{batch}yz")]
    if scale is None:
        axes = [query.axes[-1], key.axes[-1]]
        tracer.block(axes, "attention divides by the square root of its size")
    weights = contract(tracer, scores, f"{batch}xy")
    if mask is not None:
        tracer.block(mask.axes, "attention masks are not followed")
    tracer.block(weights[-1], "a softmax runs over its positions")
    shape = (*query.shape[:-1], key.shape[-2])
    soft = Value(shape, (*weights[:-1], None), query.node)
    if value.axes[-2] is not None:
        tracer.block(value.axes[-2], "a softmax runs over its positions")
        value = Value(value.shape, (*value.axes[:-2], None, value.axes[-1]), value.node)
    result = contract(tracer, [(soft, f"{batch}xy"), (value, f"{batch}yz")], f"{batch}xz")
    return tracer.emit("join", [query, key, value], result)


@rule("conv1d", "conv2d", "conv3d")
def convolution(
    tracer: Tracer,
    x: Value,
    weight: Value,
    bias: Value | None,
    _stride: Any,
    _padding: Any,
    _dilation: Any,
    groups: int,
) -> Value:
    return _convolve(tracer, x, weight, bias, groups, transposed=False)


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def transposed_convolution(
    tracer: Tracer,
    x: Value,
    weight: Value,
    bias: Value | None,
    _stride: Any,
    _padding: Any,
    _output_padding: Any,
    groups: int,
    _dilation: Any,
) -> Value:
    return _convolve(tracer, x, weight, bias, groups, transposed=True)


def _convolve(
    tracer: Tracer, x: Value, weight: Value, bias: Value | None, groups: int, *, transposed: bool
) -> Value:
    spatial = len(weight.shape) - 2
    place = len(x.shape) - spatial - 1
    tracer.block(x.axes[place + 1 :], "a convolution slides over its channels")
    inputs = x.axes[place]
    if groups == 1:
        consumed, produced = (0, 1) if transposed else (1, 0)
        if weight.shape[consumed] > 1 or inputs is not None:
            tracer.sum_over([inputs], [weight.axes[consumed]])
        outputs = weight.axes[produced]
        kind: NodeKind = "dense"
        if not x.constant:
            tracer.produce(outputs)
    else:
        per_in, per_out = x.shape[place] // groups, tracer.call.shape[place] // groups
        split = _by_groups if 1 in (per_in, per_out) else _by_columns
        outputs, kind = split(tracer, inputs, weight, groups, transposed=transposed)
        if kind == "depthwise":
            tracer.size("groups", inputs, per_in)
    if bias is not None and outputs is not None:
        tracer.equate(outputs, bias.axes[0])
        outputs = outputs.tainted(bias.axes[0].taint if bias.axes[0] is not None else "")
    tracer.size("in_channels", inputs)
    tracer.size("out_channels", outputs)

    axes = [*x.axes[:place], outputs, *([None] * spatial)]
    if bias is not None:
        reason = f"a bias is added to every channel ({tracer.call.where})"
        axes[:place] = [axis and axis.tainted(reason) for axis in axes[:place]]
    weights = [weight, *([bias] if bias is not None else [])]
    module = tracer.visit(kind, weights, inputs, outputs)
    homogeneous = kind == "dense" or bias is None
    operands = [x, *weights]
    result = tracer.emit(kind, operands, axes, module=module, homogeneous=homogeneous)
    # A multiplication per weight and position; the positions of the images' own dimensions.
    grid = x.shape if transposed else tracer.call.shape
    positions = prod(grid[:place]) * prod(grid[place + 1 :])
    known = [axis for axis in (*x.axes[:place], *weight.axes[:2]) if axis is not None]
    kernel = prod(weight.shape) // prod(len(a.slots) for a in weight.axes[:2] if a is not None)
    lead = prod(len(axis.slots) for axis in x.axes[:place] if axis is not None)
    tracer.count(kernel * positions // lead, known, result)
    return result


def _by_groups(
    tracer: Tracer, inputs: Axis | None, weight: Value, groups: int, *, transposed: bool
) -> tuple[Axis | None, NodeKind]:
    """Depthwise: whole groups go, with their inputs and their outputs."""
    per_out = weight.shape[1] if transposed else weight.shape[0] // groups
    own = weight.axes[0]
    table = tracer.table
    if inputs is None or own is None:
        tracer.block([inputs, own], "a grouped convolution of channels that stay")
        return None, "depthwise"
    rows = inputs.slots.reshape(groups, -1)
    first = table.tie_rows(rows.T)
    weights = own.slots.reshape(groups, -1)
    table.equate(np.repeat(first, weights.shape[1]), weights.reshape(-1))
    slots = np.repeat(first, per_out) if transposed else own.slots
    return Axis(slots, own.taint, own.origins if not transposed else frozenset()), "depthwise"


def _by_columns(
    tracer: Tracer, inputs: Axis | None, weight: Value, groups: int, *, transposed: bool
) -> tuple[Axis | None, NodeKind]:
    """Every group keeps the same number of inputs, and of outputs: the same places in each."""
    table = tracer.table
    own, shared = weight.axes[0], weight.axes[1]
    if own is None or shared is None:
        tracer.block([inputs, own, shared], "the weights of a grouped convolution are computed")
        return None, "dense"
    columns = table.tie_rows(own.slots.reshape(groups, -1))
    if transposed:
        read, made = Axis(columns, origins=own.origins), np.tile(shared.slots, groups)
    else:
        read, made = shared, own.slots
    taint = shared.taint if transposed else own.taint
    if inputs is None:
        tracer.block(read, "a grouped convolution of channels that stay")
    else:
        first = table.tie_rows(inputs.slots.reshape(groups, -1))
        tracer.sum_over([Axis(first, inputs.taint)], [read])
    outputs = Axis(made, taint, shared.origins if transposed else own.origins)
    tracer.produce(outputs)
    return outputs, "dense"
