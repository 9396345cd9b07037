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

from dmcp.ops.convolution import Convolution, products
from dmcp.ops.layout import prefix
from dmcp.ops.library import op
from dmcp.ops.norm_act import Options, check_count, train_gradients


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
) -> Tensor:
    """Convolve, normalise by the statistics of the batch, activate, scale, add.

    Args:
        x: [N, C, H, W], channels last.
        weight: [O, C or 1, kh, kw], of the dtype of the norm's parameters.
        norm: tensors of the norm.
        conv: the rest of the convolution.
        options: the rest of the norm.
        widths: how many outputs and inputs of ``weight`` take part, the first ones, and as many of
            the weight and bias of the norm. The three are leaves then that have a ``.grad`` if they
            want one, to which theirs is added; autograd does not see it. None: all of them, and
            their gradients are autograd's.

    Returns:
        y [N, O, H', W'], of the dtype of ``x``, channels last.

    Raises:
        ValueError: fewer than two values per channel.
    """
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
        ctx.products = products(conv, x.device.type)
        ctx.shape, ctx.options, ctx.widths = x.shape, options, widths
        vectors = _part(norm_weight, widths), _part(norm_bias, widths)
        z = ctx.products.output(x, _part(weight, widths))
        check_count(z, 2)
        y, moments = op("norm_act_train", z)(
            z, *vectors, scale, residual, running_mean, running_var, *options
        )
        kept = x if ctx.needs_input_grad[1] else None
        before = residual if options.before else None
        ctx.save_for_backward(kept, weight, norm_weight, norm_bias, scale, before, z, moments)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, norm_weight, norm_bias, scale, residual, z, moments = ctx.saved_tensors
        _, eps, act, _ = ctx.options
        widths, needed = ctx.widths, ctx.needs_input_grad
        cut = _part(weight, widths)
        vectors = _part(norm_weight, widths), _part(norm_bias, widths), scale
        grad_z, sums, grad_residual = train_gradients(
            grad, z, moments, *vectors, residual, eps, act, wants_x=needed[0] or needed[1]
        )
        grad_bias, grad_gain, grad_scale = sums.unbind(0)
        grad_x = None
        if needed[0]:
            grad_x = ctx.products.grad_input(grad_z, cut, ctx.shape)
        grad_weight = None
        if needed[1]:
            grad_weight = torch.zeros_like(weight) if widths is None else weight.grad
            ctx.products.add_grad_weight(grad_z, x, cut, _part(grad_weight, widths))
        if widths is not None:
            grad_weight = None
            _add(grad_gain, norm_weight, needed[2])
            _add(grad_bias, norm_bias, needed[3])
        in_autograd = widths is None
        return (
            grad_x,
            grad_weight,
            grad_gain if needed[2] and in_autograd else None,
            grad_bias if needed[3] and in_autograd else None,
            grad_scale if needed[4] else None,
            grad_residual if needed[5] else None,
            *(None,) * 5,
        )


def _part(tensor: Tensor | None, widths: tuple[int, ...] | None) -> Tensor | None:
    """What takes part of a weight [O, I, ...] or of a vector [O]."""
    if tensor is None or widths is None:
        return tensor
    return prefix(tensor, widths[: tensor.ndim])


def _add(gradient: Tensor, parameter: Tensor | None, wanted: bool) -> None:
    if wanted and parameter is not None and parameter.grad is not None:
        parameter.grad.narrow(0, 0, len(gradient)).add_(gradient)
