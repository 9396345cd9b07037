"""Batch normalisation, activation, retain probability and residual sum in one pass over memory.

    v = weight (x - mean) / sqrt(var + eps) + bias        per channel
    y = scale act(v) [+ residual],  or  y = act(scale v + residual)

Where `scale` is the retain probability of a channel this is what DMCP computes around a convolution
(Guo et al., CVPR 2020, section 3.2): after the activation, or in front of it where the activation
commutes with it or a residual joins in between. Forward and backward each pass twice over the
activations; nothing is saved but ``x`` and per-channel vectors, because the backward computes ``v``
again. The formulas are in ``csrc/common/norm_act.h``.

Four kernels do the work, so that processes can exchange what belongs to the whole batch in between:
``norm_stats`` and ``norm_act`` forward, ``norm_act_sums`` and ``norm_act_grad`` backward.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dmcp.backends import accelerated, native_cuda, native_module, triton_installed
from dmcp.ops.layout import Placed, empty_like, place, place_like
from dmcp.ops.library import register

Activation = Literal["identity", "relu", "relu6", "hardswish", "silu"]
ACTIVATIONS: tuple[Activation, ...] = ("identity", "relu", "relu6", "hardswish", "silu")

ResidualPlace = Literal["before", "after"]


def norm_act(
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
    synchronised: bool = False,
) -> Tensor:
    """Normalise, activate, scale, add.

    Differentiable, once, in ``x``, ``weight``, ``bias``, ``scale`` and ``residual``. Deterministic;
    the C++ kernels give the same bits for any number of threads. Channels may be a prefix of a
    wider buffer (a view ``buffer[:, :width]``), in either memory format, without a copy.

    Args:
        x: [N, C, ...], float32, bfloat16, float16 or float64.
        weight, bias: γ and β [C]; None for 1 and 0. They, and all other vectors, are float32, or
            float64 for a float64 ``x``.
        scale: q >= 0 [C], None for 1.
        residual: of the shape and dtype of ``x``, None for 0.
        residual_place: ``"after"``: y = q act(v) + residual; ``"before"``: y = act(q v + residual).
        act: the activation.
        running_mean, running_var: [C]; updated in place when ``training`` (the variance with the
            unbiased one of the batch, as ``nn.BatchNorm2d`` does), else the statistics to use.
        training: normalise by the statistics of the batch.
        momentum: weight of this batch in the running statistics.
        eps: added to the variance.
        synchronised: with ``training``, use the statistics of the batches of all processes of the
            default process group. Shards may differ in size.

    Returns:
        y, of the shape, dtype and strides of ``x`` (dense where those strides are neither of a
        contiguous nor of a channels-last buffer).

    Raises:
        TypeError: a dtype is not the accepted one.
        ValueError: a shape or device does not fit, an unknown name, fewer than two values per
            channel in training, or no statistics in evaluation.
    """
    _check(
        x,
        act,
        residual,
        residual_place,
        weight=weight,
        bias=bias,
        scale=scale,
        running_mean=running_mean,
        running_var=running_var,
    )
    missing = (running_mean is None) + (running_var is None)
    if missing == 1 or (missing and not training):
        raise ValueError("running_mean and running_var must be given, both, unless training")
    if training:
        _check_count(x, 1 if synchronised else 2)
    alone = not (training and synchronised)
    if alone and (x.numel() == 0 or not accelerated()):  # kernels need not know empty batches
        return norm_act_reference(
            x,
            weight,
            bias,
            scale=scale,
            residual=residual,
            residual_place=residual_place,
            act=act,
            running_mean=running_mean,
            running_var=running_var,
            training=training,
            momentum=momentum,
            eps=eps,
        )
    before = residual is not None and residual_place == "before"
    count: Tensor | None = None
    if not alone:
        running_mean, running_var, count = _joined_stats(
            x.detach(), running_mean, running_var, momentum
        )
    elif training and running_mean is not None and running_var is not None:
        # Ops do not count what they write; a backward that saved these has to notice.
        torch.autograd.graph.increment_version((running_mean, running_var))
    return _NormAct.apply(
        x,
        weight,
        bias,
        scale,
        residual,
        running_mean,
        running_var,
        count,
        training,
        momentum,
        eps,
        act,
        before,
    )


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


class _NormAct(torch.autograd.Function):
    """The ops with their gradients.

    ``count`` is given where mean and var are those of all processes' batches, of so many values
    per channel. The form with ``setup_context`` would cost as much as everything else together.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        scale: Tensor | None,
        residual: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        count: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
        act: Activation,
        before: bool,
    ) -> Tensor:
        if training and count is None:
            y, mean, var = torch.ops.dmcp.norm_act_train.default(
                x, weight, bias, scale, residual, mean, var, momentum, eps, act, before
            )
        else:
            y = torch.ops.dmcp.norm_act.default(
                x, mean, var, weight, bias, scale, residual, eps, act, before
            )
        kept = residual if before else None
        ctx.save_for_backward(x, mean, var, weight, bias, scale, kept, count)
        ctx.options = training, eps, act, before
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, count = ctx.saved_tensors
        training, eps, act, before = ctx.options
        needs_x, *needs_vector, needs_residual = ctx.needs_input_grad[:5]
        if count is not None:
            grad_x, sums, grad_residual = _synchronised_backward(grad, inputs, count, eps, act)
        else:
            grad_x, sums, grad_residual = torch.ops.dmcp.norm_act_backward.default(
                grad, *inputs, training, needs_x, eps, act
            )
        grad_bias, grad_weight, grad_scale = sums.unbind(0)
        vectors = [
            gradient if needed else None
            for gradient, needed in zip(
                (grad_weight, grad_bias, grad_scale), needs_vector, strict=True
            )
        ]
        if not before:
            grad_residual = grad
        return (
            grad_x if needs_x else None,
            *vectors,
            grad_residual if needs_residual else None,
            *[None] * 8,
        )


