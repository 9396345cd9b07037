"""A convolution and everything up to the next one: batch norm, activation, retain probability and
residual sum, as one operation each way.

It computes what ``conv2d`` and `dmcp.ops.norm_act` do. As one node of the autograd graph it keeps
less (no input where the weights are frozen), and it may add the gradients of a sub-network's
weights straight to the part of ``.grad`` that they belong to: autograd would fill a tensor of the
full size with zeros for each.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dmcp.ops.autocast import as_autocast
from dmcp.ops.convolution import Convolution, products
from dmcp.ops.layout import gradient_of, prefix
from dmcp.ops.library import has_node, op
from dmcp.ops.norm_act import Options, check_count, check_residual, train_gradients


class Norm(NamedTuple):
    """The tensors that `dmcp.ops.norm_act` takes beside x; see there."""

    weight: Tensor | None = None
    bias: Tensor | None = None
    scale: Tensor | None = None
    residual: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None


def conv_norm_act(
    x: Tensor,
    weight: Tensor,
    norm: Norm,
    conv: Convolution,
    options: Options,
    widths: tuple[int, ...] | None = None,
) -> Tensor | None:
    """Convolve, normalise by the statistics of the batch, activate, scale, add.

    Args:
        x: [N, C, H, W], channels last, with values, C > 1 (one channel is channels last in every
            layout: which one is meant, it does not say); cast first where autocast is on.
        weight: [O, C or 1, kh, kw], of the dtype of the norm's parameters.
        norm: tensors of the norm.
        conv: the rest of the convolution.
        options: the rest of the norm.
        widths: how many outputs and inputs of ``weight`` take part, the first ones, and as many of
            the weight and bias of the norm. The three are leaves then that have a ``.grad`` if they
            want one, to which theirs is added; autograd does not see it. None: all of them, and
            their gradients are autograd's.

    Returns:
        y [N, O, H', W'], of the dtype of ``x``, channels last; None where the parameters and
        statistics are not on its device, or not float32 (float64 for a float64 ``x``).

    Raises:
        ValueError: fewer than two values per channel, or a residual that does not fit.
    """
    if has_node(x):
        y = torch.ops.dmcp.conv_norm_act_node.default(
            x, weight, *norm, *conv, *options.numbers, widths
        )
        if y is not None:
            return y
    x = as_autocast(x)
    if not _takes(x, weight, norm):
        return None
    if norm.running_mean is not None and norm.running_var is not None:
        # Ops do not count what they write; a backward that saved these has to notice.
        torch.autograd.graph.increment_version((norm.running_mean, norm.running_var))
    return _ConvNormAct.apply(x, weight, *norm, conv, options, widths)


class _ConvNormAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        scale: Tensor | None,
        residual: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        conv: Convolution,
        options: Options,
        widths: tuple[int, ...] | None,
    ) -> Tensor:
        ctx.products = products(conv, x)
        ctx.shape, ctx.options, ctx.widths = x.shape, options, widths
        ctx.leaves = weight, norm_weight, norm_bias
        cut = ctx.products.cut(weight, widths)
        gain, bias = _cut(norm_weight, widths), _cut(norm_bias, widths)
        z = ctx.products.output(x, cut)
        check_count(z, 2)
        check_residual(z, residual)
        y, moments = op("norm_act_train", z)(
            z, gain, bias, scale, residual, running_mean, running_var, *options
        )
        kept = x if ctx.needs_input_grad[1] else None
        before = residual if options.before else None
        ctx.save_for_backward(kept, cut, z, moments, gain, bias, scale, before)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, cut, z, moments, gain, bias, scale, residual = ctx.saved_tensors
        _, eps, act, _ = ctx.options
        needed, in_autograd = ctx.needs_input_grad, ctx.widths is None
        into: list[Tensor | None] = [None, None, None]
        if not in_autograd:
            leaves = zip(ctx.leaves, needed[1:4], strict=True)
            into = [gradient_of(leaf) if wanted else None for leaf, wanted in leaves]
        elif needed[1]:
            into[0] = torch.zeros_like(ctx.leaves[0], memory_format=torch.channels_last)
        grad_z, sums, grad_residual = train_gradients(
            grad,
            *(z, moments, gain, bias, scale, residual, eps, act, into[1], into[2]),
            wants_x=needed[0] or needed[1],
        )
        grad_x = None
        if needed[0]:
            grad_x = ctx.products.grad_input(grad_z, cut, ctx.shape)
        if into[0] is not None:
            target = ctx.products.cut(into[0], ctx.widths)
            ctx.products.add_grad_weight(grad_z, x, cut, target)
        return (
            grad_x,
            into[0] if in_autograd else None,
            sums[1] if needed[2] and in_autograd else None,
            sums[0] if needed[3] and in_autograd else None,
            sums[2] if needed[4] else None,
            grad_residual if needed[5] else None,
            *(None,) * 5,
        )


def _takes(x: Tensor, weight: Tensor, norm: Norm) -> bool:
    dtype = torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype
    tensors = (weight, norm.weight, norm.bias, norm.running_mean, norm.running_var)
    return all(t is None or (t.dtype == dtype and t.device == x.device) for t in tensors)


def _cut(vector: Tensor | None, widths: tuple[int, ...] | None) -> Tensor | None:
    """As much of a vector [O] as takes part."""
    return vector if vector is None or widths is None else prefix(vector, widths[:1])
