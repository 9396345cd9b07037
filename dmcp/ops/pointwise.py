"""Convolutions with a kernel of one pixel, and their gradients, as matrix products.

    y = x weightᵀ           a row per pixel, a column per channel
    grad_x = grad weight
    grad_weight = gradᵀ x

PyTorch's own convolution compiles a primitive for every new shape on a CPU, and a search draws new
widths in every step. Here sizes are run-time numbers. Only a tensor whose channels do not come last
is copied, so activations may be prefixes of wider buffers, and the weight the corner of a wider
one, ``parameter[:outputs, :inputs]``.

In float32 and float64 PyTorch's matrix product does the work. In bfloat16 it would compile again:
CPU tensors have kernels in ``dmcp._native``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dmcp.backends import native_module
from dmcp.ops.layout import Placed, place_channels_last
from dmcp.ops.library import register

WEIGHTS = {
    torch.float32: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
    torch.float64: torch.float64,
}
"""The dtype of weights and of their gradients by that of activations."""


class EagerKernels:
    """The ops in plain PyTorch."""

    @staticmethod
    def pointwise(x: Tensor, weight: Tensor) -> Tensor:
        """[N, I, H, W] by [O, I]: [N, O, H, W], dense channels last. Weights are rounded to the
        dtype of ``x`` first."""
        _check_weight("x", x, weight, 1)
        if _through_float(x):
            return _image(_rows(x).float() @ _rounded(weight, x).t(), x).to(x.dtype)
        return _image(torch.nn.functional.linear(_rows(x), weight.to(x.dtype)), x)

    @staticmethod
    def pointwise_grad_input(grad: Tensor, weight: Tensor) -> Tensor:
        """[N, O, H, W] by [O, I]: [N, I, H, W], dense channels last."""
        _check_weight("grad", grad, weight, 0)
        if _through_float(grad):
            return _image(_rows(grad).float() @ _rounded(weight, grad), grad).to(grad.dtype)
        return _image(_rows(grad).mm(weight.to(grad.dtype)), grad)

    @staticmethod
    def pointwise_grad_weight(grad: Tensor, x: Tensor, into: Tensor) -> None:
        """Adds the gradient of the weight to ``into`` [O, I]."""
        _check_gradients(grad, x, into)
        columns, rows = _columns(grad), _rows(x)
        if _through_float(x):
            into.addmm_(columns.float(), rows.float())
        elif into.dtype == x.dtype:
            into.addmm_(columns, rows)
        else:
            into.add_(columns.mm(rows))


class CpuKernels:
    """The ops of CPU tensors, in bfloat16 through ``dmcp._native``.

    Args:
        native: the module.
        isa: the kernels for this instruction set, one of ``native.cpu_isas()``.
    """

    def __init__(self, native: Any, isa: str) -> None:
        self._native = native
        self._isa = isa

    def pointwise(self, x: Tensor, weight: Tensor) -> Tensor:
        """As `EagerKernels.pointwise`."""
        if x.dtype != torch.bfloat16 or not (x.numel() and weight.numel()):
            return EagerKernels.pointwise(x, weight)
        _check_weight("x", x, weight, 1)
        placed, weight = place_channels_last(x), _with_dense_rows(weight)
        outputs, inputs = weight.shape
        y = _empty_image(x, outputs)
        tensors = (*_pitched(placed), *_matrix(weight), y.data_ptr(), outputs)
        self._native.pointwise_cpu(_pixels(x), inputs, outputs, *tensors, self._isa)
        return y

    def pointwise_grad_input(self, grad: Tensor, weight: Tensor) -> Tensor:
        """As `EagerKernels.pointwise_grad_input`."""
        if grad.dtype != torch.bfloat16 or not (grad.numel() and weight.numel()):
            return EagerKernels.pointwise_grad_input(grad, weight)
        _check_weight("grad", grad, weight, 0)
        placed, weight = place_channels_last(grad), _with_dense_rows(weight)
        outputs, inputs = weight.shape
        grad_x = _empty_image(grad, inputs)
        tensors = (*_pitched(placed), *_matrix(weight), grad_x.data_ptr(), inputs)
        self._native.pointwise_grad_input_cpu(_pixels(grad), inputs, outputs, *tensors, self._isa)
        return grad_x

    def pointwise_grad_weight(self, grad: Tensor, x: Tensor, into: Tensor) -> None:
        """As `EagerKernels.pointwise_grad_weight`."""
        if x.dtype != torch.bfloat16 or not (x.numel() and grad.numel()):
            return EagerKernels.pointwise_grad_weight(grad, x, into)
        _check_gradients(grad, x, into)
        outputs, inputs = into.shape
        incoming, placed = place_channels_last(grad), place_channels_last(x)
        tensors = (*_pitched(incoming), *_pitched(placed), *_matrix(into))
        self._native.pointwise_grad_weight_cpu(
            _pixels(x), inputs, outputs, *tensors, True, self._isa
        )


# --- Activations as matrices ----------------------------------------------------------------------
# A view costs as much as a small product: each is made in one call.


def _pixels(x: Tensor) -> int:
    batch, _, height, width = x.shape
    return batch * height * width


def _rows(x: Tensor) -> Tensor:
    """[pixels, C], a view where channels come last."""
    tensor, _, pitch = place_channels_last(x)
    return tensor.as_strided((_pixels(x), x.shape[1]), (pitch, 1))


def _columns(x: Tensor) -> Tensor:
    """[C, pixels], a view where channels come last."""
    tensor, _, pitch = place_channels_last(x)
    return tensor.as_strided((x.shape[1], _pixels(x)), (1, pitch))


def _image(rows: Tensor, like: Tensor) -> Tensor:
    """[pixels, C] as [N, C, H, W] with the pixels of another image."""
    channels = rows.shape[1]
    return rows.as_strided(*_dense_last(like, channels))


def _empty_image(like: Tensor, channels: int) -> Tensor:
    return like.new_empty_strided(*_dense_last(like, channels))


def _dense_last(
    like: Tensor, channels: int
) -> tuple[tuple[int, int, int, int], tuple[int, int, int, int]]:
    """Sizes and strides of an image with the pixels of another one."""
    batch, _, height, width = like.shape
    row = width * channels
    return (batch, channels, height, width), (height * row, 1, row, channels)


def _through_float(x: Tensor) -> bool:
    """Whether PyTorch's product would compile for every shape."""
    return x.itemsize == 2 and x.device.type == "cpu"