# --- Statistics of the batches of all processes ---------------------------------------------------


def _joined_stats(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and count of all processes' ``x``, in one collective.

    The parts are joined exactly, so that a large mean costs no digits and shards may differ.
    """
    own_mean, own_var = torch.ops.dmcp.norm_stats.default(x, None, None, 0.0)
    own = torch.cat([own_mean, own_var, own_mean.new_full((1,), x.numel() / x.shape[1])])
    parts = own.new_empty(dist.get_world_size(), own.numel())
    dist.all_gather(list(parts.unbind(0)), own)
    means, variances, counts = parts.split([len(own_mean), len(own_var), 1], dim=1)
    count = counts.sum()
    shares = counts / count
    mean = (shares * means).sum(0)
    var = (shares * (variances + (means - mean) ** 2)).sum(0)
    if running_mean is not None and running_var is not None:
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(var * (count / (count - 1)), momentum)
    return mean, var, count


def _synchronised_backward(
    grad: Tensor, inputs: list[Any], count: Tensor, eps: float, act: Activation
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``norm_act_backward``. The gradient is that of the sum of all processes' losses, because
    every x moves everyone's statistics; those of weight, bias and scale are this process's."""
    x, mean, var, weight, bias, scale, residual = inputs
    sums, grad_residual = torch.ops.dmcp.norm_act_sums.default(grad, *inputs, eps, act)
    if residual is not None:
        grad, act = grad_residual, "identity"
    means = sums.clone()
    dist.all_reduce(means)
    means /= count
    grad_x = torch.ops.dmcp.norm_act_grad.default(
        grad, x, mean, var, weight, bias, scale, means, 1.0, eps, act
    )
    return grad_x, sums, grad_residual


# --- Plain PyTorch -------------------------------------------------------------------------------


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


# --- The native module ---------------------------------------------------------------------------

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
"""What ``dmcp._native`` calls the dtypes of activations."""

_NO_RESIDUAL, _RESIDUAL_BEFORE, _RESIDUAL_AFTER = range(3)

_ADDING = ("norm_stats", "norm_act_sums")
"""The ops that add up over channels; on CUDA they want memory for the sums of the blocks."""


class NativeKernels:
    """The four ops through ``dmcp._native``.

    Args:
        native: the module.
        isa: the CPU kernels for this instruction set, one of ``native.cpu_isas()``; None for the
            CUDA kernels.
    """

    def __init__(self, native: Any, isa: str | None) -> None:
        self._isa = isa
        suffix = "cuda" if isa is None else "cpu"
        if isa is None:
            self._workspace_of = native.norm_workspace_cuda
        for name in OPS:
            setattr(self, f"_{name}", getattr(native, f"{name}_{suffix}"))

    def norm_stats(
        self,
        x: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
    ) -> tuple[Tensor, Tensor]:
        placed = place(x)
        mean = x.new_empty(x.shape[1], dtype=stats_dtype(x))
        var = torch.empty_like(mean)
        running = _dense(running_mean, running_var)
        results = (_address(mean), _address(var), *map(_address, running))
        self._launch("norm_stats", placed, *_pitched(placed), *results, momentum)
        for given, updated in zip((running_mean, running_var), running, strict=True):
            if given is not None and updated is not None and given is not updated:
                given.copy_(updated)
        return mean, var

    def norm_act(
        self,
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
        placed = place(x)
        y = empty_like(placed)
        vectors = _dense(mean, var, weight, bias, scale)
        added = None if residual is None else place_like(residual, placed)
        kind = _NO_RESIDUAL if added is None else _RESIDUAL_BEFORE if before else _RESIDUAL_AFTER
        tensors = (*_pitched(placed), *_pitched(added), *_pitched(y))
        affine = (*map(_address, vectors), eps, ACTIVATIONS.index(act))
        self._launch("norm_act", placed, *affine, kind, *tensors)
        return y.tensor

    def norm_act_sums(
        self,
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
        placed = place(x)
        incoming = place_like(grad, placed)
        vectors = _dense(mean, var, weight, bias, scale)
        added = None if residual is None else place_like(residual, placed)
        grad_residual = None if residual is None else empty_like(placed)
        sums = mean.new_empty(3, x.shape[1])
        tensors = (*_pitched(incoming), *_pitched(placed), *_pitched(added))
        affine = (*map(_address, vectors), eps, ACTIVATIONS.index(act))
        outputs = (*_pitched(grad_residual), _address(sums))
        self._launch("norm_act_sums", placed, *affine, *tensors, *outputs)
        return sums, x.new_empty(0) if grad_residual is None else grad_residual.tensor

    def norm_act_grad(
        self,
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
        placed = place(x)
        incoming = place_like(grad, placed)
        grad_x = empty_like(placed)
        vectors = _dense(mean, var, weight, bias, scale, sums)
        tensors = (*_pitched(incoming), *_pitched(placed), *_pitched(grad_x))
        affine = (*map(_address, vectors[:5]), eps, ACTIVATIONS.index(act))
        self._launch("norm_act_grad", placed, *affine, _address(vectors[5]), count, *tensors)
        return grad_x.tensor

    def _launch(self, name: str, placed: Placed, *arguments: Any) -> None:
        x = placed.tensor
        batch, channels = x.shape[:2]
        pixels = x.numel() // max(batch * channels, 1)
        shape = (batch, channels, pixels, placed.channels_last, DTYPES[x.dtype])
        kernel = getattr(self, f"_{name}")
        if self._isa is not None:
            kernel(*shape, *arguments, self._isa)
            return
        with torch.cuda.device(x.device):
            if name in _ADDING:
                workspace = x.new_empty(self._workspace_of(*shape), dtype=torch.uint8)
                arguments = (*arguments, workspace.data_ptr())
            kernel(*shape, *arguments, torch.cuda.current_stream().cuda_stream)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _pitched(placed: Placed | None) -> tuple[int, int]:
    return (0, 0) if placed is None else (placed.tensor.data_ptr(), placed.pitch)


def _dense(*vectors: Tensor | None) -> list[Tensor | None]:
    return [vector if vector is None else vector.contiguous() for vector in vectors]


# --- Checks --------------------------------------------------------------------------------------


def _check(x: Tensor, act: str, residual: Tensor | None, place: str, **vectors: Any) -> None:
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be float32, bfloat16, float16 or float64, got {x.dtype}")
    if x.ndim < 2:
        raise ValueError(f"x must be [N, C, ...], got the shape {list(x.shape)}")
    if act not in ACTIVATIONS:
        raise ValueError(f"act must be one of {', '.join(ACTIVATIONS)}, got {act!r}")
    if place not in ("before", "after"):
        raise ValueError(f"residual_place must be 'before' or 'after', got {place!r}")
    if residual is not None and (residual.dtype != x.dtype or residual.shape != x.shape):
        raise ValueError(
            f"residual must be {x.dtype} {list(x.shape)} like x, "
            f"got {residual.dtype} {list(residual.shape)}"
        )
    if residual is not None and residual.device != x.device:
        raise ValueError(f"residual must be on {x.device} like x, got {residual.device}")
    dtype, channels = stats_dtype(x), x.shape[1]
    for name, vector in vectors.items():
        if vector is None:
            continue
        if vector.dtype != dtype:
            raise TypeError(f"{name} must be {dtype} for {x.dtype} activations, got {vector.dtype}")
        if vector.ndim != 1 or vector.shape[0] != channels:
            raise ValueError(f"{name} must be [{channels}], got the shape {list(vector.shape)}")
        if vector.device != x.device:
            raise ValueError(f"{name} must be on {x.device} like x, got {vector.device}")


def _check_count(x: Tensor, fewest: int) -> None:
    if x.numel() < fewest * max(x.shape[1], 1):
        raise ValueError(
            f"x must hold {fewest} or more values per channel in training, "
            f"got the shape {list(x.shape)}"
        )


# --- Registration --------------------------------------------------------------------------------

OPS = ("norm_stats", "norm_act", "norm_act_sums", "norm_act_grad")
"""What a backend implements."""

_SCHEMAS = {
    "norm_stats": "(Tensor x, Tensor(a!)? running_mean, Tensor(b!)? running_var, float momentum)"
    " -> (Tensor, Tensor)",
    "norm_act": "(Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, Tensor? scale,"
    " Tensor? residual, float eps, str act, bool before) -> Tensor",
    "norm_act_sums": "(Tensor grad, Tensor x, Tensor mean, Tensor var, Tensor? weight,"
    " Tensor? bias, Tensor? scale, Tensor? residual, float eps, str act) -> (Tensor, Tensor)",
    "norm_act_grad": "(Tensor grad, Tensor x, Tensor mean, Tensor var, Tensor? weight,"
    " Tensor? bias, Tensor? scale, Tensor? sums, float count, float eps, str act) -> Tensor",
    "norm_act_train": "(Tensor x, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? residual,"
    " Tensor(a!)? running_mean, Tensor(b!)? running_var, float momentum, float eps, str act,"
    " bool before) -> (Tensor, Tensor, Tensor)",
    "norm_act_backward": "(Tensor grad, Tensor x, Tensor mean, Tensor var, Tensor? weight,"
    " Tensor? bias, Tensor? scale, Tensor? residual, bool training, bool needs_x, float eps,"
    " str act) -> (Tensor, Tensor, Tensor)",
}


class _Fakes:
    """Shapes, dtypes and strides of the outputs."""

    @staticmethod
    def norm_stats(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        shape, dtype = (x.shape[1],), stats_dtype(x)
        return x.new_empty(shape, dtype=dtype), x.new_empty(shape, dtype=dtype)

    @staticmethod
    def norm_act(x: Tensor, *_: Any) -> Tensor:
        return empty_like(place(x)).tensor

    @staticmethod
    def norm_act_sums(grad: Tensor, x: Tensor, mean: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        has_residual = rest[4] is not None
        grad_residual = empty_like(place(x)).tensor if has_residual else x.new_empty(0)
        return mean.new_empty(3, x.shape[1]), grad_residual

    @staticmethod
    def norm_act_grad(grad: Tensor, x: Tensor, *_: Any) -> Tensor:
        return empty_like(place(x)).tensor


class TritonKernels:
    """The four ops through ``dmcp.kernels.norm_act``, which is imported when one is called."""

    def __getattr__(self, name: str) -> Any:
        if name not in OPS:
            raise AttributeError(name)

        def launch(x: Tensor, *arguments: Any) -> Any:
            from dmcp.kernels import norm_act

            with torch.cuda.device(x.device):
                return getattr(norm_act, name)(x, *arguments)

        return launch


class _Composites:
    """Two ops in one, because a call through the dispatcher costs as much as a small layer.

    Args:
        kernels: of one backend.
    """

    def __init__(self, kernels: Any) -> None:
        self._kernels = kernels

    def norm_act_train(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        scale: Tensor | None,
        residual: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
        act: Activation,
        before: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean, var = self._kernels.norm_stats(x, running_mean, running_var, momentum)
        y = self._kernels.norm_act(x, mean, var, weight, bias, scale, residual, eps, act, before)
        return y, mean, var

    def norm_act_backward(
        self,
        grad: Tensor,
        x: Tensor,
        mean: Tensor,
        var: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        scale: Tensor | None,
        residual: Tensor | None,
        training: bool,
        needs_x: bool,
        eps: float,
        act: Activation,
    ) -> tuple[Tensor, Tensor, Tensor]:
        sums, grad_residual = self._kernels.norm_act_sums(
            grad, x, mean, var, weight, bias, scale, residual, eps, act
        )
        if not needs_x:
            return x.new_empty(0), sums, grad_residual
        if residual is not None:  # the activation is behind us now
            grad, act = grad_residual, "identity"
        count = x.numel() / x.shape[1]
        grad_x = self._kernels.norm_act_grad(
            grad, x, mean, var, weight, bias, scale, sums if training else None, count, eps, act
        )
        return grad_x, sums, grad_residual


def _cpu_kernels() -> Any:
    native = native_module()
    return None if native is None else NativeKernels(native, native.cpu_isas()[-1])


def _cuda_kernels() -> Any:
    if native_cuda():
        return NativeKernels(native_module(), None)
    return TritonKernels() if triton_installed() else None


def _kernel(kernels: Any, name: str) -> Any:
    """The kernel of an op, None where there is no such backend."""
    if kernels is None:
        return None
    return getattr(kernels if name in OPS else _Composites(kernels), name)


def _register() -> None:
    cpu, cuda = _cpu_kernels(), _cuda_kernels()
    for name, schema in _SCHEMAS.items():
        register(
            name + schema,
            eager=_kernel(EagerKernels, name),
            fake=_kernel(_Fakes, name),
            cpu=_kernel(cpu, name),
            cuda=_kernel(cuda, name),
        )


_register()
