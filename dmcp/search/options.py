"""Options of a search."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dmcp.errors import ConfigError
from dmcp.train.optim import Schedule
from dmcp.train.parts import check_micro_batches
from dmcp.train.precision import Precision, check_precision


@dataclass(frozen=True)
class SearchOptions:
    """Everything about a search but the network, the budget and the number of steps.

    The defaults are meant for short runs on small data; the published values are in the paper's
    recipes, e.g. ``dmcp.recipes.get("resnet50-2.2G").search``.

    Attributes:
        warmup: share of the steps that only train weights (stage 1 alone).
        lr: learning rate of the weights (SGD, Nesterov).
        momentum, weight_decay: of the weights; no decay on biases and norms.
        label_smoothing: of the task loss of the widest and of the masked network.
        random_subnets: sub-networks of a sandwich step besides the widest and the narrowest.
        uniform_share: probability that a random sub-network of the *last* step is drawn uniformly
            instead of from the chains. It is 1 until the warm-up ends and falls geometrically with
            progress from there, whatever the batch size.
        distil: the other sub-networks learn the widest one's outputs instead of the labels.
        start: transition probability of every group at the start; the paper's α = 0 is 0.5, which
            lies near the narrowest network.
        anneal: share of the steps after the warm-up over which a bound falls, geometrically, from
            the expected cost at the start to the budget. From a wide start the masked network then
            computes something worth differentiating until the end; 0 is the paper's way.
        match_scale: the task loss of the masked network sees its logits at the scale of the widest
            network's. Retain probabilities in front of the classifier shrink the logits, which
            training a structure would undo; without this, as in the paper, they stay near 1.
        arch_optimizer: ``"adam"``, or ``"sgd"`` (Nesterov, momentum 0.9).
        arch_lr: learning rate of α over the steps after the warm-up.
        budget_loss, budget_weight, tolerance: see `BudgetLoss`.
        precision: of activations and their gradients, see `dmcp.train.precision.MixedPrecision`.
        micro_batches: parts in which a batch is computed, to save memory. Gradients are the means
            of those of the parts; batch norm and ``match_scale`` see each part alone.
        cuda_graphs: of a `dmcp.Search` on one GPU: the passes whose widths stay the same (widest,
            narrowest, architecture) are captured once and replayed, see
            `dmcp.train.cuda_graphs.CudaGraphs`. The model's Python, hooks and counters included,
            does not run in replays, so it must not do other things in other steps.
    """

    warmup: float = 0.5
    lr: Schedule = field(default_factory=lambda: Schedule(peak=0.05, final=0.005))
    momentum: float = 0.9
    weight_decay: float = 1e-4
    label_smoothing: float = 0.0
    random_subnets: int = 2
    uniform_share: float = 0.1
    distil: bool = True
    start: float = 0.98
    anneal: float = 0.7
    match_scale: bool = True
    arch_optimizer: Literal["adam", "sgd"] = "adam"
    arch_lr: Schedule = field(default_factory=lambda: Schedule(peak=0.05, final=0.01))
    budget_loss: str = "augmented_lagrangian"
    budget_weight: float = 10.0
    tolerance: float = 0.0
    precision: Precision = "float32"
    micro_batches: int = 1
    cuda_graphs: bool = False

    @property
    def sandwich(self) -> int:
        """Sub-networks of a sandwich step: the widest, the narrowest and the random ones."""
        return 2 + self.random_subnets

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"warmup must lie in [0, 1), got {self.warmup!r}")
        if self.random_subnets < 0:
            raise ConfigError(f"random_subnets must not be negative, got {self.random_subnets!r}")
        if not 0 < self.uniform_share <= 1:
            raise ConfigError(f"uniform_share must lie in (0, 1], got {self.uniform_share!r}")
        if not isinstance(self.start, float) or not 0 < self.start < 1:
            raise ConfigError(f"start must lie strictly between 0 and 1, got {self.start!r}")
        if not 0 <= self.anneal <= 1:
            raise ConfigError(f"anneal must lie in [0, 1], got {self.anneal!r}")
        if self.arch_optimizer not in ("adam", "sgd"):
            raise ConfigError(
                f"arch_optimizer must be 'adam' or 'sgd', got {self.arch_optimizer!r}"
            )
        if not isinstance(self.cuda_graphs, bool):
            raise ConfigError(f"cuda_graphs must be a bool, got {self.cuda_graphs!r}")
        check_precision(self.precision)
        check_micro_batches(self.micro_batches)
