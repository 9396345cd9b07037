"""Operators that compute every position on its own."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map_only

from dmcp.graph.rules.registry import rule
from dmcp.graph.values import Axis, Value

if TYPE_CHECKING:
    from dmcp.graph.tracer import Call, Tracer

_PROBES = 64


@rule(
    "pointwise",
    "hardswish",
    "relu6",
    "where",
    "log_sigmoid",
    "type_as",
    "copy_",
    "fill_",
    "zero_",
)
def pointwise(tracer: Tracer, *arguments: Any) -> Value:
    """Whether a dropped channel stays zero is asked of the operator itself, on numbers."""
    operands = [argument for argument in arguments if isinstance(argument, Value)]
    probe = _Probe.of(tracer.call, operands)
    axes = [_join(tracer, operands, probe, -dim) for dim in range(len(tracer.call.shape), 0, -1)]
    variable = [operand for operand in operands if not operand.constant]
    if len(variable) != 1:
        alone = [probe.zero(frozenset({n})) for n in range(len(operands))]
        return tracer.emit("product" if any(alone) else "join", operands, axes)
    return tracer.emit(
        "activation",
        operands,
        axes,
        module=tracer.call.module if tracer.call.alone else None,
        homogeneous=probe.homogeneous(operands.index(variable[0])),
    )


def _join(tracer: Tracer, operands: Sequence[Value], probe: _Probe, dim: int) -> Axis | None:
    """The output's axis on a dimension, counted from the end as broadcasting does."""
    size = tracer.call.shape[dim]
    holders = {
        number: operand.axes[dim]
        for number, operand in enumerate(operands)
        if len(operand.shape) >= -dim and operand.shape[dim] == size > 1
    }
    axis = tracer.meet(list(holders.values()))
    if axis is None:
        return None
    zeros = frozenset(n for n, held in holders.items() if held is not None and not held.taint)
    if probe.zero(zeros):
        return Axis(axis.slots, "", axis.origins, wild=False)
    name = str(tracer.call.operator).removeprefix("aten.").partition(".")[0]
    taints = [held.taint for held in holders.values() if held is not None and held.taint]
    reason = taints[0] if taints else f"{name} of zero need not be zero ({tracer.call.where})"
    return axis.tainted(reason)


class _Probe:
    """Asks an operator what it makes of zeros."""

    def __init__(self, operator: Any, template: tuple[Any, ...], dtypes: tuple[torch.dtype, ...]):
        self.operator = operator
        self.template = template
        self.dtypes = dtypes

    @classmethod
    def of(cls, call: Call, operands: Sequence[Value]) -> _Probe:
        node = call.node
        arguments = (node.args, tuple(sorted(node.kwargs.items())))
        template = tree_map_only(fx.Node, lambda _: _OPERAND, arguments)
        tensors = [n.meta.get("val") for n in _leaves(node)]
        dtypes = tuple(t.dtype for t in tensors if isinstance(t, Tensor))
        if len(dtypes) != len(operands):
            dtypes = (torch.float32,) * len(operands)
        try:
            return _probe(node.target, template, dtypes)
        except TypeError:  # an argument that cannot be hashed: no cache
            return cls(node.target, template, dtypes)

    @lru_cache(maxsize=4096)  # noqa: B019  (probes are few and live as long as the process)
    def zero(self, zeros: frozenset[int]) -> bool:
        """Whether the output is zero where these operands are, whatever the others are."""
        if not zeros:
            return False
        result = self._run(
            [
                torch.zeros(_PROBES, device="cpu").to(dtype)
                if number in zeros
                else _numbers(dtype, number)
                for number, dtype in enumerate(self.dtypes)
            ]
        )
        return result is not None and bool((result == 0).all())

    @lru_cache(maxsize=4096)  # noqa: B019
    def homogeneous(self, operand: int) -> bool:
        """Whether f(q v) = q f(v) for q >= 0, v being this operand."""
        tensors = [_numbers(dtype, number) for number, dtype in enumerate(self.dtypes)]
        if not tensors[operand].is_floating_point():
            return False
        plain = self._run(tensors)
        tensors[operand] = tensors[operand] * 0.25
        scaled = self._run(tensors)
        if plain is None or scaled is None or not plain.is_floating_point():
            return False
        return bool(torch.equal(scaled, plain * 0.25))

    def _run(self, tensors: Sequence[Tensor]) -> Tensor | None:
        queue = [tensor.clone() for tensor in tensors]
        args, kwargs = tree_map_only(_Operand, lambda _: queue.pop(0), self.template)
        try:
            result = self.operator(*args, **dict(kwargs))
        except Exception:  # it cannot be asked this way: nothing is known
            return None
        return result if isinstance(result, Tensor) else None


