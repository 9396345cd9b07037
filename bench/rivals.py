"""Who computes a layer of `layers.Layer` in the benchmarks, all from the same tensors.

* ``ours``: `dmcp.ops.norm_act` as it comes; ``cuda``, ``triton``: over these kernels on CUDA
  tensors, whichever of them is the default;
* ``eager``: batch norm, activation and a broadcast multiply in PyTorch, the scale folded into γ and
  β where it commutes with what follows;
* ``published``: the mask of the paper's released code in place of the multiply;
* ``compile``: ``eager`` under ``torch.compile``, for these shapes;
* ``copy``: a copy of x, which is what the bandwidth of the others is held against.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from layers import Layer
from torch import Tensor

from dmcp.backends import native_cuda, native_module, triton_installed
from dmcp.ops.library import replaced
from dmcp.ops.norm_act_eager import activation

# By its name: dmcp.ops.norm_act is the function once dmcp.ops exports it.
_ops = importlib.import_module("dmcp.ops.norm_act")

NAMES = ("ours", "cuda", "triton", "eager", "published", "compile")

Forward = Callable[..., Tensor]
"""From a layer and the fields of `Tensors` up to ``running_var`` to y."""

TOLERANCE = {torch.float32: 5e-3, torch.bfloat16: 3e-2}
"""Largest ‖result - reference‖ / ‖reference‖ of a rival that may be timed: wide enough for the
rounding of PyTorch's own batch norm, which moves values across the kinks of the activation."""


