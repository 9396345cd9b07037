"""`dmcp.ops.norm_act` in plain PyTorch: its reference, and its ops for devices without kernels."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dmcp.ops.layout import empty_like, place

Activation = Literal["identity", "relu", "relu6", "hardswish", "silu"]
ACTIVATIONS: tuple[Activation, ...] = ("identity", "relu", "relu6", "hardswish", "silu")

ResidualPlace = Literal["before", "after"]


def norm_act_reference(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    residual_place: ResidualPlace = "after",
    act: Activation = "identity",
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """What `norm_act` computes in one process, in PyTorch operations that autograd differentiates.

    The scale is folded into weight and bias where it comes before the activation or there is none;
    behind a ReLU that would lose the gradient of a scale of 0. Without scale and residual this is
    ``F.batch_norm`` and the activation, bit for bit.
    """
    before = residual is not None and residual_place == "before"
    folds = scale is not None and (before or act == "identity")
    if folds:
        assert scale is not None
        weight = scale if weight is None else weight * scale
        bias = None if bias is None else bias * scale
    y = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    if before:
        assert residual is not None
        y = y + residual
    y = activation(y, act)
    if scale is not None and not folds:
        y = y * per_channel(scale, x).to(x.dtype)
    return y if residual is None or before else y + residual


def activation(x: Tensor, act: Activation) -> Tensor:
    """The activation of that name."""
    return x if act == "identity" else getattr(F, act)(x)


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """[C] values, shaped to broadcast against ``x`` [N, C, ...]."""
    return values.view(1, -1, *[1] * (x.ndim - 2))


def stats_dtype(x: Tensor) -> torch.dtype:
    """The dtype of every per-channel vector."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class EagerKernels:
    """The four ops in plain PyTorch, for devices without kernels of their own."""

    @staticmethod
    def norm_stats(
        x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float
    ) -> tuple[Tensor, Tensor]:
        over = [dim for dim in range(x.ndim) if dim != 1]
        var, mean = torch.var_mean(x.to(stats_dtype(x)), over, correction=0)
        if running_mean is not None and running_var is not None:
            count = x.numel() / x.shape[1]
            running_mean.mul_(1 - momentum).add_(mean, alpha=momentum)
            running_var.mul_(1 - momentum).add_(var, alpha=momentum * count / (count - 1))
        return mean, var

    @staticmethod
    def norm_act(
        x: Tensor,
        mean: Tensor,
        var: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        scale: Tensor | None,
        residual: Tensor | None,
        eps: float,
        act: Activation,
        before: bool,
    ) -> Tensor:
        _, v = _affine(x, mean, var, weight, bias, eps)
        q: Tensor | float = 1.0 if scale is None else per_channel(scale, x)
        if before:
            assert residual is not None
            y = activation(q * v + residual, act)
        else:
            y = q * activation(v, act)
            y = y if residual is None else y + residual
        out = empty_like(place(x)).tensor
        return out.copy_(y)

    @staticmethod
    def norm_act_sums(
        grad: Tensor,
        x: Tensor,
        mean: Tensor,
        var: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        scale: Tensor | None,
        residual: Tensor | None,
        eps: float,
        act: Activation,
    ) -> tuple[Tensor, Tensor]:
        normal, v = _affine(x, mean, var, weight, bias, eps)
        q: Tensor | float = 1.0 if scale is None else per_channel(scale, x)
        over = [dim for dim in range(x.ndim) if dim != 1]
        grad = grad.to(v.dtype)
        if residual is None:
            seen, at_scale = v, grad * activation(v, act)
        else:
            seen = q * v + residual
            at_scale = _slope(grad, seen, act) * v
        g = _slope(grad, seen, act)
        sums = torch.stack([(q * g).sum(over), (q * g * normal).sum(over), at_scale.sum(over)])
        if residual is None:
            return sums, x.new_empty(0)
        return sums, empty_like(place(x)).tensor.copy_(g)

    @staticmethod
    def norm_act_grad(
        grad: Tensor,
        x: Tensor,
        mean: Tensor,
        var: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        scale: Tensor | None,
        sums: Tensor | None,
        count: float,
        eps: float,
        act: Activation,
    ) -> Tensor:
        normal, v = _affine(x, mean, var, weight, bias, eps)
        d = _slope(grad.to(v.dtype), v, act)
        if scale is not None:
            d = d * per_channel(scale, x)
        if sums is not None:
            d = d - per_channel(sums[0] / count, x) - normal * per_channel(sums[1] / count, x)
        gain = torch.rsqrt(var + eps) if weight is None else weight * torch.rsqrt(var + eps)
        return empty_like(place(x)).tensor.copy_(d * per_channel(gain, x))


def _affine(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """x̂ and v = weight x̂ + bias, in the dtype of the statistics."""
    centred = x.to(mean.dtype) - per_channel(mean, x)
    normal = centred * per_channel(torch.rsqrt(var + eps), x)
    v = normal if weight is None else normal * per_channel(weight, x)
    return normal, v if bias is None else v + per_channel(bias, x)


def _slope(grad: Tensor, u: Tensor, act: Activation) -> Tensor:
    """grad act'(u)."""
    match act:
        case "relu":
            return torch.ops.aten.threshold_backward(grad, u, 0)
        case "relu6":
            return torch.ops.aten.hardtanh_backward(grad, u, 0, 6)
        case "hardswish":
            return torch.ops.aten.hardswish_backward(grad, u)
        case "silu":
            return torch.ops.aten.silu_backward(grad, u)
    return grad