class _Operand:
    """Stands for a tensor among the arguments."""


_OPERAND = _Operand()


@lru_cache(maxsize=4096)
def _probe(operator: Any, template: tuple[Any, ...], dtypes: tuple[torch.dtype, ...]) -> _Probe:
    return _Probe(operator, template, dtypes)


def _leaves(node: fx.Node) -> list[fx.Node]:
    found: list[fx.Node] = []
    tree_map_only(fx.Node, found.append, (node.args, tuple(sorted(node.kwargs.items()))))
    return found


def _numbers(dtype: torch.dtype, seed: int) -> Tensor:
    """Powers of two of both signs, which scale without rounding, in an order of their own."""
    order = torch.randperm(_PROBES, generator=torch.Generator().manual_seed(seed), device="cpu")
    numbers = 2.0 ** torch.linspace(-6, 14, _PROBES // 2, device="cpu").round()
    numbers = torch.cat([numbers, -numbers])[order]
    return numbers > 0 if dtype == torch.bool else numbers.to(dtype)


@rule(
    "alias",
    "clone",
    "contiguous",
    "detach",
    "dropout",
    "feature_dropout",
    "lift_fresh_copy",
    "requires_grad_",
    "to",
    "_to_copy",
)
def identity(tracer: Tracer, x: Value, *_: Any) -> Value:
    return tracer.emit("linear_map", [x], x.axes)


@rule("alpha_dropout", "feature_alpha_dropout")
def alpha_dropout(tracer: Tracer, x: Value, _probability: float, training: bool) -> Value:
    reason = f"alpha dropout of zero is not zero ({tracer.call.where})"
    axes = [axis and axis.tainted(reason) if training else axis for axis in x.axes]
    return tracer.emit("linear_map", [x], axes)


@rule("prelu", "_prelu_kernel")
def prelu(tracer: Tracer, x: Value, weight: Value) -> Value:
    axes = list(x.axes)
    if weight.shape != (1,) and len(x.shape) > 1:
        axes[1] = tracer.meet([x.axes[1], weight.axes[0]])
        tracer.size("num_parameters", axes[1])
    module = tracer.call.module if tracer.call.alone else None
    return tracer.emit("activation", [x, weight], axes, module=module)


@rule("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like")
def filled_like(tracer: Tracer, x: Value, *_: Any) -> Value:
    is_zero = str(tracer.call.operator).startswith("aten.zeros_like")
    taint = "" if is_zero else f"a constant is not zero ({tracer.call.where})"
    axes = [axis and Axis(axis.slots, taint) for axis in x.axes]
    return tracer.emit("join", [x], axes)


@rule(
    "arange",
    "empty",
    "eye",
    "full",
    "linspace",
    "ones",
    "rand",
    "randn",
    "scalar_tensor",
    "zeros",
    "new_empty",
    "new_full",
    "new_ones",
    "new_zeros",
    "bernoulli_",
)
def constant(tracer: Tracer, *_: Any) -> Value:
    """Sizes that a program names are taken to be written into the code."""
    shape = tracer.call.shape
    return Value(shape, (None,) * len(shape))


@rule("glu")
def glu(tracer: Tracer, x: Value, dim: int) -> Value:
    """The first half times the sigmoid of the second one."""
    axes, dim = list(x.axes), x.dim(dim)
    axis = axes[dim]
    if axis is not None:
        axes[dim] = Axis(tracer.table.tie_rows(axis.slots.reshape(2, -1)), axis.taint)
    return tracer.emit("product", [x], axes)
