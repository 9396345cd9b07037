"""How every supported operator passes channels on: one rule per operator, none per network.

A rule gets the tracer, the operator's call and its arguments, in which traced tensors appear as
`Value` and parameters as `Parameter`, and returns the `Value` of the output. It raises
`UnsupportedError` with the reason; the tracer turns that into a `TraceError` naming the module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import nn

from dmcp.graph.slots import Slots

if TYPE_CHECKING:
    from dmcp.graph.trace import Call, Tracer

aten = torch.ops.aten


class UnsupportedError(Exception):
    """An operator, or this use of it, is not understood."""


@dataclass(frozen=True)
class Value:
    """A traced tensor: its shape, where its channels lie and what they are.

    Attributes:
        shape: sizes, batch included.
        axis: the dimension that holds channels.
        slots: [shape[axis]], the slot of each channel.
        node: number of the `Node` that produced it.
    """

    shape: tuple[int, ...]
    axis: int
    slots: Slots
    node: int


@dataclass(frozen=True)
class Parameter:
    """A parameter or buffer of the model: ``module.name``."""

    module: str
    name: str


Rule = Callable[["Tracer", "Call", Sequence[Any]], Value]
RULES: dict[Any, Rule] = {}


def rule(*operators: Any) -> Callable[[Rule], Rule]:
    """Register a rule for operators of ``torch.ops.aten``."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(operators, function))
        return function

    return register


def _require_value(value: Any, what: str) -> Value:
    if not isinstance(value, Value):
        raise UnsupportedError(f"{what} is not computed from the model's inputs")
    return value


def _owner(tracer: Tracer, call: Call, parameter: Any, kind: type[nn.Module]) -> str:
    """The module that owns a weight that goes straight into its own operator."""
    if not isinstance(parameter, Parameter):
        raise UnsupportedError("its weight is computed, not a plain parameter")
    module = tracer.module(parameter.module)
    if not isinstance(module, kind) or parameter.name != "weight":
        raise UnsupportedError(
            f"its weight belongs to a {type(module).__name__}, not to a torch.nn.{kind.__name__}"
        )
    if call.module != parameter.module:
        raise UnsupportedError(
            f"its weight is {parameter.module}.weight, which is used outside its module"
        )
    return parameter.module