@dataclass(frozen=True, eq=False)
class Tensors:
    """What a layer reads, and the gradient that comes back to it."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    scale: Tensor
    residual: Tensor | None
    running_mean: Tensor
    running_var: Tensor
    grad: Tensor

    @staticmethod
    def of(layer: Layer, batch: int, dtype: torch.dtype, device: torch.device) -> Tensors:
        """Random ones, channels last, with retain probabilities that fall from 1."""
        channels = layer.channels
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        def activations() -> Tensor:
            values = normal(batch, channels, layer.height, layer.width, dtype=dtype)
            return values.to(memory_format=torch.channels_last)

        scale = torch.linspace(1, 0.1, channels, device=device)
        scale[: kept_channels(channels)] = 1
        return Tensors(
            x=activations().requires_grad_(),
            weight=(1 + 0.1 * normal(channels)).requires_grad_(),
            bias=normal(channels).requires_grad_(),
            scale=scale.requires_grad_(),
            residual=activations().requires_grad_() if layer.residual else None,
            running_mean=torch.zeros(channels, device=device),
            running_var=torch.ones(channels, device=device),
            grad=activations(),
        )

    @property
    def arguments(self) -> tuple[Tensor | None, ...]:
        return (
            *(self.x, self.weight, self.bias, self.scale, self.residual),
            *(self.running_mean, self.running_var),
        )

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """What gradients are asked for."""
        inputs = (self.x, self.weight, self.bias, self.scale, self.residual)
        return tuple(tensor for tensor in inputs if tensor is not None)

    @property
    def bytes(self) -> int:
        """Of the activations."""
        tensors = (self.x, self.residual, self.grad)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def mapped(self, change: Callable[[Tensor], Tensor], *, vectors: bool = False) -> Tensors:
        """New leaves for the activations, for the per-channel vectors too if asked."""
        names = ["x", "residual", "grad"]
        if vectors:
            names += ["weight", "bias", "scale", "running_mean", "running_var"]
        fields = dict(vars(self))
        for name in names:
            if fields[name] is not None:
                tensor = fields[name]
                fields[name] = change(tensor.detach()).requires_grad_(tensor.requires_grad)
        return Tensors(**fields)


def kept_channels(channels: int) -> int:
    """Channels that are always kept, a tenth as in the paper."""
    return math.ceil(channels / 10)


def ours(
    layer: Layer,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor,
    residual: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
) -> Tensor:
    return _ops.norm_act(
        x,
        weight,
        bias,
        scale=scale,
        residual=residual,
        residual_place=layer.residual or "after",
        act=layer.act,
        running_mean=running_mean,
        running_var=running_var,
        training=True,
    )


def eager(
    layer: Layer,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor,
    residual: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
) -> Tensor:
    if layer.scale_commutes:
        weight, bias = weight * scale, bias * scale
    y = F.batch_norm(x, running_mean, running_var, weight, bias, training=True)
    if residual is not None:
        y = y + residual
    y = activation(y, layer.act)
    return y if layer.scale_commutes else y * scale.to(y.dtype).view(-1, 1, 1)


def published(
    layer: Layer,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor,
    residual: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
) -> Tensor:
    y = F.batch_norm(x, running_mean, running_var, weight, bias, training=True)
    if layer.scale_commutes:
        y = _published_mask(y, scale)
    if residual is not None:
        y = y + residual
    y = activation(y, layer.act)
    return y if layer.scale_commutes else _published_mask(y, scale)


def _published_mask(y: Tensor, scale: Tensor) -> Tensor:
    """Channels to the front, a copy; scale those that may go; join; back again, another copy."""
    kept = kept_channels(y.shape[1])
    front = y.transpose(0, 1).contiguous()
    scaled = front[kept:].flatten(1) * scale[kept:, None].to(y.dtype)
    joined = torch.cat([front[:kept], scaled.view_as(front[kept:])])
    return joined.transpose(0, 1).contiguous()


def compiled(layer: Layer) -> Forward:
    """`eager` for one layer; what was compiled for others is dropped, so that no limit is met."""
    torch.compiler.reset()
    return torch.compile(lambda _, *tensors: eager(layer, *tensors), fullgraph=True, dynamic=False)


def available(device: torch.device) -> list[str]:
    """Those of `NAMES` that tensors of this device can be given to."""
    on_gpu = device.type == "cuda"
    there = {"cuda": on_gpu and native_cuda(), "triton": on_gpu and triton_installed()}
    return [name for name in NAMES if there.get(name, True)]


@contextmanager
def kernels_of(rival: str) -> Iterator[None]:
    """`norm_act` runs over the kernels of that name on CUDA tensors while the context is open."""
    if rival not in ("cuda", "triton"):
        yield
        return
    kernels: Any = _ops.TritonKernels() if rival == "triton" else _ops.CudaKernels(native_module())
    with replaced({op: getattr(kernels, op) for op in _ops.OPS}, "CUDA"):
        yield


def forward_of(rival: str, layer: Layer) -> Forward:
    """The function of that name, to be called within `kernels_of`."""
    if rival == "compile":
        return compiled(layer)
    return {"eager": eager, "published": published}.get(rival, ours)


def check(forward: Forward, layer: Layer, tensors: Tensors) -> None:
    """Compare a rival with `eager` in float64.

    Raises:
        AssertionError: y or a gradient is not the same to rounding.
    """
    exact = tensors.mapped(Tensor.double, vectors=True)
    expected = _results(eager, layer, exact)
    results = _results(forward, layer, tensors)
    names = ("y", "x", "weight", "bias", "scale", "residual")[: len(results)]
    kept = kept_channels(layer.channels)
    for name, result, reference in zip(names, results, expected, strict=True):
        if name == "scale":  # the published mask does not differentiate a base that stays
            result, reference = result[kept:], reference[kept:]
        error = float((result - reference).norm() / reference.norm())
        limit = TOLERANCE[tensors.x.dtype]
        assert error <= limit, f"{layer}: {name} is off by {error:.1e}, more than {limit:.0e}"


def _results(forward: Forward, layer: Layer, tensors: Tensors) -> tuple[Tensor, ...]:
    y = forward(layer, *tensors.arguments)
    return y.detach(), *torch.autograd.grad(y, tensors.inputs, tensors.grad)
