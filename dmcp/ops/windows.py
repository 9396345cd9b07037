"""The windows of a convolution as pixels of an image, and back.

A convolution is the product of its weights with its windows, so that with these two ops any
convolution is a pointwise one: of an image that holds, in every pixel, the kernel's height times
width times the channels under it. ``gather_windows`` makes that image, ``scatter_windows`` is its
transpose: it adds up what the windows say of every pixel. Both are channels last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dmcp.backends import native_module
from dmcp.ops.layout import place_channels_last
from dmcp.ops.library import register
from dmcp.ops.norm_act_native import DTYPES

Pair = Sequence[int]


class EagerKernels:
    """In plain PyTorch."""

    @staticmethod
    def gather_windows(
        x: Tensor, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair
    ) -> Tensor:
        """[N, C, H, W] -> [N, kh kw C, H', W'], the channels of a tap next to each other."""
        size = _windows(x.shape, kernel, stride, padding, dilation)
        geometry: Any = (kernel, dilation, padding, stride)
        columns = F.unfold(_computable(x), *geometry)
        taps = columns.unflatten(1, (x.shape[1], kernel[0] * kernel[1])).transpose(1, 2)
        image = taps.flatten(1, 2).unflatten(2, size).to(x.dtype)
        return image.contiguous(memory_format=torch.channels_last)

    @staticmethod
    def scatter_windows(
        windows: Tensor,
        size: Pair,
        kernel: Pair,
        stride: Pair,
        padding: Pair,
        dilation: Pair,
    ) -> Tensor:
        """[N, kh kw C, H', W'] -> [N, C, H, W] of that size."""
        taps = kernel[0] * kernel[1]
        columns = windows.flatten(2).unflatten(1, (taps, windows.shape[1] // taps))
        columns = _computable(columns.transpose(1, 2).flatten(1, 2))
        geometry: Any = (size, kernel, dilation, padding, stride)
        image = F.fold(columns, *geometry).to(windows.dtype)
        return image.contiguous(memory_format=torch.channels_last)


class CpuKernels:
    """Through ``dmcp._native``; sums are of float32 for bfloat16."""

    def __init__(self, native: Any) -> None:
        self._native = native

    def gather_windows(
        self, x: Tensor, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair
    ) -> Tensor:
        _check(x, kernel, stride, dilation)
        tensor, _, pitch = place_channels_last(x)
        size = _windows(x.shape, kernel, stride, padding, dilation)
        windows = _image(x, (x.shape[0], kernel[0] * kernel[1] * x.shape[1], *size))
        geometry = (x.shape, kernel, stride, padding, dilation, DTYPES[x.dtype])
        self._native.gather_windows_cpu(*geometry, tensor.data_ptr(), pitch, windows.data_ptr())
        return windows

    def scatter_windows(
        self,
        windows: Tensor,
        size: Pair,
        kernel: Pair,
        stride: Pair,
        padding: Pair,
        dilation: Pair,
    ) -> Tensor:
        if windows.dtype == torch.float16:
            return EagerKernels.scatter_windows(windows, size, kernel, stride, padding, dilation)
        _check(windows, kernel, stride, dilation)
        windows = windows.contiguous(memory_format=torch.channels_last)
        channels, rest = divmod(windows.shape[1], kernel[0] * kernel[1])
        expected = _windows((0, 0, *size), kernel, stride, padding, dilation)
        if rest or tuple(windows.shape[2:]) != expected:
            raise ValueError(
                f"windows must be [N, {kernel[0] * kernel[1]} C, {expected[0]}, {expected[1]}], "
                f"got the shape {list(windows.shape)}"
            )
        image = _image(windows, (windows.shape[0], channels, *size))
        geometry = (image.shape, kernel, stride, padding, dilation, DTYPES[windows.dtype])
        self._native.scatter_windows_cpu(*geometry, windows.data_ptr(), image.data_ptr())
        return image


def _image(like: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.empty(
        shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )


def _windows(
    shape: Sequence[int], kernel: Pair, stride: Pair, padding: Pair, dilation: Pair
) -> tuple[int, int]:
    """How many windows there are below and beside each other.

    Raises:
        ValueError: the image is smaller than one.
    """
    sizes = zip(shape[2:], kernel, stride, padding, dilation, strict=True)
    rows, columns = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes)
    if rows < 1 or columns < 1:
        raise ValueError(
            f"images of {[*shape[2:]]} with a padding of {[*padding]} are smaller than a kernel of "
            f"{[*kernel]} with a dilation of {[*dilation]}"
        )
    return rows, columns


def _check(x: Tensor, kernel: Pair, stride: Pair, dilation: Pair) -> None:
    if x.ndim != 4 or x.dtype not in DTYPES:
        raise ValueError(f"images must be [N, C, H, W] of floats, got {x.dtype} {list(x.shape)}")
    if min(*kernel, *stride, *dilation) < 1:
        raise ValueError(
            f"kernel, stride and dilation must be positive, got {kernel}, {stride}, {dilation}"
        )


def _computable(x: Tensor) -> Tensor:
    """PyTorch folds half precision on some devices only."""
    return x.float() if x.itemsize == 2 and not x.is_cuda else x


def _register() -> None:
    native = native_module()
    cpu = CpuKernels(native) if native is not None else None
    geometry = "int[2] kernel, int[2] stride, int[2] padding, int[2] dilation"
    schemas = {
        "gather_windows": f"(Tensor x, {geometry}) -> Tensor",
        "scatter_windows": f"(Tensor windows, int[2] size, {geometry}) -> Tensor",
    }
    for name, schema in schemas.items():
        kernel = getattr(EagerKernels, name)
        register(name + schema, eager=kernel, fake=kernel, cpu=getattr(cpu, name, None))


_register()
