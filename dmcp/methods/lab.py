"""Where a pruning method works: a network, images, and the means to train and judge networks."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dmcp.data import Batch, DataSource, eval_batches, train_stream
from dmcp.errors import CheckpointError, ConfigError, DataError
from dmcp.graph import ChannelGraph, extract
from dmcp.methods.growth import kept_channels
from dmcp.methods.importance import l1_norms
from dmcp.recipes import Recipe
from dmcp.search import Budget, MarkovNet, Targets
from dmcp.train import Stage, Training, World, evaluate, recalibrate_batch_norm, run

_HOLDOUT_BATCH = 256
"""Held-out images at a time, at most."""

_CACHED_BYTES = 2**28
"""Up to this size the held-out images stay on the device between evaluations."""


@dataclass
class Spent:
    """What a search has cost.

    Attributes:
        forward, backward: images through a network, whatever its width, forward and backward.
        seconds: on the clock, over all restarts.
    """

    forward: int = 0
    backward: int = 0
    seconds: float = 0.0

    def add(self, other: Spent) -> None:
        self.forward += other.forward
        self.backward += other.backward
        self.seconds += other.seconds


class Lab:
    """Where a pruning method works.

    Everything that methods have in common is here, so that they differ in nothing else: the units
    and their grid, costs, images, the recipe, extraction, and the record of what was spent.

    Args:
        graph: what `dmcp.trace` found of a network with fresh weights, which stay as they are.
        data: with held-out images, which methods judge structures by. Test images are not for them.
        budgets: label -> what a structure may cost.
        recipe: the grid; lengths and options of trainings and searches.
        seed: of everything that is drawn.
        folder: where long phases keep checkpoints to resume from; None keeps none. It belongs to
            one method with one set of options.
        shared: as ``folder``, for what all methods use.
        checkpoint_every: steps between checkpoints.
        workers: processes that decode images.

    Attributes:
        graph: the same, its units' ``choices`` restricted to the grid.
        budgets, targets: label -> budget, and its bounds for this network; the largest one first.
        device: of the network.
        spent: what searches have cost so far, by budget; None for what serves all of them.
        pretraining: what `pretrained` has cost, nothing before it is called; a part of ``spent``.

    Raises:
        BudgetError: see `Budget.of`.
        ConfigError: no budget, or budgets that bound different costs.
        DataError: no held-out images, or fewer images than one batch.
    """

    def __init__(
        self,
        graph: ChannelGraph,
        data: DataSource,
        budgets: Mapping[str, Budget],
        recipe: Recipe,
        *,
        seed: int = 0,
        folder: Path | None = None,
        shared: Path | None = None,
        checkpoint_every: int = 100,
        workers: int = 0,
    ) -> None:
        if not len(data.holdout):
            raise DataError("methods judge structures by held-out images: holdout must be above 0")
        if len(data.train) < recipe.batch_size:
            raise DataError(
                f"{len(data.train)} training images are fewer than one batch of {recipe.batch_size}"
            )
        if not budgets:
            raise ConfigError("budgets: there must be at least one")
        self.recipe = recipe
        self.graph = self._net(graph).graph
        self.data = data
        self.seed = seed
        self.targets = _descending({name: b.of(self.graph) for name, b in budgets.items()})
        self.budgets = {name: budgets[name] for name in self.targets}
        self.device = next(graph.model.parameters()).device
        self.spent: dict[str | None, Spent] = {None: Spent()}
        self._folder = folder
        self._shared = shared
        self._checkpoint_every = checkpoint_every
        self._workers = workers
        self._running: _Metered | None = None
        self._pretrained: nn.Module | None = None
        self.pretraining = Spent()

    def fresh(self) -> nn.Module:
        """The whole network with its fresh weights, to train."""
        return copy.deepcopy(self.graph.model)

    def net(self, model: nn.Module) -> MarkovNet:
        """A `MarkovNet` on a whole network of the lab, on the common grid."""
        return self._net(replace(self.graph, model=model))

    def _net(self, graph: ChannelGraph) -> MarkovNet:
        return MarkovNet(graph.model, None, self.recipe.groups, self.recipe.divisor, graph=graph)

    def generator(self) -> torch.Generator:
        """A generator on the CPU that starts at the seed."""
        return torch.Generator().manual_seed(self.seed)

    def steps(self, epochs: int) -> int:
        """Steps of so many epochs of the training images."""
        return epochs * (len(self.data.train) // self.recipe.batch_size)

    def train(
        self,
        stage: Stage,
        phase: str,
        *,
        passes: int = 1,
        budget: str | None = None,
    ) -> None:
        """Drive a stage to its end on training batches.

        Args:
            stage: its ``step`` takes images and labels.
            phase: its name, once in a search.
            passes: networks that every image goes through in a step, forward and backward.
            budget: the label of the budget it is for, None if it serves all.
        """
        self._drive(
            _Metered(stage, passes * self.recipe.batch_size),
            phase,
            lambda start: self._stream(stage.steps, start),
            budget,
        )

    def _stream(self, steps: int, start: int = 0) -> Iterator[Batch]:
        return train_stream(
            self.data.train,
            self.recipe.batch_size,
            seed=self.seed,
            steps=steps,
            start_step=start,
            workers=self._workers,
            device=self.device,
            crop_scale=self.recipe.crop_scale,
        )

    def run(self, stage: Stage, phase: str, *, budget: str | None = None) -> None:
        """Drive a stage whose ``step`` takes nothing: one round of a search, kept after each. It
        costs what the lab is asked for meanwhile."""
        rounds = itertools.repeat(())
        self._drive(_Metered(stage, 0), phase, lambda start: rounds, budget, checkpoint_every=1)

    def _drive(
        self,
        stage: _Metered,
        phase: str,
        stream_from: Callable[[int], Iterable[tuple[Tensor, ...]]],
        budget: str | None = None,
        folder: Path | None = None,
        checkpoint_every: int | None = None,
    ) -> None:
        name = phase if budget is None else f"{phase}-{budget}"
        folder = folder or self._folder
        before, self._running = self._running, stage
        torch.manual_seed(self.seed)  # for what a network draws itself, dropout
        try:
            seconds = run(
                stage,
                stream_from,
                phase=name,
                checkpoint=None if folder is None else folder / f"{name}.pt",
                checkpoint_every=checkpoint_every or self._checkpoint_every,
                world=World.single(self.device),
            )
        finally:
            self._running = before
        stage.spent.seconds = seconds
        self.spent.setdefault(budget, Spent()).add(stage.spent)

    def charge(self, forward: int, backward: int = 0) -> None:
        """Record that images went through a network."""
        spent = self.spent[None] if self._running is None else self._running.spent
        spent.add(Spent(forward, backward))

    def spent_on(self, budget: str) -> Spent:
        """What the structure of one budget has cost: what served all budgets, and what it alone."""
        total = Spent()
        total.add(self.spent[None])
        total.add(self.spent.get(budget, Spent()))
        return total

    def pretrained(self) -> nn.Module:
        """The whole network after the recipe's training: made once for all methods that share a
        folder, charged to each of them, once."""
        if self._pretrained is None:
            model = self.fresh()
            steps = self.steps(self.recipe.retrain_epochs)
            training = Training(model, self.recipe.retrain, steps)
            stage = _Metered(training, self.recipe.batch_size)
            self._drive(
                stage,
                "pretrained",
                lambda start: self._stream(stage.steps, start),
                folder=self._shared,
            )
            self._pretrained = model
            self.pretraining = stage.spent
        return copy.deepcopy(self._pretrained)

    def accuracy(self, model: nn.Module) -> float:
        """Share of the held-out images that a network classifies correctly, in eval mode."""
        self.charge(len(self.data.holdout))
        return evaluate(model, self.holdout()).top1

    def holdout(self) -> Iterator[Batch]:
        """The held-out images in batches, unchanged."""
        if self._cached_holdout is not None:
            return iter(self._cached_holdout)
        return self._load_holdout()

    @cached_property
    def _cached_holdout(self) -> Sequence[Batch] | None:
        count, format = len(self.data.holdout), self.data.holdout.format
        if 4 * count * format.channels * format.size**2 > _CACHED_BYTES:
            return None
        return list(self._load_holdout())

    def _load_holdout(self) -> Iterator[Batch]:
        # Large batches of one size: methods may normalise by a batch's own statistics.
        count = len(self.data.holdout)
        size = ceil(count / ceil(count / _HOLDOUT_BATCH))
        return eval_batches(self.data.holdout, size, self._workers, self.device)

    def calibrate(self, model: nn.Module, batches: int = 16) -> None:
        """Give the batch norms of an extracted network the statistics of training images."""
        model.to(self.device)
        recalibrate_batch_norm(model, self._charged(self.batches(batches)))

    def _charged(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        for batch in batches:
            self.charge(len(batch.images))
            yield batch

    def batches(self, count: int) -> Iterator[Batch]:
        """The first training batches, augmented; always the same. Not charged."""
        return self._stream(count)

    def extract(
        self,
        model: nn.Module,
        widths: Mapping[str, int] | None = None,
        *,
        kept: Mapping[str, Tensor] | None = None,
    ) -> nn.Module:
        """The pruned network with the weights of a whole one, as `dmcp.extract`."""
        small = extract(replace(self.graph, model=model), widths, kept=kept)
        return small.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def inherit(self, model: nn.Module, widths: Mapping[str, int]) -> nn.Module:
        """The network of these widths with the filters of ``model`` that have the largest norms,
        calibrated."""
        kept = kept_channels(self.graph, l1_norms(self.graph, model), widths)
        small = self.extract(model, kept=kept)
        self.calibrate(small)
        return small


class _Metered:
    """A stage together with what it has cost, which is resumed with it.

    Args:
        stage: any stage.
        images: images that go through a network, forward and backward, in each of its steps.
    """

    def __init__(self, stage: Stage, images: int) -> None:
        self.stage = stage
        self.spent = Spent()
        self._images = images

    @property
    def steps(self) -> int:
        return self.stage.steps

    @property
    def step_index(self) -> int:
        return self.stage.step_index

    def step(self, *batch: Tensor) -> Mapping[str, Tensor]:
        metrics = self.stage.step(*batch)
        self.spent.add(Spent(self._images, self._images))
        return metrics

    def state_dict(self) -> dict[str, Any]:
        return {"stage": self.stage.state_dict(), "spent": asdict(self.spent)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not {"stage", "spent"} <= state.keys():
            raise CheckpointError("this is not the state of a phase of a method")
        self.stage.load_state_dict(state["stage"])
        self.spent = Spent(**state["spent"])


def _descending(targets: Mapping[str, Targets]) -> dict[str, Targets]:
    bounded = {tuple(each.by_metric()) for each in targets.values()}
    if len(bounded) > 1:
        raise ConfigError(f"budgets must all bound the same costs, got {sorted(bounded)}")
    if len({each.bounds for each in targets.values()}) < len(targets):
        raise ConfigError(f"budgets must differ, got {', '.join(targets)}")
    order = sorted(targets, key=lambda name: targets[name].bounds, reverse=True)
    return {name: targets[name] for name in order}
