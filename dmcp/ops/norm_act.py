"""Batch normalisation, activation, retain probability and residual sum in one pass over memory.

    v = weight (x - mean) / sqrt(var + eps) + bias        per channel
    y = scale act(v) [+ residual],  or  y = act(scale v + residual)

Where `scale` is the retain probability of a channel this is what DMCP computes around a convolution
(Guo et al., CVPR 2020, section 3.2): after the activation, or in front of it where the activation
commutes with it or a residual joins in between. Forward and backward each pass twice over the
activations; nothing is saved but ``x`` and per-channel vectors, because the backward computes ``v``
again. The formulas are in ``csrc/common/norm_act.h``.

Here are the function, its gradients and the registration of its ops; their kernels are in
``norm_act_eager``, ``norm_act_native`` and ``dmcp.kernels.norm_act``. A pass each is an op, so that
processes can exchange what belongs to the whole batch in between: ``norm_stats`` and ``norm_act``
forward, ``norm_act_sums`` and ``norm_act_grad`` backward. Training in one process takes both passes
as one op each way, ``norm_act_train`` and ``norm_act_train_backward``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from dmcp.backends import accelerated, native_cuda, native_module, triton_installed
from dmcp.ops.layout import empty_like, place
from dmcp.ops.library import has_node, op, register
from dmcp.ops.norm_act_eager import (
    ACTIVATIONS,
    Activation,
    EagerKernels,
    ResidualPlace,
    norm_act_reference,
    stats_dtype,
)
from dmcp.ops.norm_act_native import DTYPES, CpuKernels, CudaKernels

RESIDUAL_PLACES = get_args(ResidualPlace)


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
    options = Options(momentum, eps, act, residual is not None and residual_place == "before")
    if training and not synchronised and has_node(x) and residual_place in RESIDUAL_PLACES:
        tensors = (x, weight, bias, scale, residual, running_mean, running_var)
        y = torch.ops.dmcp.norm_act_node.default(*tensors, *options.numbers)
        if y is not None:
            return y
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
        check_count(x, 1 if synchronised else 2)
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
    if training and alone:
        if running_mean is not None and running_var is not None:
            # Ops do not count what they write; a backward that saved these has to notice.
            torch.autograd.graph.increment_version((running_mean, running_var))
        return _TrainNormAct.apply(
            x, weight, bias, scale, residual, running_mean, running_var, options
        )
    count: Tensor | None = None
    if not alone:
        running_mean, running_var, count = _joined_stats(
            x.detach(), running_mean, running_var, momentum
        )
    return _NormAct.apply(
        x, weight, bias, scale, residual, running_mean, running_var, options, count
    )


class Options(NamedTuple):
    """What `norm_act` is told besides tensors.

    Attributes:
        before: whether a residual comes before the activation.
    """

    momentum: float
    eps: float
    act: Activation
    before: bool

    @property
    def numbers(self) -> tuple[float, float, int, bool]:
        """As the C++ nodes take them."""
        return self.momentum, self.eps, _CODES.get(self.act, -1), self.before


_CODES = {act: code for code, act in enumerate(ACTIVATIONS)}


# The form of autograd.Function with `setup_context` would cost as much as everything else together,
# and every argument costs about half a microsecond each way.


class _TrainNormAct(torch.autograd.Function):
    """By the statistics of the batch of this process."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        scale: Tensor | None,
        residual: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        options: Options,
    ) -> Tensor:
        y, moments = op("norm_act_train", x)(
            x, weight, bias, scale, residual, running_mean, running_var, *options
        )
        kept = residual if options.before else None
        ctx.save_for_backward(x, moments, weight, bias, scale, kept)
        ctx.options = options
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, moments, weight, bias, scale, residual = ctx.saved_tensors
        _, eps, act, _ = ctx.options
        needed = ctx.needs_input_grad
        return _gradients(
            needed,
            *train_gradients(
                grad, x, moments, weight, bias, scale, residual, eps, act, wants_x=needed[0]
            ),
        )