def _rounded(weight: Tensor, x: Tensor) -> Tensor:
    return weight.to(x.dtype).float()


def _pitched(placed: Placed) -> tuple[int, int]:
    return placed.tensor.data_ptr(), placed.pitch


def _matrix(matrix: Tensor) -> tuple[int, int]:
    return matrix.data_ptr(), matrix.stride(0)


def _with_dense_rows(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


# --- Checks ---------------------------------------------------------------------------------------


def _check_weight(name: str, image: Tensor, weight: Tensor, dim: int) -> None:
    """`image` has the channels of dimension `dim` of the weight."""
    _check_image(name, image)
    if weight.dtype is not WEIGHTS[image.dtype]:
        raise TypeError(
            f"weight must be {WEIGHTS[image.dtype]} for {image.dtype} activations, "
            f"got {weight.dtype}"
        )
    if weight.ndim != 2 or weight.shape[dim] != image.shape[1]:
        expected = "[O, {}]" if dim else "[{}, I]"
        raise ValueError(
            f"weight must be {expected.format(image.shape[1])} for the channels of {name}, "
            f"got the shape {list(weight.shape)}"
        )
    if weight.device != image.device:
        raise ValueError(f"weight must be on {image.device} like {name}, got {weight.device}")


def _check_gradients(grad: Tensor, x: Tensor, into: Tensor) -> None:
    _check_image("x", x)
    batch, inputs, height, width = x.shape
    if grad.dtype is not x.dtype:
        raise TypeError(f"grad must be {x.dtype} like x, got {grad.dtype}")
    if grad.ndim != 4 or (grad.shape[0], *grad.shape[2:]) != (batch, height, width):
        raise ValueError(
            f"grad must be [{batch}, O, {height}, {width}] like x, got the shape {list(grad.shape)}"
        )
    if into.dtype is not WEIGHTS[x.dtype]:
        raise TypeError(
            f"into must be {WEIGHTS[x.dtype]} for {x.dtype} activations, got {into.dtype}"
        )
    if into.shape != (grad.shape[1], inputs):
        raise ValueError(
            f"into must be [{grad.shape[1]}, {inputs}] for the channels of grad and x, "
            f"got the shape {list(into.shape)}"
        )
    if into.stride(1) != 1 and inputs > 1:
        raise ValueError(f"into must have dense rows, got the strides {into.stride()}")
    if not grad.device == into.device == x.device:
        raise ValueError(
            f"grad and into must be on {x.device} like x, got {grad.device} and {into.device}"
        )


def _check_image(name: str, image: Tensor) -> None:
    if image.dtype not in WEIGHTS:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {image.dtype}")
    if image.ndim != 4:
        raise ValueError(f"{name} must be [N, C, H, W], got the shape {list(image.shape)}")


# --- Registration ---------------------------------------------------------------------------------

SCHEMAS = {
    "pointwise": "(Tensor x, Tensor weight) -> Tensor",
    "pointwise_grad_input": "(Tensor grad, Tensor weight) -> Tensor",
    "pointwise_grad_weight": "(Tensor grad, Tensor x, Tensor(a!) into) -> ()",
}


class _Fakes:
    """Shapes, dtypes and strides of the outputs."""

    @staticmethod
    def pointwise(x: Tensor, weight: Tensor) -> Tensor:
        return _empty_image(x, weight.shape[0])

    @staticmethod
    def pointwise_grad_input(grad: Tensor, weight: Tensor) -> Tensor:
        return _empty_image(grad, weight.shape[1])

    @staticmethod
    def pointwise_grad_weight(grad: Tensor, x: Tensor, into: Tensor) -> None:
        pass


def _cpu_kernels() -> CpuKernels | None:
    native = native_module()
    return None if native is None else CpuKernels(native, native.cpu_isas()[-1])


def _register() -> None:
    cpu = _cpu_kernels()
    for name, schema in SCHEMAS.items():
        register(
            name + schema,
            eager=getattr(EagerKernels, name),
            fake=getattr(_Fakes, name),
            cpu=None if cpu is None else getattr(cpu, name),
        )


_register()
