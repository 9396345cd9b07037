"""Training that zeroes whole filters after every epoch: what FPGM and SFP share.

Deviations from both papers, so that a plain smaller network comes out: they prune every convolution
by itself, the last ones of residual blocks included, and carry the whole stream along. Here the
units that one dense layer produces are pruned, all by the same share, the one that meets the
budget; the units that several layers produce, residual streams, stay whole. Where that cannot meet
the budget they are pruned by the same share too, a filter of theirs being those of all layers that
produce it, side by side.

Batch norms stay as they are, as in the papers: a zeroed filter leaves a norm with the constant
β − γμ/σ, on which the layers behind have been trained. Extraction drops it with the channel, so the
network has to be calibrated, and should be trained on, before it is judged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from dmcp.errors import CheckpointError, ConfigError
from dmcp.graph import ChannelGraph, ChannelUnit
from dmcp.methods.growth import held, kept_channels
from dmcp.methods.importance import filter_places, producers, unit_filters
from dmcp.methods.lab import Lab
from dmcp.methods.method import Pruned
from dmcp.methods.uniform import even_widths
from dmcp.search import Targets
from dmcp.train import Schedule, Training, TrainOptions


@dataclass(frozen=True)
class FilterPruning:
    """A method that zeroes filters by a score while it trains, once for every budget.

    Attributes:
        start: ``"pretrained"``, at a tenth of the recipe's learning rate; ``"scratch"``.
        hard: whether a zeroed filter stays zero until the end of the epoch.

    Raises:
        ConfigError: an option is out of range.
    """

    start: Literal["pretrained", "scratch"] = "pretrained"
    hard: ClassVar[bool]

    def __post_init__(self) -> None:
        if self.start not in ("pretrained", "scratch"):
            raise ConfigError(f"start must be 'pretrained' or 'scratch', got {self.start!r}")

    @property
    def uses_pretrained(self) -> bool:
        """Whether filters are zeroed in the pretrained network."""
        return self.start == "pretrained"

    def score(self, filters: Tensor) -> Tensor:
        """What filters are worth: [n, weights] -> [n]. The smallest scores are zeroed."""
        raise NotImplementedError

    def find(self, lab: Lab) -> dict[str, Pruned]:
        """See `Method`."""
        return {label: self._prune(lab, label) for label in lab.budgets}

    def _prune(self, lab: Lab, label: str) -> Pruned:
        widths = filter_widths(lab.graph, lab.targets[label])
        model, options = lab.fresh(), lab.recipe.retrain
        if self.uses_pretrained:
            model, options = lab.pretrained(), replace(options, lr=fine_tuning(options.lr))
        stage = FilterTraining(
            model,
            options,
            lab.steps(lab.recipe.search_epochs),
            lab.graph,
            widths,
            self.score,
            every=lab.steps(1),
            hard=self.hard,
        )
        lab.train(stage, "filter-pruning", budget=label)
        return Pruned(widths, lab.extract(model, kept=stage.kept), stage.kept)


def fine_tuning(lr: Schedule) -> Schedule:
    """The schedule for pretrained weights: a tenth of that from scratch."""
    start = None if lr.start is None else lr.start / 10
    return replace(lr, peak=lr.peak / 10, start=start, final=lr.final / 10)


def filter_widths(graph: ChannelGraph, targets: Targets) -> dict[str, int]:
    """The same share of every unit that one dense layer produces, but for one group, all others
    whole; of every unit, where that cannot meet the budget.

    Raises:
        BudgetError: every unit at its smallest choice is too much already.
    """
    streams = {u.name: u.channels for u in graph.searchable if len(producers(graph, u)) != 1}
    inner = held(graph, streams)
    narrowest = torch.tensor([[unit.choices[0] for unit in inner.units]], device="cpu")
    if bool(targets.met(narrowest)):
        graph = inner
    return even_widths(graph, targets)


class FilterTraining(Training):
    """A training that zeroes filters after every epoch: weights and biases of the dense layers that
    produce a unit.

    Args:
        model, options, steps: see `Training`.
        graph: of the network.
        widths: unit name -> channels that are not zeroed.
        score: of filters, see `FilterPruning.score`; they are chosen anew every time.
        every: steps of an epoch, which divide ``steps``.
        hard: filters are zeroed before the first step too, and stay zero until the next choice:
            their gradients and momenta are zeroed as well. Otherwise they regrow.

    Attributes:
        kept: unit name -> the channels that were not zeroed last, int64 [width]; empty before the
            first time.
    """

    def __init__(
        self,
        model: nn.Module,
        options: TrainOptions,
        steps: int,
        graph: ChannelGraph,
        widths: Mapping[str, int],
        score: Callable[[Tensor], Tensor],
        *,
        every: int,
        hard: bool,
    ) -> None:
        super().__init__(model, options, steps)
        self._graph = graph
        self._widths = widths
        self._score = score
        self._every = every
        self._hard = hard
        self._keep({})
        if hard:
            self.optimizer.register_step_pre_hook(self._zero_gradients)
            self._zero_filters()

    def step(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """As `Training.step`; filters are zeroed at the end of an epoch."""
        metrics = super().step(images, labels)
        if self.step_index % self._every == 0:
            self._zero_filters()
        return metrics

    @torch.no_grad()
    def _zero_filters(self) -> None:
        filters = {u.name: unit_filters(self._graph, self.model, u) for u in self._graph.searchable}
        scores = {name: self._score(rows) for name, rows in filters.items()}
        self._keep(kept_channels(self._graph, scores, self._widths))
        for parameter, dim, positions in self._zeroed:
            parameter.index_fill_(dim, positions, 0)
            momentum = self.optimizer.state.get(parameter, {}).get("momentum_buffer")
            if self._hard and momentum is not None:
                momentum.index_fill_(dim, positions, 0)

    def _keep(self, kept: Mapping[str, Tensor]) -> None:
        self.kept = dict(kept)
        self._zeroed = [
            place
            for unit in self._graph.searchable
            if unit.name in kept
            for place in filter_places(self._graph, self.model, unit, _others(unit, kept))
        ]

    def _zero_gradients(self, *_: object) -> None:
        for parameter, dim, positions in self._zeroed:
            if parameter.grad is not None:
                parameter.grad.index_fill_(dim, positions, 0)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "kept": self.kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if "kept" not in state:
            raise CheckpointError("this is not the state of a FilterTraining: no 'kept'")
        super().load_state_dict(state)
        self._keep(state["kept"])


def _others(unit: ChannelUnit, kept: Mapping[str, Tensor]) -> Tensor:
    """The steps of a unit that are not kept."""
    goes = torch.ones(unit.channels // unit.step, dtype=torch.bool)
    goes[kept[unit.name] // unit.step] = False
    return goes.nonzero().flatten()
