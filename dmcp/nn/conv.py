"""A drop-in convolution whose output channels follow a Markov chain."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmcp.errors import ConfigError
from dmcp.nn.axis import Axis, scale_channels, select
from dmcp.nn.batchnorm import ACTIVATIONS, MarkovBatchNorm2d
from dmcp.nn.chain import MarkovChain
from dmcp.ops import ResidualPlace


class MarkovConv2d(nn.Conv2d):
    """``nn.Conv2d`` whose output channels are retained by a Markov chain.

    While the chain is at full width and its mask is off this is ``nn.Conv2d`` (followed by its norm
    and activation), bit for bit. A narrower chain makes it compute a prefix of its output channels;
    a narrower input makes it use the matching prefix of its input channels. With the mask on (see
    `masked`), channels are scaled by their retain probabilities: after the norm, and after the
    activation.

    Args:
        in_channels … dtype: as ``nn.Conv2d``.
        chain: ``"own"`` for a chain of its own, another module's chain to share its width (a
            depthwise convolution follows its producer, both ends of a residual sum share one), or
            None for a fixed number of output channels.
        chain_groups, divisor, min_width, start: of its own chain, see `MarkovChain`.
        norm: a batch norm to own; becomes a `MarkovBatchNorm2d` on the same weights.
        act: an activation to own. Behind a norm, one of `dmcp.nn.batchnorm.ACTIVATIONS` becomes
            part of it.

    Shape: [N, C_in or fewer, H, W] -> [N, ``chain.width``, H', W'].

    Raises:
        ConfigError: a shared chain or norm of another size; in a pass, a narrower width of a
            grouped convolution that is not depthwise, or of a depthwise one but not of its input.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        chain: MarkovChain | Literal["own"] | None = "own",
        chain_groups: int = 10,
        divisor: int = 8,
        min_width: int = 1,
        start: float = 0.9,
        norm: nn.BatchNorm2d | None = None,
        act: nn.Module | None = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )
        if chain == "own":
            self.chain: MarkovChain | None = MarkovChain(
                out_channels, chain_groups, divisor, min_width, start=start, device=device
            )
            chain = self.chain
        if chain is not None and chain.channels != out_channels:
            raise ConfigError(
                f"chain has {chain.channels} channels, out_channels is {out_channels}"
            )
        # In a tuple, so that a shared chain is not registered as a submodule of each follower.
        self._axes: tuple[Axis | None, Axis | None] = (None, chain)
        fused = ACTIVATIONS.get(type(act)) if norm is not None and act is not None else None
        self.act = None if fused is not None else act
        self.norm = None
        if norm is not None:
            self.norm = _follow(norm, chain, out_channels, masks=self.act is None)
            self.norm.act = fused or "identity"
        self.masks = self.norm is None or not self.norm.masks

    def forward(
        self, x: Tensor, residual: Tensor | None = None, residual_place: ResidualPlace = "before"
    ) -> Tensor:
        """Convolve; normalise and activate with the modules it owns.

        Args:
            x: [N, C_in or fewer, H, W].
            residual: for the norm it owns, see `MarkovBatchNorm2d`.
            residual_place: likewise.

        Raises:
            ConfigError: a residual, but no norm or an activation that is not part of it.
        """
        if residual is not None and (self.norm is None or self.act is not None):
            raise ConfigError("a residual needs a norm, with an activation that it computes")
        axis = self._axes[1]
        keep = axis.keep() if axis is not None else None
        y = self._convolve(x, keep)
        if self.norm is not None:
            y = self.norm(y, residual, residual_place)
        if self.act is not None:
            y = self.act(y)
        mask = axis.mask if axis is not None and self.masks else None
        return scale_channels(y, mask, keep, y.ndim - 3)

    def _convolve(self, x: Tensor, keep: slice | Tensor | None) -> Tensor:
        bias = select(self.bias, 0, keep)
        weight, groups = select(self.weight, 0, keep), self.groups
        if groups == 1:
            weight = self._select_inputs(weight, x)
        elif groups == self.in_channels:
            groups = x.shape[1]
            if weight.shape[0] * self.in_channels != self.out_channels * groups:
                raise ConfigError(
                    f"a depthwise convolution that gets {groups} channels cannot make "
                    f"{weight.shape[0]}: it must share the chain of what produces its input"
                )
        elif keep is not None or x.shape[1] != self.in_channels:
            raise ConfigError(f"a convolution with groups={groups} cannot be narrowed")
        if self.padding_mode == "zeros":
            return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, groups)
        padded = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
        return F.conv2d(padded, weight, bias, self.stride, 0, self.dilation, groups)

    def _select_inputs(self, weight: Tensor, x: Tensor) -> Tensor:
        axis = self._axes[0]
        if axis is not None:
            return select(weight, 1, axis.keep())
        return weight if x.shape[1] == self.in_channels else weight[:, : x.shape[1]]


def _follow(
    norm: nn.BatchNorm2d, chain: MarkovChain | None, channels: int, *, masks: bool
) -> MarkovBatchNorm2d:
    if norm.num_features != channels:
        raise ConfigError(f"norm has {norm.num_features} features, out_channels is {channels}")
    follower = MarkovBatchNorm2d(
        norm.num_features,
        norm.eps,
        norm.momentum,
        norm.affine,
        norm.track_running_stats,
        chain=chain,
        masks=masks,
    )
    share_tensors(norm, follower)
    return follower.train(norm.training)


def share_tensors(source: nn.Module, target: nn.Module) -> None:
    """Make ``target`` hold the very parameters and buffers of ``source``, by name."""
    for name, parameter in source.named_parameters(recurse=False):
        setattr(target, name, parameter)
    for name, buffer in source.named_buffers(recurse=False):
        setattr(target, name, buffer)
