"""Operators that subtract means and divide by deviations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dmcp.graph.rules.registry import rule
from dmcp.graph.values import Axis, Value

if TYPE_CHECKING:
    from dmcp.graph.tracer import Tracer


@rule("batch_norm", "instance_norm")
def per_channel(
    tracer: Tracer,
    x: Value,
    weight: Value | None,
    bias: Value | None,
    mean: Value | None,
    var: Value | None,
    *_: Any,
) -> Value:
    """Channels stay apart. A dropped one is zero behind the norm as its weight and bias are; where
    it has none, as its input and its running mean are."""
    tensors = [tensor for tensor in (weight, bias, mean, var) if tensor is not None]
    axes = list(x.axes)
    axis = axes[1]
    if x.shape[1] > 1 and tensors:
        axis = tracer.meet([axis, *(tensor.axes[0] for tensor in tensors)])
    if axis is not None:
        affine = weight is not None and bias is not None
        axis = Axis(axis.slots, "" if affine else axis.taint)
    tracer.size("num_features", axis)
    axes[1] = axis
    module = tracer.visit("norm", tensors, axis, axis)
    return tracer.emit("norm", [x, *tensors], axes, module=module)


@rule("group_norm")
def group_norm(
    tracer: Tracer, x: Value, groups: int, weight: Value | None, bias: Value | None, *_: Any
) -> Value:
    """Whole norm groups go: the statistics of a smaller one would be others."""
    tensors = [tensor for tensor in (weight, bias) if tensor is not None]
    axes = list(x.axes)
    axis = tracer.meet([axes[1], *(tensor.axes[0] for tensor in tensors)]) if tensors else axes[1]
    if axis is not None:
        per = x.shape[1] // groups
        module = tracer.model.get_submodule(tracer.call.module)
        if groups == 1:
            tracer.block(axis, "a group norm runs over all of its channels")
        elif getattr(module, "num_groups", None) != groups:
            tracer.block(axis, "the number of norm groups is written into the code")
        tracer.table.tie_rows(axis.slots.reshape(groups, per).T)
        tracer.size("num_groups", axis, per)
        tracer.size("num_channels", axis)
        affine = weight is not None and bias is not None
        axis = Axis(axis.slots, "" if affine else axis.taint)
    axes[1] = axis
    name = tracer.visit("norm", tensors, axis, axis)
    return tracer.emit("norm", [x, *tensors], axes, module=name)


@rule("layer_norm", "rms_norm")
def layer_norm(
    tracer: Tracer,
    x: Value,
    shape: Sequence[int],
    weight: Value | None,
    bias: Value | float | None = None,
    *_: Any,
) -> Value:
    name = str(tracer.call.operator).removeprefix("aten.").partition(".")[0]
    lead = len(x.shape) - len(shape)
    tracer.block(x.axes[lead:], f"a {name.replace('_', ' ')} runs over its channels")
    axes = list(x.axes)
    if isinstance(bias, Value):
        reason = f"{name} adds a bias to every channel ({tracer.call.where})"
        axes[:lead] = [axis and axis.tainted(reason) for axis in axes[:lead]]
    return tracer.emit("norm", [x], axes)
