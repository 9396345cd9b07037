"""Group norms over dependency groups (DepGraph: "Towards Any Structural Pruning", Fang et al., CVPR
2023), in one shot on the pretrained network.

Deviations from the paper: it trains with a sparsity term over the groups first, and prunes in
several steps; here the weights of plain training are ranked once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import chain
from typing import ClassVar

import torch
from torch import Tensor, nn

from dmcp.errors import ConfigError
from dmcp.graph import ChannelGraph, ChannelUnit
from dmcp.methods.growth import ranked
from dmcp.methods.importance import (
    consuming_weights,
    depthwise_weights,
    norm_scales,
    producing_weights,
)
from dmcp.methods.lab import Lab
from dmcp.methods.method import Pruned


@dataclass(frozen=True)
class GroupNorm:
    """One global ranking by the norms of everything that is pruned together.

    Attributes:
        p: the power of the weights in a norm.

    Raises:
        ConfigError: ``p`` is not positive.
    """

    p: float = 2
    uses_pretrained: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (math.isfinite(self.p) and self.p > 0):
            raise ConfigError(f"p must be a positive number, got {self.p!r}")

    def find(self, lab: Lab) -> dict[str, Pruned]:
        """See `Method`."""
        model = lab.pretrained()
        norms = group_norms(lab.graph, model, self.p)
        found = {}
        for label, targets in lab.targets.items():
            widths, kept = ranked(lab.graph, targets, norms)
            found[label] = Pruned(widths, lab.extract(model, kept=kept), kept)
        return found


def group_norms(graph: ChannelGraph, model: nn.Module, p: float = 2) -> dict[str, Tensor]:
    """Σ|w|^p of each step of each searchable unit: the mean over all tensors that it indexes (dense
    layers that produce or read it, depthwise layers, γ of norms), relative to the unit's mean.

    Args:
        graph: of the network.
        model: the network whose weights count.
        p: the power.

    Returns:
        Unit name -> float32 [C // step], on the CPU, mean 1.
    """
    return {unit.name: _unit_norms(graph, model, unit, p) for unit in graph.searchable}


def _unit_norms(graph: ChannelGraph, model: nn.Module, unit: ChannelUnit, p: float) -> Tensor:
    kinds = (producing_weights, consuming_weights, depthwise_weights, norm_scales)
    tensors = chain.from_iterable(weights(graph, model, unit) for weights in kinds)
    norms = torch.stack([rows.abs().pow(p).sum(1) for rows in tensors]).mean(0)
    return norms / norms.mean().clamp_min(torch.finfo(norms.dtype).tiny)
