"""Batch norm that follows a Markov chain, with the activation and the sum behind it."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dmcp.errors import TraceError
from dmcp.nn.axis import Axis, scale_channels, select
from dmcp.nn.chain import MarkovChain, PassState
from dmcp.nn.tensors import held
from dmcp.ops import Activation, ResidualPlace, norm_act, norm_act_reference
from dmcp.ops.norm_act_eager import stats_dtype
from dmcp.train.distributed import World

ACTIVATIONS: dict[type[nn.Module], Activation] = {
    nn.Identity: "identity",
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.Hardswish: "hardswish",
    nn.SiLU: "silu",
}
"""The activations that `dmcp.ops.norm_act` computes in the same pass, by their modules."""


class HandoverError(TraceError):
    """A norm and what stands in front of it or behind it are not next to each other in a pass as
    they were when the network was traced: other code is between them.

    Attributes:
        norm: the norm.
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__(
            f"{norm}: it was computed together with its convolution or activation, as the trace "
            "allows, but in this pass other code stands between them"
        )
        self.norm = norm


class Handover:
    """What one module has computed for the next one, until that is called: a weak reference.

    An object of its own, because attributes of modules take microseconds to set.
    """

    __slots__ = ("_given",)

    def __init__(self) -> None:
        self._given: weakref.ref[Tensor] | None = None

    def __reduce__(self) -> tuple[type[Handover], tuple[()]]:
        return Handover, ()  # a copy is of another pass

    def give(self, tensor: Tensor | None) -> None:
        """Whoever is called next gets this; None: nothing."""
        self._given = None if tensor is None else weakref.ref(tensor)

    def take(self) -> weakref.ref[Tensor] | None:
        """What was given since the last time, if anything was."""
        given, self._given = self._given, None
        return given


class NormPass(NamedTuple):
    """What a norm computes in one pass, from the state of its chain.

    Attributes:
        keep: the channels that take part, None for all.
        scale: their mask, None for 1.
        mean, var: their statistics: those to update if ``training``, else those to use.
        training: whether the statistics of the batch are used.
        momentum: weight of the batch in the running statistics.
    """

    keep: slice | Tensor | None
    scale: Tensor | None
    mean: Tensor | None
    var: Tensor | None
    training: bool
    momentum: float


class MarkovBatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` over the channels that its axis keeps, its activation, times the mask.

    One operator, `dmcp.ops.norm_act`, does all of it, so that the mask costs no pass over the
    activations. Batch norm would cancel a scale in front of it, which is why the mask sits here.
    While no mask is set and the axis is at full width this is ``nn.BatchNorm2d`` and the
    activation. Only such passes update the running statistics: those of a sub-network or a masked
    network are different numbers.

    Args:
        num_features … dtype: as ``nn.BatchNorm2d``.
        chain: what the channels follow.
        act: the activation, which the mask comes after.
        masks: whether this module applies the mask.

    Attributes:
        state: of the pass; a part of a sub-network or a masked network does not track statistics
            even if its own axis is whole.
        handed: by a convolution that leads this norm, see `MarkovConv2d.lead`.
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
        act: Activation = "identity",
        masks: bool = True,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self.act: Activation = act
        self.masks = masks
        self.state = PassState()
        self.handed = Handover()
        # In a tuple, so that it is not registered here as well.
        self._followers: tuple[FusedActivation | None] = (None,)
        self.sync_world: World | None = None
        # In a tuple, so that a shared chain is not registered as a submodule of each follower.
        self._axes: tuple[Axis | None] = (chain,)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, residual_place: ResidualPlace = "before"
    ) -> Tensor:
        """Normalise, activate and scale; a residual is added before the activation, as in a ResNet,
        to the scaled values, or after it.

        Args:
            x: [N, C or fewer, H, W].
            residual: of the shape of ``x``.
            residual_place: ``"before"`` or ``"after"`` the activation.

        Raises:
            HandoverError: the convolution that leads this norm has computed it, but something else
                comes in.
        """
        handed = self.handed.take()
        if handed is None:
            x = self.normalise(x, residual, residual_place)
        elif handed() is not x or residual is not None:
            raise HandoverError(self)
        (follower,) = self._followers
        if follower is not None:
            follower.handed.give(x)
        return x

    def normalise(
        self, x: Tensor, residual: Tensor | None, residual_place: ResidualPlace
    ) -> Tensor:
        """What `forward` computes where nothing in front of this module has."""
        self._check_input_dim(x)
        now = self.now()
        weight, bias = select(self.weight, 0, now.keep), select(self.bias, 0, now.keep)
        dtype = stats_dtype(x) if weight is None else weight.dtype
        options: dict[str, Any] = {
            "scale": None if now.scale is None else now.scale.to(dtype),
            "residual": residual,
            "residual_place": residual_place,
            "act": self.act,
            "running_mean": now.mean,
            "running_var": now.var,
            "training": now.training,
            "momentum": now.momentum,
            "eps": self.eps,
        }
        if self.is_synchronised:
            y = norm_act(x, weight, bias, synchronised=True, **options)
        else:
            # A network that is in half precision throughout is left to PyTorch's own kernels.
            compute = norm_act if dtype == stats_dtype(x) else norm_act_reference
            y = compute(x, weight, bias, **options)
        self.count(now)
        return y

    @property
    def is_synchronised(self) -> bool:
        """Whether several processes join their statistics."""
        return self.sync_world is not None and self.sync_world.size > 1

    def now(self) -> NormPass:
        """What a pass computes now."""
        axis = self._axes[0]
        keep = axis.keep() if axis is not None else None
        mask = axis.mask if axis is not None else None
        whole = keep is None and mask is None and self.state.tracks
        own_stats = self.track_running_stats if self.training and whole else not self.training
        mean = held(self, "running_mean") if own_stats else None
        var = held(self, "running_var") if own_stats else None
        return NormPass(
            keep,
            select(mask, 0, keep) if self.masks else None,
            select(mean, 0, keep),
            select(var, 0, keep),
            self.training or mean is None,
            self._momentum() if self.training and mean is not None else 0.0,
        )

    def count(self, now: NormPass) -> None:
        """Once for every pass, when it is done: count the batch if it has moved the running
        statistics."""
        tracked = held(self, "num_batches_tracked")
        if now.training and now.mean is not None and tracked is not None:
            tracked.add_(1)

    def _momentum(self) -> float:
        """Weight of this batch in the running statistics."""
        if self.momentum is not None:
            return self.momentum
        tracked = held(self, "num_batches_tracked")
        return 0.0 if tracked is None else 1.0 / (float(tracked) + 1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, act={self.act}"


class FusedActivation(nn.Module):
    """Stands for an activation that the norm in front of it computes, mask and all, and passes on
    what comes from there. Where that norm was not called it does both itself.

    Args:
        norm: the norm, whose ``act`` is this activation.
        module: the activation.

    Attributes:
        handed: by the norm.
    """

    def __init__(self, norm: MarkovBatchNorm2d, module: nn.Module) -> None:
        super().__init__()
        # In a tuple, so that neither is registered: the norm is elsewhere, the module is replaced.
        self._modules_behind = norm, module
        self.masks = False
        self.handed = Handover()
        norm._followers = (self,)

    def forward(self, x: Tensor) -> Tensor:
        """Raises HandoverError if something else comes in than what the norm has computed."""
        norm, module = self._modules_behind
        handed = self.handed.take()
        if handed is not None and handed() is x:
            return x
        if handed is not None:
            raise HandoverError(norm)
        y: Tensor = module(x)
        axis = norm._axes[0]
        if axis is None or not (self.masks or norm.masks):
            return y
        return scale_channels(y, axis.mask, axis.keep(), 1)

    def part(self) -> None:
        """Do the activation and the mask here from now on."""
        norm, _ = self._modules_behind
        self.masks, norm.masks = norm.masks, False
        norm.act, norm._followers = "identity", (None,)

    def extra_repr(self) -> str:
        return self._modules_behind[0].act