def train_gradients(
    grad: Tensor,
    x: Tensor,
    moments: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    residual: Tensor | None,
    eps: float,
    act: Activation,
    add_weight: Tensor | None = None,
    add_bias: Tensor | None = None,
    *,
    wants_x: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """The gradients of what ``dmcp::norm_act_train`` computes.

    Args:
        residual: if it comes before the activation.
        add_weight, add_bias: the gradients of weight and bias are added to their first C elements.

    Returns:
        Those of x (None unless wanted), of bias, weight and scale [3, C], and of the residual.
    """
    if residual is None and wants_x:
        grad_x, sums = op("norm_act_train_backward", x)(
            grad, x, moments, weight, bias, scale, eps, act, add_weight, add_bias
        )
        return grad_x, sums, grad
    inputs = (x, *moments.unbind(0), weight, bias, scale)
    sums, seen, slope = _sums(grad, inputs, residual, eps, act)
    add_vectors(sums, add_weight, add_bias)
    if not wants_x:
        return None, sums, seen
    count = x.numel() / x.shape[1]
    grad_x = torch.ops.dmcp.norm_act_grad.default(seen, *inputs, sums, count, eps, slope)
    return grad_x, sums, seen


def add_vectors(sums: Tensor, add_weight: Tensor | None, add_bias: Tensor | None) -> None:
    """Add the gradients of bias and weight, the first rows of ``sums``, where they are wanted."""
    for row, target in enumerate((add_bias, add_weight)):
        if target is not None:
            target[: sums.shape[1]] += sums[row]


class _NormAct(torch.autograd.Function):
    """By given statistics; by those of all processes' batches where ``count`` says of how many
    values per channel they are."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        scale: Tensor | None,
        residual: Tensor | None,
        mean: Tensor,
        var: Tensor,
        options: Options,
        count: Tensor | None,
    ) -> Tensor:
        _, eps, act, before = options
        y = torch.ops.dmcp.norm_act.default(
            x, mean, var, weight, bias, scale, residual, eps, act, before
        )
        kept = residual if before else None
        ctx.save_for_backward(x, mean, var, weight, bias, scale, kept, count)
        ctx.options = options
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, residual, count = ctx.saved_tensors
        _, eps, act, _ = ctx.options
        needed = ctx.needs_input_grad
        sums, seen, slope = _sums(grad, inputs, residual, eps, act)
        means = None if count is None else _means_of_all(sums, count)
        grad_x = None
        if needed[0]:
            grad_x = torch.ops.dmcp.norm_act_grad.default(seen, *inputs, means, 1.0, eps, slope)
        return *_gradients(needed, grad_x, sums, seen), None


def _sums(
    grad: Tensor, inputs: Sequence[Any], residual: Tensor | None, eps: float, act: Activation
) -> tuple[Tensor, Tensor, Activation]:
    """The gradients of the vectors; dy and the activation that are left for the gradient of x: with
    a residual in front of it, the activation is behind us then."""
    sums, grad_residual = torch.ops.dmcp.norm_act_sums.default(grad, *inputs, residual, eps, act)
    return (sums, grad, act) if residual is None else (sums, grad_residual, "identity")


def _gradients(
    needed: Sequence[bool], grad_x: Tensor | None, sums: Tensor, grad_residual: Tensor
) -> tuple[Tensor | None, ...]:
    """In the order of the arguments, None for those that want none."""
    grad_bias, grad_weight, grad_scale = sums.unbind(0)
    return (
        grad_x,
        grad_weight if needed[1] else None,
        grad_bias if needed[2] else None,
        grad_scale if needed[3] else None,
        grad_residual if needed[4] else None,
        None,
        None,
        None,
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


def _means_of_all(sums: Tensor, count: Tensor) -> Tensor:
    """For the gradient of the sum of all processes' losses: every x moves everyone's statistics.
    The gradients of weight, bias and scale stay those of this process's."""
    means = sums.clone()
    dist.all_reduce(means)
    return means.div_(count)


# --- Checks --------------------------------------------------------------------------------------


def _check(x: Tensor, act: str, residual: Tensor | None, place: str, **vectors: Any) -> None:
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be float32, bfloat16, float16 or float64, got {x.dtype}")
    if x.ndim < 2:
        raise ValueError(f"x must be [N, C, ...], got the shape {list(x.shape)}")
    if act not in ACTIVATIONS:
        raise ValueError(f"act must be one of {', '.join(ACTIVATIONS)}, got {act!r}")
    check_residual_place(place)
    check_residual(x, residual)
    dtype, shape, device = stats_dtype(x), (x.shape[1],), x.device
    for name, vector in vectors.items():
        if vector is None:
            continue
        if vector.dtype != dtype:
            raise TypeError(f"{name} must be {dtype} for {x.dtype} activations, got {vector.dtype}")
        if vector.shape != shape:
            raise ValueError(f"{name} must be {[*shape]}, got the shape {[*vector.shape]}")
        if vector.device != device:
            raise ValueError(f"{name} must be on {device} like x, got {vector.device}")


def check_residual_place(place: str) -> None:
    """Raises ValueError unless it is one."""
    if place not in RESIDUAL_PLACES:
        raise ValueError(f"residual_place must be 'before' or 'after', got {place!r}")


def check_residual(x: Tensor, residual: Tensor | None) -> None:
    """Raises ValueError unless it can be added to what ``x`` becomes."""
    if residual is None:
        return
    if residual.dtype != x.dtype or residual.shape != x.shape:
        raise ValueError(
            f"residual must be {x.dtype} {list(x.shape)} like x, "
            f"got {residual.dtype} {list(residual.shape)}"
        )
    if residual.device != x.device:
        raise ValueError(f"residual must be on {x.device} like x, got {residual.device}")


def check_count(x: Tensor, fewest: int) -> None:
    """Raises ValueError if there are fewer values per channel than statistics need."""
    if x.numel() < fewest * max(x.shape[1], 1):
        raise ValueError(
            f"x must hold {fewest} or more values per channel in training, "
            f"got the shape {list(x.shape)}"
        )


# --- Registration --------------------------------------------------------------------------------

OPS = ("norm_stats", "norm_act", "norm_act_sums", "norm_act_grad")
"""What a backend implements; those of training follow from them."""

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
    " bool before) -> (Tensor, Tensor)",
    "norm_act_train_backward": "(Tensor grad, Tensor x, Tensor moments, Tensor? weight,"
    " Tensor? bias, Tensor? scale, float eps, str act, Tensor(a!)? add_weight=None,"
    " Tensor(b!)? add_bias=None) -> (Tensor, Tensor)",
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
    """The ops of training, from the four of a backend that has no kernels for them."""

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
    ) -> tuple[Tensor, Tensor]:
        """y, and mean and biased variance [2, C]."""
        mean, var = self._kernels.norm_stats(x, running_mean, running_var, momentum)
        y = self._kernels.norm_act(x, mean, var, weight, bias, scale, residual, eps, act, before)
        return y, torch.stack([mean, var])

    def norm_act_train_backward(
        self,
        grad: Tensor,
        x: Tensor,
        moments: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        scale: Tensor | None,
        eps: float,
        act: Activation,
        add_weight: Tensor | None = None,
        add_bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The gradients of x and of the vectors, where no residual comes before the activation.

        Those of weight and bias are also added to the first elements of tensors of their own.
        """
        affine = (*moments.unbind(0), weight, bias, scale)
        sums, _ = self._kernels.norm_act_sums(grad, x, *affine, None, eps, act)
        count = x.numel() / x.shape[1]
        grad_x = self._kernels.norm_act_grad(grad, x, *affine, sums, count, eps, act)
        add_vectors(sums, add_weight, add_bias)
        return grad_x, sums


def _cpu_kernels() -> Any:
    native = native_module()
    return None if native is None else CpuKernels(native, native.cpu_isas()[-1])


def _cuda_kernels() -> Any:
    if native_cuda():
        return CudaKernels(native_module())
    return TritonKernels() if triton_installed() else None


def _kernel(kernels: Any, name: str) -> Any:
    """The kernel of an op, None where there is no such backend."""
    if kernels is None:
        return None
    return getattr(kernels, name, None) or getattr(_Composites(kernels), name)


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
