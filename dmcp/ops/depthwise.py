"""Depthwise convolution without bias, padded by half its kernel, and its gradients, as ops.

    y[n, c, i, j] = sum over u, v of x[n, c, s i + u - k // 2, s j + v - k // 2] w[c, 0, u, v]

Channels come last: what lies otherwise is copied, and what comes out is dense. The C++ kernels
(``csrc/cpu/depthwise_kernels.cpp``) take any width without preparation; libraries that generate
code for a shape take longer for that than for a convolution of a small map, and a search draws new
widths in every step. A gradient of the weight has the same bits for any number of threads.

Activations are float32, bfloat16, float16 or float64; weights, their gradients and all sums are
float32, or float64 for float64 activations. There is no autograd here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from dmcp.backends import native_module
from dmcp.ops.layout import Placed, place_channels_last
from dmcp.ops.library import register
from dmcp.ops.norm_act_eager import stats_dtype
from dmcp.ops.norm_act_native import DTYPES

KERNELS, STRIDES = (3, 5), (1, 2)

SCHEMAS = {
    "depthwise": "(Tensor x, Tensor weight, int stride) -> Tensor",
    "depthwise_grad_input": "(Tensor grad, Tensor weight, int height, int width, int stride)"
    " -> Tensor",
    "depthwise_grad_weight": "(Tensor grad, Tensor x, int kernel, int stride) -> Tensor",
}


class EagerKernels:
    """The ops in plain PyTorch, for devices without kernels of their own."""

    @staticmethod
    def depthwise(x: Tensor, weight: Tensor, stride: int) -> Tensor:
        _check_weight(x, weight, stride)
        channels, _, kernel, _ = weight.shape
        wide = x.to(weight.dtype)
        y = F.conv2d(wide, weight, stride=stride, padding=kernel // 2, groups=channels)
        return _channels_last(y.to(x.dtype))

    @staticmethod
    def depthwise_grad_input(
        grad: Tensor, weight: Tensor, height: int, width: int, stride: int
    ) -> Tensor:
        _check_weight(grad, weight, stride, name="grad")
        _check_size(grad, height, width, stride)
        channels, _, kernel, _ = weight.shape
        grad_x = conv2d_input(
            (grad.shape[0], channels, height, width),
            weight,
            grad.to(weight.dtype),
            stride=stride,
            padding=kernel // 2,
            groups=channels,
        )
        return _channels_last(grad_x.to(grad.dtype))

    @staticmethod
    def depthwise_grad_weight(grad: Tensor, x: Tensor, kernel: int, stride: int) -> Tensor:
        _check_pair(grad, x, kernel, stride)
        channels, dtype = x.shape[1], stats_dtype(x)
        return conv2d_weight(
            x.to(dtype),
            (channels, 1, kernel, kernel),
            grad.to(dtype),
            stride=stride,
            padding=kernel // 2,
            groups=channels,
        ).contiguous()


class CpuKernels:
    """For CPU tensors.

    Args:
        native: the module ``dmcp._native``.
        isa: the kernels for this instruction set, one of ``native.cpu_isas()``.
    """

    def __init__(self, native: Any, isa: str) -> None:
        self._native, self._isa = native, isa

    def depthwise(self, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        _check_weight(x, weight, stride)
        placed, rows = place_channels_last(x), weight.contiguous()
        y = _empty(x, _reduced(x.shape[2], stride), _reduced(x.shape[3], stride))
        self._native.depthwise_cpu(
            *(*x.shape, weight.shape[3], stride, DTYPES[x.dtype]),
            *(*_pitched(placed), rows.data_ptr()),
            *(y.data_ptr(), y.shape[1], self._isa),
        )
        return y

    def depthwise_grad_input(
        self, grad: Tensor, weight: Tensor, height: int, width: int, stride: int
    ) -> Tensor:
        _check_weight(grad, weight, stride, name="grad")
        _check_size(grad, height, width, stride)
        placed, rows = place_channels_last(grad), weight.contiguous()
        grad_x = _empty(grad, height, width)
        self._native.depthwise_grad_input_cpu(
            *(*grad_x.shape, weight.shape[3], stride, DTYPES[grad.dtype]),
            *(*_pitched(placed), rows.data_ptr()),
            *(grad_x.data_ptr(), grad_x.shape[1], self._isa),
        )
        return grad_x

    def depthwise_grad_weight(self, grad: Tensor, x: Tensor, kernel: int, stride: int) -> Tensor:
        _check_pair(grad, x, kernel, stride)
        placed, incoming = place_channels_last(x), place_channels_last(grad)
        grad_weight = _empty_weight(x, kernel)
        self._native.depthwise_grad_weight_cpu(
            *(*x.shape, kernel, stride, DTYPES[x.dtype]),
            *(*_pitched(incoming), *_pitched(placed)),
            *(grad_weight.data_ptr(), self._isa),
        )
        return grad_weight


class _Fakes:
    """Shapes, dtypes and strides of the outputs."""

    @staticmethod
    def depthwise(x: Tensor, weight: Tensor, stride: int) -> Tensor:
        _check_weight(x, weight, stride)
        return _empty(x, _reduced(x.shape[2], stride), _reduced(x.shape[3], stride))

    @staticmethod
    def depthwise_grad_input(
        grad: Tensor, weight: Tensor, height: int, width: int, stride: int
    ) -> Tensor:
        _check_weight(grad, weight, stride, name="grad")
        _check_size(grad, height, width, stride)
        return _empty(grad, height, width)

    @staticmethod
    def depthwise_grad_weight(grad: Tensor, x: Tensor, kernel: int, stride: int) -> Tensor:
        _check_pair(grad, x, kernel, stride)
        return _empty_weight(x, kernel)


def _reduced(size: int, stride: int) -> int:
    """The height or width of y."""
    return (size - 1) // stride + 1


def _empty(like: Tensor, height: int, width: int) -> Tensor:
    return torch.empty(
        (*like.shape[:2], height, width),
        dtype=like.dtype,
        device=like.device,
        memory_format=torch.channels_last,
    )


def _empty_weight(x: Tensor, kernel: int) -> Tensor:
    return x.new_empty((x.shape[1], 1, kernel, kernel), dtype=stats_dtype(x))


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _pitched(placed: Placed) -> tuple[int, int]:
    return placed.tensor.data_ptr(), placed.pitch


# --- What is accepted -----------------------------------------------------------------------------


def _check_activations(x: Tensor, name: str) -> None:
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {x.dtype}")
    if x.ndim != 4 or x.shape[2] < 1 or x.shape[3] < 1:
        raise ValueError(f"{name} must be [N, C, H >= 1, W >= 1], got the shape {list(x.shape)}")


def _check_options(kernel: int, stride: int) -> None:
    if kernel not in KERNELS:
        raise ValueError(f"kernel must be 3 or 5, got {kernel}")
    if stride not in STRIDES:
        raise ValueError(f"stride must be 1 or 2, got {stride}")


def _check_weight(x: Tensor, weight: Tensor, stride: int, name: str = "x") -> None:
    _check_activations(x, name)
    channels, kernel = x.shape[1], weight.shape[-1] if weight.ndim == 4 else 0
    if kernel not in KERNELS or weight.shape != (channels, 1, kernel, kernel):
        raise ValueError(
            f"weight must be [{channels}, 1, k, k] with k 3 or 5, got the shape {[*weight.shape]}"
        )
    if weight.dtype != stats_dtype(x):
        raise TypeError(
            f"weight must be {stats_dtype(x)} for {x.dtype} activations, got {weight.dtype}"
        )
    if weight.device != x.device:
        raise ValueError(f"weight must be on {x.device} like {name}, got {weight.device}")
    _check_options(kernel, stride)


def _check_size(grad: Tensor, height: int, width: int, stride: int) -> None:
    """Whether an input of that height and width has this gradient of its output."""
    expected = (_reduced(height, stride), _reduced(width, stride))
    if height < 1 or width < 1 or tuple(grad.shape[2:]) != expected:
        raise ValueError(
            f"grad must be [N, C, {expected[0]}, {expected[1]}] for an input of {height} x {width}"
            f" and stride {stride}, got the shape {list(grad.shape)}"
        )


def _check_pair(grad: Tensor, x: Tensor, kernel: int, stride: int) -> None:
    _check_activations(x, "x")
    _check_options(kernel, stride)
    expected = (*x.shape[:2], _reduced(x.shape[2], stride), _reduced(x.shape[3], stride))
    if tuple(grad.shape) != expected:
        raise ValueError(
            f"grad must be {[*expected]} for an x of {[*x.shape]} and stride {stride},"
            f" got the shape {list(grad.shape)}"
        )
    if grad.dtype != x.dtype:
        raise TypeError(f"grad must be {x.dtype} like x, got {grad.dtype}")
    if grad.device != x.device:
        raise ValueError(f"grad must be on {x.device} like x, got {grad.device}")


# --- Registration ---------------------------------------------------------------------------------


def _register() -> None:
    native = native_module()
    cpu = None if native is None else CpuKernels(native, native.cpu_isas()[-1])
    for name, schema in SCHEMAS.items():
        register(
            name + schema,
            eager=getattr(EagerKernels, name),
            fake=getattr(_Fakes, name),
            cpu=getattr(cpu, name, None),
        )


_register()
