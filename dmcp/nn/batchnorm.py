"""Batch norm that follows a Markov chain."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dmcp.nn.axis import Axis, scale_channels, select
from dmcp.nn.chain import MarkovChain
from dmcp.train.distributed import World, synchronised_batch_norm, synchronised_forward

_ALONE = World.single()


class MarkovBatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` over the channels that its axis keeps, times the axis's mask.

    The mask is folded into weight and bias, so it costs no pass over the activations; batch norm
    would cancel a scale in front of it, which is why the mask sits here. While no mask is set and
    the axis is at full width this is ``nn.BatchNorm2d``, bit for bit. Only such passes update the
    running statistics: those of a sub-network or a masked network are different numbers.

    Args:
        num_features … dtype: as ``nn.BatchNorm2d``.
        chain: what the channels follow.
        masks: whether this module applies the mask.

    Attributes:
        tracks: False while this is a part of a sub-network or a masked network although its own
            axis is whole.
        sync_world: the processes whose batch statistics are joined in training, None for this one's
            alone; `dmcp.train.synchronise_batch_norm` sets it.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        chain: MarkovChain | Axis | None = None,
        masks: bool = True,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self.masks = masks
        self.tracks = True
        self.sync_world: World | None = None
        # In a tuple, so that a shared chain is not registered as a submodule of each follower.
        self._axes: tuple[Axis | None] = (chain,)

    def forward(self, x: Tensor) -> Tensor:
        axis = self._axes[0]
        keep = axis.keep() if axis is not None else None
        mask = axis.mask if axis is not None else None
        if keep is None and mask is None and self.tracks:
            if self.sync_world is not None:
                return synchronised_forward(self, x, self.sync_world)
            return super().forward(x)
        mean = None if self.training else self.running_mean
        var = None if self.training else self.running_var
        mask = mask if self.masks else None
        y = synchronised_batch_norm(
            x,
            *self._affine(keep, mask),
            None if mean is None else select(mean, 0, keep),
            None if var is None else select(var, 0, keep),
            training=mean is None,
            momentum=0.0,
            eps=self.eps,
            world=self.sync_world or _ALONE,
        )
        return y if self.affine else scale_channels(y, mask, keep, 1)

    def _affine(
        self, keep: slice | Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        if not self.affine:
            return None, None
        weight: Tensor = self.weight
        bias: Tensor = self.bias
        if mask is not None:
            weight, bias = weight * mask, bias * mask
        return select(weight, 0, keep), select(bias, 0, keep)
