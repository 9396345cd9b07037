"""A drop-in convolution whose output channels follow a Markov chain."""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmcp.backends import accelerated
from dmcp.errors import ConfigError
from dmcp.nn.axis import Axis, cut, length, may_accumulate, prefix_lengths, scale_channels
from dmcp.nn.batchnorm import ACTIVATIONS, MarkovBatchNorm2d
from dmcp.nn.chain import MarkovChain, PassState
from dmcp.nn.tensors import held
from dmcp.ops import ResidualPlace
from dmcp.ops.autocast import in_autocast
from dmcp.ops.conv_norm_act import Norm, conv_norm_act
from dmcp.ops.convolution import Convolution
from dmcp.ops.norm_act import Options, check_residual_place


class MarkovConv2d(nn.Conv2d):
    """``nn.Conv2d`` whose output channels are retained by a Markov chain.

    While the chain is at full width and its mask is off this is ``nn.Conv2d`` (followed by its norm
    and activation): bit for bit with the eager ops, to rounding with the kernels. A narrower chain
    makes it compute a prefix of its output channels; a narrower input makes it use the matching
    prefix of its input channels. With the mask on (see `masked`), channels are scaled by their
    retain probabilities: after the norm, and after the activation.

    Args:
        in_channels … dtype: as ``nn.Conv2d``.
        chain: ``"own"`` for a chain of its own, another module's chain to share its width (a
            depthwise convolution follows its producer, both ends of a residual sum share one), or
            None for a fixed number of output channels.
        chain_groups, divisor, min_width, start: of its own chain, see `MarkovChain`.
        norm: a batch norm to own; becomes a `MarkovBatchNorm2d` on the same weights.
        act: an activation to own. Behind a norm, one of `dmcp.nn.batchnorm.ACTIVATIONS` becomes
            part of it.

    Attributes:
        state: of the pass, e.g. whether gradients accumulate; see `MarkovNet.accumulating`.

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
        # In a tuple, as it may be registered elsewhere: see `lead`.
        self._norms: tuple[MarkovBatchNorm2d | None] = (None,)
        if norm is not None:
            self.norm = _follow(norm, chain, out_channels, masks=self.act is None)
            self.norm.act = fused or "identity"
            self._norms = (self.norm,)
        self.masks = self.norm is None or not self.norm.masks
        self.state = PassState()

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
        (norm,) = self._norms
        if residual is not None and (norm is None or self.act is not None):
            raise ConfigError("a residual needs a norm, with an activation that it computes")
        y = None if norm is None else self._with_norm(x, norm, residual, residual_place)
        if y is None:
            y = self._convolve(x)
            if self.norm is not None:
                y = self.norm.normalise(y, residual, residual_place)
        if self.act is not None:
            y = self.act(y)
        axis = self._axes[1]
        if axis is None or not self.masks:
            return y
        return scale_channels(y, axis.mask, axis.keep(), y.ndim - 3)

    def lead(self, norm: MarkovBatchNorm2d | None) -> None:
        """In training, compute also what a norm that is registered elsewhere computes, which then
        passes its input on; None: no longer. The norm follows the same chain and reads this
        module's output, which nothing else reads."""
        self._norms = (norm,)

    def _with_norm(
        self,
        x: Tensor,
        norm: MarkovBatchNorm2d,
        residual: Tensor | None,
        residual_place: ResidualPlace,
    ) -> Tensor | None:
        """The convolution and a norm by one operator; None where there is none for this pass."""
        if not accelerated() or not norm.training or norm.is_synchronised:
            return None
        leads = norm is not self.norm
        if leads and (self._forward_hooks or norm._forward_hooks or norm._forward_pre_hooks):
            return None  # somebody looks at what is in between
        # Before any parameter is touched: getting at one may compute it.
        conv = self._geometry() if _suits(x) else None
        if conv is None:
            return None
        weight, gain, bias = held(self, "weight"), held(norm, "weight"), held(norm, "bias")
        assert weight is not None
        now = norm.now()
        inputs, widths = self._inputs(x, now.keep), None
        if self.state.accumulates and may_accumulate(weight, gain, bias):
            widths = prefix_lengths(weight, (now.keep, inputs))
        if widths is None:
            weight, gain = cut(weight, now.keep, inputs), cut(gain, now.keep)
            bias = cut(bias, now.keep)
        check_residual_place(residual_place)
        before = residual is not None and residual_place == "before"
        options = Options(now.momentum, norm.eps, norm.act, before)
        scale = None if now.scale is None else now.scale.to(weight.dtype)
        tensors = Norm(gain, bias, scale, residual, now.mean, now.var)
        y = conv_norm_act(x, weight, tensors, conv, options, widths)
        if y is None:
            return None
        norm.count(now)
        if leads:
            norm.handed.give(y)
        return y

    def _geometry(self) -> Convolution | None:
        """What `conv_norm_act` is told of the convolution; None if it takes no such one."""
        if held(self, "bias") is not None or self.padding_mode != "zeros":
            return None
        shape = (self.kernel_size, self.stride, self.padding, self.dilation)
        return _convolution(self.in_channels, self.out_channels, self.groups, *shape)

    def _convolve(self, x: Tensor) -> Tensor:
        axis = self._axes[1]
        keep = axis.keep() if axis is not None else None
        inputs = self._inputs(x, keep)
        weight = cut(self.weight, keep, inputs, accumulates=self.state.accumulates)
        bias = cut(self.bias, keep, accumulates=self.state.accumulates)
        groups = x.shape[-3] if self.groups == self.in_channels else self.groups
        if self.padding_mode == "zeros":
            return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, groups)
        padded = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
        return F.conv2d(padded, weight, bias, self.stride, 0, self.dilation, groups)

    def _inputs(self, x: Tensor, outputs: slice | Tensor | None) -> slice | Tensor | None:
        """What is kept of the weight's inputs, for the channels of x.

        Raises:
            ConfigError: the kept outputs cannot be made from these channels.
        """
        channels = x.shape[-3]
        if self.groups == 1:
            axis = self._axes[0]
            if axis is not None:
                return axis.keep()
            return None if channels == self.in_channels else slice(0, channels)
        if self.groups == self.in_channels:
            kept = self.out_channels if outputs is None else length(outputs)
            if kept * self.in_channels != self.out_channels * channels:
                raise ConfigError(
                    f"a depthwise convolution that gets {channels} channels cannot make {kept}: it "
                    "must share the chain of what produces its input"
                )
        elif outputs is not None or channels != self.in_channels:
            raise ConfigError(f"a convolution with groups={self.groups} cannot be narrowed")
        return None


def _suits(x: Tensor) -> bool:
    """Whether x is laid out for `conv_norm_act`, in a dtype that it takes with such parameters."""
    # One channel is channels last in every layout: which one is meant, it does not say.
    if x.ndim != 4 or x.shape[1] == 1 or not x.numel():
        return False
    if not x.is_contiguous(memory_format=torch.channels_last):
        return False
    if x.dtype in (torch.float32, torch.float64):
        return True
    return x.is_floating_point() and in_autocast(x)


@cache
def _convolution(
    inputs: int,
    outputs: int,
    groups: int,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...] | str,
    dilation: tuple[int, ...],
) -> Convolution | None:
    """What `conv_norm_act` is told of a convolution; None if it takes no such one."""
    depthwise = groups == inputs == outputs
    if isinstance(padding, str) or (groups != 1 and not depthwise):
        return None
    if min(stride) < 1 or min(dilation) < 1 or min(padding) < 0:
        return None  # PyTorch says what is wrong
    return Convolution(inputs, kernel, stride, padding, dilation, depthwise)  # type: ignore[arg-type]


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