@rule(aten.conv2d.default, aten.conv2d.padding)
def _conv2d(tracer: Tracer, call: Call, args: Sequence[Any]) -> Value:
    x = _require_value(args[0], "the input")
    name = _owner(tracer, call, args[1], nn.Conv2d)
    if x.axis != 1 or len(x.shape) != 4:
        raise UnsupportedError(f"its input has shape {x.shape} with channels on dimension {x.axis}")
    conv = tracer.module(name)
    assert isinstance(conv, nn.Conv2d)
    kind: Literal["dense", "depthwise"] = "dense" if conv.groups == 1 else "depthwise"
    if kind == "dense":
        out = tracer.slots_of(name, "out", conv.out_channels)
    elif conv.groups == conv.in_channels:
        out = np.repeat(x.slots, conv.out_channels // conv.in_channels)
    else:
        raise UnsupportedError(f"grouped convolution (groups={conv.groups}) is not supported")
    kernel, positions = prod(conv.kernel_size), prod(call.shape[2:])
    tracer.visit_layer(name, kind, x.slots, out, kernel, positions)
    homogeneous = kind == "dense" or conv.bias is None
    return tracer.emit(call, kind, [x], 1, out, module=name, homogeneous=homogeneous)


@rule(aten.linear.default)
def _linear(tracer: Tracer, call: Call, args: Sequence[Any]) -> Value:
    x = _require_value(args[0], "the input")
    name = _owner(tracer, call, args[1], nn.Linear)
    if x.axis != len(x.shape) - 1:
        raise UnsupportedError(f"it mixes dimension {len(x.shape) - 1}, channels lie on {x.axis}")
    layer = tracer.module(name)
    assert isinstance(layer, nn.Linear)
    out = tracer.slots_of(name, "out", layer.out_features)
    tracer.visit_layer(name, "dense", x.slots, out, 1, prod(call.shape[1:-1]))
    return tracer.emit(call, "dense", [x], x.axis, out, module=name)


@rule(aten.batch_norm.default)
def _batch_norm(tracer: Tracer, call: Call, args: Sequence[Any]) -> Value:
    x = _require_value(args[0], "the input")
    owners = {arg.module for arg in args[1:5] if isinstance(arg, Parameter)}
    if len(owners) != 1 or args[3] is None:
        raise UnsupportedError("batch norm without running statistics of its own is not supported")
    name = owners.pop()
    if not isinstance(tracer.module(name), nn.BatchNorm2d):
        raise UnsupportedError(f"{type(tracer.module(name)).__name__} is not supported")
    if not isinstance(args[1], Parameter):
        raise UnsupportedError("without weight and bias it turns a zeroed channel into -mean / std")
    if x.axis != 1 or call.module != name:
        raise UnsupportedError("it works on other channels than those of its own module")
    tracer.visit_norm(name, x.slots)
    return tracer.emit(call, "norm", [x], x.axis, x.slots, module=name)


@rule(
    aten.relu.default,
    aten.relu_.default,
    aten.leaky_relu.default,
    aten.leaky_relu_.default,
)
def _homogeneous_activation(tracer: Tracer, call: Call, args: Sequence[Any]) -> Value:
    return _elementwise(tracer, call, args, homogeneous=True)


@rule(
    aten.relu6.default,
    aten.relu6_.default,
    aten.silu.default,
    aten.silu_.default,
    aten.hardswish.default,
    aten.hardswish_.default,
    aten.gelu.default,
    aten.elu.default,
    aten.elu_.default,
    aten.mish.default,
    aten.mish_.default,
    aten.tanh.default,
    aten.tanh_.default,
)
def _activation(tracer: Tracer, call: Call, args: Sequence[Any]) -> Value:
    return _elementwise(tracer, call, args, homogeneous=False)


@rule(aten.hardtanh.default, aten.hardtanh_.default)
def _hardtanh(tracer: Tracer, call: Call, args: Sequence[Any]) -> Value:
    _, low, high = args
    if not low <= 0 <= high:
        raise UnsupportedError(f"clamping to [{low}, {high}] does not keep zero at zero")
    return _elementwise(tracer, call, args, homogeneous=False)


def _elementwise(tracer: Tracer, call: Call, args: Sequence[Any], *, homogeneous: bool) -> Value:
    x = _require_value(args[0], "the input")
    return tracer.emit(
        call,
        "activation",
        [x],
        x.axis,
        x.slots,
        module=call.module if call.alone else None,
        homogeneous=homogeneous,
    )


@rule(
    aten.dropout.default,
    aten.dropout_.default,
    aten.feature_dropout.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.alias.default,
    aten.detach.default,
)
def _identity(tracer: Tracer, call: Call, args: Sequence[Any]) -> Value:
    x = _require_value(args[0], "the input")
    return tracer.emit(call, "linear_map", [x], x.axis, x.slots)


@rule(
    aten.max_pool2d.default,
    aten.avg_pool2d.default,
    aten.adaptive_avg_pool2d.default,
    aten.upsample_nearest2d.vec,
    aten.upsample_bilinear2d.vec,
)
def _spatial(tracer: Tracer, call: Call, args: Sequence[Any]) -> Value:
    x = _require_value(args[0], "the input")
    if x.axis >= len(x.shape) - 2:
        raise UnsupportedError(f"it works on dimension {x.axis}, which holds the channels")
    return tracer.emit(call, "linear_map", [x], x.axis, x.slots)


@rule(aten.mean.dim)
def _mean(tracer: Tracer, call: Call, args: Sequence[Any]) -> Value:
    x = _require_value(args[0], "the input")
    dims = {dim % len(x.shape) for dim in args[1] or range(len(x.shape))}
    if x.axis in dims or 0 in dims:
        raise UnsupportedError(f"a mean over dimensions {sorted(dims)} mixes channels or images")
    axis = x.axis if args[2] else x.axis - sum(dim < x.axis for dim in dims)
    return tracer.emit(call, "linear_map", [x], axis, x.slots)


@rule(
    aten.flatten.using_ints,
    aten.view.default,
    aten.reshape.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
)
def _reshape(tracer: Tracer, call: Call, args: Sequence[Any]) -> Value:
    x = _require_value(args[0], "the input")
    axis, slots = reshape_slots(x, call.shape)
    return tracer.emit(call, "linear_map", [x], axis, slots)


def reshape_slots(x: Value, shape: tuple[int, ...]) -> tuple[int, Slots]:
    """Where the channels of ``x`` lie after a reshape to ``shape``: (axis, slots).

    The dimensions split into the finest runs whose products agree. The run that holds the channels
    must come out as one dimension (sizes 1 aside).
    """
    for (first, last), (new_first, new_last) in _aligned_runs(x.shape, shape):
        if not first <= x.axis < last:
            continue
        target = [dim for dim in range(new_first, new_last) if shape[dim] != 1]
        if len(target) > 1:
            break
        axis = target[0] if target else new_first
        view = [1] * (last - first)
        view[x.axis - first] = -1
        spread = np.broadcast_to(x.slots.reshape(view), x.shape[first:last])
        return axis, spread.reshape(-1).copy()
    raise UnsupportedError(
        f"reshaping {x.shape} to {shape} splits the channels on dimension {x.axis}"
    )


def _aligned_runs(
    old: tuple[int, ...], new: tuple[int, ...]
) -> list[tuple[tuple[int, int], tuple[int, int]]]:
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


@rule(aten.add.Tensor, aten.add_.Tensor, aten.sub.Tensor, aten.sub_.Tensor)
def _join(tracer: Tracer, call: Call, args: Sequence[Any]) -> Value:
    left, right = _require_value(args[0], "an operand"), _require_value(args[1], "an operand")
    same_place = left.axis - len(left.shape) == right.axis - len(right.shape)
    if not same_place or len(left.slots) != len(right.slots):
        raise UnsupportedError(
            f"operands of shapes {left.shape} and {right.shape} hold different channels"
        )
    tracer.table.equate(left.slots, right.slots)
    wider = left if len(left.shape) >= len(right.shape) else right
    return tracer.emit(call, "join", [left, right], wider.axis, wider.slots)


@rule(aten.cat.default)
def _cat(tracer: Tracer, call: Call, args: Sequence[Any]) -> Value:
    parts = [_require_value(part, "an operand") for part in args[0]]
    dim = args[1] % len(call.shape)
    if any(part.axis != parts[0].axis for part in parts):
        raise UnsupportedError("its operands hold channels on different dimensions")
    if dim == parts[0].axis:
        return tracer.emit(call, "join", parts, dim, np.concatenate([p.slots for p in parts]))
    if dim == 0:
        raise UnsupportedError("it joins batches: costs per image would depend on their number")
    for part in parts[1:]:
        tracer.table.equate(parts[0].slots, part.slots)
    return tracer.emit(call, "join", parts, parts[0].axis, parts[0].slots)
