"""How activations lie in memory, as the kernels see them.

A kernel walks over [batch, channels, pixels] in one of two orders: channels last (the channels of a
pixel are neighbours) or channels first (the pixels of a channel are). One number, the pitch, says
how far apart the neighbours along the other axes are; it may be larger than needed, so that the
channels can be a prefix of a wider buffer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Placed(NamedTuple):
    """A tensor [N, C, ...] whose strides a kernel can follow.

    Attributes:
        tensor: the tensor.
        channels_last: whether the channels of a pixel are neighbours.
        pitch: elements from one pixel to the next (channels last) or from one sample to the next.
    """

    tensor: Tensor
    channels_last: bool
    pitch: int


def place(x: Tensor) -> Placed:
    """``x`` with its layout; a dense copy where it has none of the two."""
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return Placed(x, True, x.shape[1])
    if x.ndim > 2 and x.is_contiguous():
        return Placed(x, False, math.prod(x.shape[1:]))
    for channels_last in (True, False):
        pitch = _pitch(x, channels_last)
        if pitch is not None:
            return Placed(x, channels_last, pitch)
    return Placed(x.contiguous(), False, math.prod(x.shape[1:]))


def place_like(x: Tensor, other: Placed) -> Placed:
    """``x`` in the order of another tensor; a dense copy where it is not in that order."""
    if x.stride() == other.tensor.stride():
        return Placed(x, other.channels_last, other.pitch)
    pitch = _pitch(x, other.channels_last)
    if pitch is not None:
        return Placed(x, other.channels_last, pitch)
    if other.channels_last:
        return _dense_last(x)
    return Placed(x.contiguous(), False, math.prod(x.shape[1:]))


def place_channels_last(x: Tensor) -> Placed:
    """``x`` with its channels last; a dense copy where they are not."""
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return Placed(x, True, x.shape[1])
    pitch = _pitch(x, True)
    return _dense_last(x) if pitch is None else Placed(x, True, pitch)


def empty_like(other: Placed) -> Placed:
    """An uninitialised tensor of the same shape, dtype and strides."""
    x, channels_last, pitch = other
    if pitch == (x.shape[1] if channels_last else math.prod(x.shape[1:])):
        return Placed(torch.empty_like(x), channels_last, pitch)  # dense: keeps its strides
    return Placed(x.new_empty_strided(x.shape, x.stride()), channels_last, pitch)


def gradient_of(leaf: Tensor) -> Tensor:
    """The ``.grad`` that a backward adds to.

    Raises:
        RuntimeError: it was there in the forward pass and is gone.
    """
    if leaf.grad is None:
        raise RuntimeError(
            "the .grad that gradients were to be added to was set to None after the forward pass; "
            "clear gradients before it"
        )
    return leaf.grad


def prefix(tensor: Tensor, lengths: Sequence[int]) -> Tensor:
    """A view of the first part of the first dimensions; ``tensor`` itself where that is all."""
    shape = (*lengths, *tensor.shape[len(lengths) :])
    if shape == tensor.shape:
        return tensor
    return tensor.as_strided(shape, tensor.stride())


def _dense_last(x: Tensor) -> Placed:
    return Placed(x.movedim(1, -1).contiguous().movedim(-1, 1), True, x.shape[1])


def _pitch(x: Tensor, channels_last: bool) -> int | None:
    """The pitch of ``x`` in that order, None where its strides do not allow it."""
    if channels_last:
        fits, inner = x.shape[1] == 1 or x.stride(1) == 1, x.shape[1]
        outer: tuple[int, ...] = (*range(x.ndim - 1, 1, -1), 0)
    else:
        fits, inner = _collapsed(x, range(x.ndim - 1, 0, -1), 1) == 1, math.prod(x.shape[1:])
        outer = (0,)
    pitch = _collapsed(x, outer, inner) if fits else None
    return pitch if pitch is not None and pitch >= inner else None


def _collapsed(x: Tensor, dims: tuple[int, ...] | range, otherwise: int) -> int | None:
    """The stride of several dimensions walked as one, innermost first; None if they cannot be."""
    stride = following = None
    for dim in dims:
        if x.shape[dim] == 1:
            continue
        if stride is None:
            stride = x.stride(dim)
        elif x.stride(dim) != following:
            return None
        following = x.stride(dim) * x.shape[dim]
    return otherwise if stride is None else stride
