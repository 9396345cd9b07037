"""The products of a convolution of channels-last tensors, by the kernels that suit its shape.

PyTorch gives them to oneDNN on CPU, which compiles code for every shape that it has not seen: one
to two milliseconds for each. A search draws new widths in every step, so here

* a pointwise (1x1) convolution is a matrix product, see `dmcp.ops.pointwise`,
* a depthwise one has kernels of its own, see `dmcp.ops.depthwise`,
* another one whose inputs are narrowed, or that has few windows, is a matrix product with the
  pixels of its windows, see `dmcp.ops.windows`, and
* every other one is left to PyTorch, as are those on other devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

import dmcp.ops.depthwise
import dmcp.ops.pointwise
import dmcp.ops.windows  # noqa: F401  (they register their ops)
from dmcp.ops.layout import prefix
from dmcp.ops.library import op

Pair = tuple[int, int]

_FEW_WINDOWS = 256
"""Up to as many windows in a batch, gathering them costs less than what oneDNN's blocks waste."""


class Convolution(NamedTuple):
    """What is fixed about a convolution without bias, whose padding is zeros.

    Attributes:
        inputs: channels that it convolves when nothing is narrowed.
        depthwise: whether every channel, however many there are, has its own kernel.
    """

    inputs: int
    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    depthwise: bool

    @property
    def geometry(self) -> tuple[Pair, Pair, Pair, Pair]:
        """Kernel, stride, padding and dilation."""
        return self.kernel, self.stride, self.padding, self.dilation


class Products:
    """By PyTorch, for every convolution. Weights may be of a wider dtype than ``x`` and ``grad``.

    Args:
        conv: the convolution.
    """

    def __init__(self, conv: Convolution) -> None:
        self._conv = conv

    def cut(self, weight: Tensor, widths: Sequence[int] | None) -> Tensor:
        """What the other methods take of a weight [O, C or 1, kh, kw]: a view of its first outputs
        and inputs, as many as ``widths`` says."""
        return weight if widths is None else prefix(weight, widths)

    def output(self, x: Tensor, weight: Tensor) -> Tensor:
        """[N, C, H, W] and a weight -> [N, O, H', W']."""
        _, stride, padding, dilation = self._conv.geometry
        groups = x.shape[1] if self._conv.depthwise else 1
        return torch.conv2d(x, weight.to(x.dtype), None, stride, padding, dilation, groups)

    def grad_input(self, grad: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        """The gradient of ``x``, which is of ``shape``."""
        # Of x, only the layout is looked at; memory that nobody touches costs nothing.
        x = torch.empty(
            shape, dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last
        )
        return self._backward(grad, x, weight, (True, False, False))[0]

    def add_grad_weight(self, grad: Tensor, x: Tensor, weight: Tensor, into: Tensor) -> None:
        """Add the gradient of ``weight`` to what `cut` made of a tensor."""
        into += self._backward(grad, x, weight, (False, True, False))[1]

    def _backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool, bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        _, stride, padding, dilation = self._conv.geometry
        groups = x.shape[1] if self._conv.depthwise else 1
        return torch.ops.aten.convolution_backward.default(
            *(grad, x, weight.to(x.dtype), None, stride, padding, dilation),
            *(False, (0, 0), groups, wanted),
        )


class _Pointwise(Products):
    """As matrix products."""

    def cut(self, weight: Tensor, widths: Sequence[int] | None) -> Tensor:
        return weight.as_strided(widths or weight.shape[:2], weight.stride()[:2])

    def output(self, x: Tensor, weight: Tensor) -> Tensor:
        return op("pointwise", x)(x, weight)

    def grad_input(self, grad: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        return op("pointwise_grad_input", grad)(grad, weight)

    def add_grad_weight(self, grad: Tensor, x: Tensor, weight: Tensor, into: Tensor) -> None:
        op("pointwise_grad_weight", grad)(grad, x, into)


class _Depthwise(Products):
    """By kernels that know their number of channels when they are called."""

    def output(self, x: Tensor, weight: Tensor) -> Tensor:
        return op("depthwise", x)(x, weight, self._conv.stride[0])

    def grad_input(self, grad: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        stride = self._conv.stride[0]
        return op("depthwise_grad_input", grad)(grad, weight, *shape[2:], stride)

    def add_grad_weight(self, grad: Tensor, x: Tensor, weight: Tensor, into: Tensor) -> None:
        kernel, stride = self._conv.kernel[0], self._conv.stride[0]
        into += op("depthwise_grad_weight", grad)(grad, x, kernel, stride)


class _Gathered(Products):
    """As matrix products with the pixels of every window."""

    def output(self, x: Tensor, weight: Tensor) -> Tensor:
        windows = self._windows(x)
        return op("pointwise", windows)(windows, _matrix(weight))

    def grad_input(self, grad: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        windows = op("pointwise_grad_input", grad)(grad, _matrix(weight))
        return op("scatter_windows", grad)(windows, shape[2:], *self._conv.geometry)

    def add_grad_weight(self, grad: Tensor, x: Tensor, weight: Tensor, into: Tensor) -> None:
        outputs, inputs, height, width = weight.shape
        found = into.new_zeros(outputs, height * width * inputs)
        op("pointwise_grad_weight", grad)(grad, self._windows(x), found)
        into += found.view(outputs, height, width, inputs).permute(0, 3, 1, 2)

    def _windows(self, x: Tensor) -> Tensor:
        return op("gather_windows", x)(x, *self._conv.geometry)


def _matrix(weight: Tensor) -> Tensor:
    """[O, C, kh, kw] -> [O, kh kw C]."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def products(conv: Convolution, x: Tensor) -> Products:
    """Who computes a convolution of ``x``."""
    # Elsewhere nothing has been measured to beat the vendor's kernels.
    if not x.is_cpu:
        return Products(conv)
    own = _of_shape(conv)
    if own is not None:
        return own
    batch, channels, height, width = x.shape
    windows = batch * height * width // (conv.stride[0] * conv.stride[1])
    gathers = channels != conv.inputs or windows <= _FEW_WINDOWS
    return _Gathered(conv) if gathers and not conv.depthwise else Products(conv)


@cache
def _of_shape(conv: Convolution) -> Products | None:
    """Who computes it whatever the sizes of the tensors."""
    _, kernel, stride, padding, dilation, depthwise = conv
    if dilation != (1, 1) or kernel[0] != kernel[1] or stride[0] != stride[1]:
        return None
    if padding != (kernel[0] // 2, kernel[0] // 2):
        return None
    if depthwise:
        return _Depthwise(conv) if kernel[0] in (3, 5) and stride[0] in (1, 2) else None
    return _Pointwise(conv) if kernel == stride == (1, 1) else None
