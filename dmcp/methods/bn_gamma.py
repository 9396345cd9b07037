"""Network slimming ("Learning Efficient Convolutional Networks through Network Slimming", Liu et
al., ICCV 2017): sparse scales of batch norms, ranked globally.

Deviations from the paper: a residual stream is pruned too, by the mean |γ| of its norms (the paper
puts a selection layer in front of each branch); γ has no weight decay, as in every training here; a
unit keeps at least the narrowest width of its grid; the threshold is the one that meets the budget.
A unit without norms takes the share of `Uniform`, by the L1 norms of its filters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dmcp.errors import ConfigError
from dmcp.graph import ChannelGraph
from dmcp.methods.growth import held, ranked
from dmcp.methods.importance import l1_norms, norm_scales
from dmcp.methods.lab import Lab
from dmcp.methods.method import Pruned
from dmcp.methods.uniform import uniform_widths
from dmcp.train import Training, TrainOptions


@dataclass(frozen=True)
class BNGamma:
    """One training with an L1 penalty on γ; for every budget, the channels with the largest |γ|.

    Attributes:
        sparsity: the weight of the penalty. The paper's is for its own, long runs; None suits a run
            of any length: it is one and a half times what would take γ from its start to 0, were
            there no other loss.

    Raises:
        ConfigError: ``sparsity`` is not positive.
    """

    sparsity: float | None = None
    uses_pretrained: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.sparsity is not None and not (math.isfinite(self.sparsity) and self.sparsity > 0):
            raise ConfigError(f"sparsity must be a positive number or None, got {self.sparsity!r}")

    def find(self, lab: Lab) -> dict[str, Pruned]:
        """See `Method`."""
        model, options = lab.fresh(), lab.recipe.retrain
        steps = lab.steps(lab.recipe.search_epochs)
        sparsity = self.sparsity or default_sparsity(options, steps)
        stage = SparsityTraining(model, options, steps, lab.graph, sparsity)
        lab.train(stage, "sparsity-training")
        scales = mean_scales(lab.graph, model)
        scores = {**l1_norms(lab.graph, model), **scales}
        found = {}
        for label, targets in lab.targets.items():
            even = uniform_widths(lab.graph, targets)
            unranked = {name: width for name, width in even.items() if name not in scales}
            widths, kept = ranked(held(lab.graph, unranked), targets, scores)
            found[label] = Pruned(widths, lab.extract(model, kept=kept), kept)
        return found


PAPER = BNGamma(sparsity=1e-5)
"""As the paper trains ResNets, for 160 epochs; its VGG networks have 1e-4."""


def default_sparsity(options: TrainOptions, steps: int) -> float:
    """The penalty that alone would take γ by 1.5 down in a run, from a start at 1."""
    rates = sum(options.lr.at(step / steps) for step in range(steps))
    return 1.5 * (1 - options.momentum) / rates if rates else 0.0


class SparsityTraining(Training):
    """A training whose loss has ``sparsity`` Σ|γ| added, over all norms of the network.

    Args:
        model, options, steps: see `Training`.
        graph: of the network.
        sparsity: the weight of the penalty.
    """

    def __init__(
        self,
        model: nn.Module,
        options: TrainOptions,
        steps: int,
        graph: ChannelGraph,
        sparsity: float,
    ) -> None:
        super().__init__(model, options, steps)
        self._scales = _scales(graph, model)
        self._sparsity = sparsity
        self.optimizer.register_step_pre_hook(self._add_penalty)

    def _add_penalty(self, optimizer: Optimizer, *_: object) -> None:
        # Of float16 training, the gradients are still scaled here.
        scale = getattr(optimizer, "grad_scale", None)
        weight = self._sparsity if scale is None else self._sparsity * scale
        for parameter in self._scales:
            if parameter.grad is not None:
                parameter.grad += weight * parameter.detach().sign()


def _scales(graph: ChannelGraph, model: nn.Module) -> Sequence[nn.Parameter]:
    norms = (model.get_submodule(n) for n, axes in graph.modules.items() if axes.kind == "norm")
    weights = (getattr(norm, "weight", None) for norm in norms)
    return [weight for weight in weights if isinstance(weight, nn.Parameter)]


def mean_scales(graph: ChannelGraph, model: nn.Module) -> dict[str, Tensor]:
    """Mean |γ| of each step of each unit that has norms.

    Args:
        graph: of the network.
        model: the network whose γ count.

    Returns:
        Unit name -> float32 [C // step], on the CPU.
    """
    found = {}
    for unit in graph.units:
        norms = [rows.abs().mean(1) for rows in norm_scales(graph, model, unit)]
        if norms:
            found[unit.name] = torch.stack(norms).mean(0)
    return found
