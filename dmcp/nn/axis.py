"""What a module axis follows: one chain, or several chains spread over its positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, overload

import torch
from torch import Tensor

from dmcp.nn.chain import MarkovChain


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
        if all(chain.width == chain.channels for chain, _, _ in self.parts):
            return None
        stays = torch.ones(self.size, dtype=torch.bool)
        for chain, positions, index in self.parts:
            stays[positions] = index < chain.width
        kept = stays.nonzero().flatten()
        is_prefix = len(kept) == 0 or int(kept[-1]) == len(kept) - 1
        return slice(0, len(kept)) if is_prefix else kept


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


def scale_channels(x: Tensor, mask: Tensor | None, keep: slice | Tensor | None, dim: int) -> Tensor:
    """Multiply ``x`` by the mask of the channels it holds along ``dim``."""
    if mask is None:
        return x
    shape = [1] * x.ndim
    shape[dim] = -1
    return x * select(mask, 0, keep).to(x.dtype).view(shape)
