"""What a module axis follows: one chain, or several chains spread over its positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dmcp.nn.chain import MarkovChain
from dmcp.ops.layout import gradient_of, prefix


class Axis(Protocol):
    """What a module asks about one of its channel axes; `MarkovChain` is one."""

    @property
    def mask(self) -> Tensor | None:
        """Scale of each channel [size], None while the mask is off."""

    def keep(self) -> slice | Tensor | None:
        """The channels to compute now, None for all."""


class ComposedAxis:
    """An axis whose positions belong to several chains, or several of them to one channel.

    Args:
        size: number of positions.
        parts: (chain, LongTensor positions, LongTensor index): position i of the axis carries
            channel index[i] of the chain. Positions in no part are always kept, with scale 1.
    """

    def __init__(self, size: int, parts: Sequence[tuple[MarkovChain, Tensor, Tensor]]) -> None:
        self.size = size
        self.parts = tuple(parts)

    @property
    def mask(self) -> Tensor | None:
        masks = [(chain.mask, positions, index) for chain, positions, index in self.parts]
        first = next((mask for mask, _, _ in masks if mask is not None), None)
        if first is None:
            return None
        scale = first.new_ones(self.size)
        for mask, positions, index in masks:
            if mask is not None:
                scale = scale.index_copy(0, positions.to(mask.device), mask[index.to(mask.device)])
        return scale

    def keep(self) -> slice | Tensor | None:
        keeps = [chain.keep() for chain, _, _ in self.parts]
        if all(keep is None for keep in keeps):
            return None
        stays = torch.ones(self.size, dtype=torch.bool, device="cpu")
        for (_, positions, index), keep in zip(self.parts, keeps, strict=True):
            if keep is not None:
                stays[positions] = _is_kept(index, keep)
        kept = stays.nonzero().flatten()
        is_prefix = len(kept) == 0 or int(kept[-1]) == len(kept) - 1
        return slice(0, len(kept)) if is_prefix else kept


def _is_kept(index: Tensor, keep: slice | Tensor) -> Tensor:
    return index < keep.stop if isinstance(keep, slice) else torch.isin(index, keep)


@overload
def select(tensor: Tensor, dim: int, keep: slice | Tensor | None) -> Tensor: ...
@overload
def select(tensor: None, dim: int, keep: slice | Tensor | None) -> None: ...
def select(tensor: Tensor | None, dim: int, keep: slice | Tensor | None) -> Tensor | None:
    """The part of ``tensor`` that an axis keeps along ``dim``; a view where it is a prefix."""
    if tensor is None or keep is None:
        return tensor
    if isinstance(keep, slice):
        return tensor.narrow(dim, 0, keep.stop)
    return tensor.index_select(dim, keep.to(tensor.device))


def length(keep: slice | Tensor) -> int:
    """How many positions are kept."""
    return int(keep.stop) if isinstance(keep, slice) else len(keep)


@overload
def cut(parameter: Tensor, *keeps: slice | Tensor | None, accumulates: bool = ...) -> Tensor: ...
@overload
def cut(parameter: None, *keeps: slice | Tensor | None, accumulates: bool = ...) -> None: ...
def cut(
    parameter: Tensor | None, *keeps: slice | Tensor | None, accumulates: bool = False
) -> Tensor | None:
    """The part of a parameter that the axes of its first dimensions keep.

    Args:
        parameter: a leaf, or None.
        keeps: for each of the first dimensions.
        accumulates: the backward adds the gradient of a prefix to ``parameter.grad``, if there is
            one, and autograd does not see it. Else autograd fills a tensor of the full size.
    """
    if parameter is None or all(keep is None for keep in keeps):
        return parameter
    if accumulates and parameter.requires_grad and parameter.grad is not None:
        lengths = prefix_lengths(parameter, keeps)
        if lengths is not None:
            return _Prefix.apply(parameter, lengths)
    part = parameter
    for dim, keep in enumerate(keeps):
        part = select(part, dim, keep)
    return part


def may_accumulate(*parameters: Tensor | None) -> bool:
    """Whether those that want a gradient are leaves with a ``.grad`` that it can be added to."""
    for parameter in parameters:
        if parameter is None or not parameter.requires_grad:
            continue
        if not parameter.is_leaf or parameter.grad is None:
            return False
    return True


def prefix_lengths(
    tensor: Tensor, keeps: Sequence[slice | Tensor | None]
) -> tuple[int, ...] | None:
    """How much of the first dimensions is kept; None if that is not a prefix of each, or is more
    than there is."""
    lengths = list(tensor.shape[: len(keeps)])
    for dim, keep in enumerate(keeps[: len(lengths)]):
        if keep is None:
            continue
        if not isinstance(keep, slice) or keep.stop > lengths[dim]:
            return None
        lengths[dim] = keep.stop
    return tuple(lengths)


class _Prefix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: Tensor, lengths: tuple[int, ...]) -> Tensor:
        ctx.parameter, ctx.lengths = parameter, lengths
        return prefix(parameter, lengths)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        prefix(gradient_of(ctx.parameter), ctx.lengths).add_(gradient)
        return None, None


def scale_channels(x: Tensor, mask: Tensor | None, keep: slice | Tensor | None, dim: int) -> Tensor:
    """Multiply ``x`` by the mask of the channels it holds along ``dim``."""
    if mask is None:
        return x
    shape = [1] * x.ndim
    shape[dim] = -1
    return x * select(mask, 0, keep).to(x.dtype).view(shape)
