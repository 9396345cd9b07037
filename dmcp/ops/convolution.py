"""The products of a convolution of channels-last tensors, by the kernels that suit its shape.

PyTorch gives them to oneDNN on CPU, which compiles code for every shape that it has not seen: one
to two milliseconds for each. A search draws new widths in every step, so here

* a pointwise (1x1) convolution is a matrix product, see `dmcp.ops.pointwise`,
* a depthwise one has kernels of its own, see `dmcp.ops.depthwise`, and
* every other one is left to PyTorch, as are those on other devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from dmcp.ops import depthwise, pointwise  # noqa: F401  (they register their ops)
from dmcp.ops.layout import prefix
from dmcp.ops.library import op

Pair = tuple[int, int]


class Convolution(NamedTuple):
    """What is fixed about a convolution without bias, whose padding is zeros.

    Attributes:
        depthwise: whether every channel, however many there are, has its own kernel.
    """

    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    depthwise: bool


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
        _, stride, padding, dilation, apart = self._conv
        groups = x.shape[1] if apart else 1
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
        _, stride, padding, dilation, apart = self._conv
        groups = x.shape[1] if apart else 1
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


@cache
def products(conv: Convolution, device: str) -> Products:
    """Who computes a convolution on a type of device."""
    # Elsewhere nothing has been measured to beat the vendor's kernels.
    if device != "cpu":
        return Products(conv)
    if conv == ((1, 1), (1, 1), (0, 0), (1, 1), False):
        return _Pointwise(conv)
    size, stride = conv.kernel[0], conv.stride[0]
    same = Convolution((size, size), (stride, stride), (size // 2, size // 2), (1, 1), True)
    if conv == same and size in (3, 5) and stride in (1, 2):
        return _Depthwise(conv)
    return Products(conv)
