"""Learning-rate schedule and the SGD of the paper's recipes."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dmcp.errors import ConfigError


@dataclass(frozen=True)
class Schedule:
    """A learning rate that warms up linearly and then follows half a cosine.

    At progress t in [0, 1], with w the warm-up::

        t < w:  start + (peak - start) t / w
        t >= w: final + (peak - final) (1 + cos(pi (t - w) / (1 - w))) / 2

    Attributes:
        peak: the learning rate after the warm-up; positive.
        start: the learning rate at progress 0; ``None`` is ``peak``.
        warmup: fraction of the run spent warming up, in [0, 1).
        final: the learning rate at progress 1.

    Raises:
        ConfigError: one of the numbers is out of range.
    """

    peak: float
    start: float | None = None
    warmup: float = 0.0
    final: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.peak) and self.peak > 0):
            raise ConfigError(f"peak must be a positive number, got {self.peak}")
        for name, rate in (("start", self.start), ("final", self.final)):
            if rate is not None and not (math.isfinite(rate) and rate >= 0):
                raise ConfigError(f"{name} must be a number >= 0, got {rate}")
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"warmup must be a fraction in [0, 1), got {self.warmup}")

    def at(self, progress: float) -> float:
        """The learning rate at ``progress``: 0 before the first step, 1 at the end.

        Raises:
            ConfigError: ``progress`` is outside [0, 1].
        """
        if not 0 <= progress <= 1:
            raise ConfigError(f"progress must be in [0, 1], got {progress}")
        if progress < self.warmup:
            start = self.peak if self.start is None else self.start
            return start + (self.peak - start) * progress / self.warmup
        turn = math.pi * (progress - self.warmup) / (1 - self.warmup)
        return self.final + (self.peak - self.final) * (1 + math.cos(turn)) / 2


def sgd(
    model: nn.Module,
    schedule: Schedule,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    nesterov: bool = True,
) -> torch.optim.SGD:
    """SGD over the parameters of ``model`` that require gradients.

    Weight decay applies to parameters of more than one axis: neither to biases nor to the affine
    of a normalisation. The learning rate starts at ``schedule.at(0)``. Without momentum there is
    nothing for Nesterov's rule to change, and plain SGD is returned.

    Raises:
        ConfigError: ``momentum`` or ``weight_decay`` is out of range, or nothing is trainable.
    """
    if not 0 <= momentum < 1:
        raise ConfigError(f"momentum must be in [0, 1), got {momentum}")
    if not (math.isfinite(weight_decay) and weight_decay >= 0):
        raise ConfigError(f"weight_decay must be a number >= 0, got {weight_decay}")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ConfigError("model has no parameter that requires a gradient")
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(
        groups, lr=schedule.at(0), momentum=momentum, nesterov=nesterov and momentum > 0, fused=True
    )


def restore(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load the state of an optimiser, whose own tensors stay as they are.

    The fused optimisers of the CPU walk over memory: a momentum that lies in another memory format
    than its parameter would be added to the wrong weights.
    """
    # A copy, because an optimiser would keep and update the tensors it is given.
    optimizer.load_state_dict(copy.deepcopy(dict(state)))
    for parameter, kept in optimizer.state.items():
        for name, tensor in kept.items():
            same = not isinstance(tensor, Tensor) or tensor.stride() == parameter.stride()
            if not same and tensor.shape == parameter.shape:
                kept[name] = torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor).detach()


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
