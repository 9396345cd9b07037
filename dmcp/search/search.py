"""The two-stage search (DMCP, section 3.3)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dmcp.errors import CheckpointError, ConfigError
from dmcp.ops import ExpectedCost
from dmcp.search.budget import Budget, Targets
from dmcp.search.budget_loss import BudgetLoss
from dmcp.search.markov_net import MarkovNet
from dmcp.search.options import SearchOptions
from dmcp.search.sampling import Samples, draw_widths, expected_widths, sample_within
from dmcp.search.subnets import narrowest, random_subnets
from dmcp.train.distributed import (
    World,
    all_reduce_sum,
    average_gradients,
    broadcast_parameters,
)
from dmcp.train.gradients import GradientBuffer
from dmcp.train.loss import accuracy, cross_entropy, distillation
from dmcp.train.optim import restore, set_lr, sgd
from dmcp.train.parts import Part, split_batch, sum_of
from dmcp.train.precision import MixedPrecision
from dmcp.train.training import learn_labels


class Search:
    """Finds the widths of a `MarkovNet` under a budget, in one training run.

    Every step is a sandwich step: one update of the weights from the widest, the narrowest and some
    random sub-networks, the others distilled from the widest. After the warm-up an architecture
    step follows on the same batch: one update of α from the task loss of the masked network plus
    the budget loss, weights frozen. Running batch-norm statistics follow the widest network alone.

    Args:
        net: what to search; its weights are trained in place.
        budget: what the structure may cost.
        steps: number of calls of `step`, which the schedules refer to.
        options: see `SearchOptions`.
        seed: of the sub-networks; the same on every rank.
        world: the processes that search together; each gives its own part of the batch.

    Raises:
        BudgetError: the network cannot meet the budget, or is below it anyway.
        ConfigError: steps below 1.
    """

    def __init__(
        self,
        net: MarkovNet,
        budget: Budget,
        steps: int,
        options: SearchOptions | None = None,
        *,
        seed: int = 0,
        world: World | None = None,
    ) -> None:
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ConfigError(f"steps must be an int of at least 1, got {steps!r}")
        self.net = net
        self.options = options = options or SearchOptions()
        self.targets: Targets = budget.of(net.graph)
        self.steps = steps
        self.step_index = 0
        self.generator = torch.Generator().manual_seed(seed)
        self.gradients = GradientBuffer(net.trained_parameters(), net.weight_parameters())
        device = net.architecture_parameters()[0].device
        self.world = world or World.single(device)
        self.precision = MixedPrecision(options.precision, device)
        self.optimizer = sgd(net.model, options.lr, options.momentum, options.weight_decay)
        self.arch_optimizer = _arch_optimizer(net.architecture_parameters(), options)
        self.budget_loss = BudgetLoss(
            options.budget_loss,
            options.budget_weight,
            options.tolerance,
            len(self.targets.bounds),
            device,
        )
        self._table = net.cost_table(self.targets.costs)
        for chain in net.chains.values():
            chain.reset(options.start)  # type: ignore[operator]
        with torch.no_grad():
            self._first_ratios = self.targets.ratios(self.expected_cost().cost)
        broadcast_parameters(net, self.world)

    @property
    def warmup_steps(self) -> int:
        """Steps before the first architecture step."""
        return min(round(self.options.warmup * self.steps), self.steps - 1)

    def step(
        self,
        images: Tensor,
        labels: Tensor,
        arch_images: Tensor | None = None,
        arch_labels: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """One iteration. Puts the whole network into training mode first.

        Args:
            images: [N, C, H, W].
            labels: int64 [N].
            arch_images, arch_labels: a batch of held-out images for the architecture step; by
                default, and in the paper, it sees the same batch as the weights.

        Returns:
            0-d tensors, detached and on the device: ``loss`` and ``accuracy`` of the widest
            network, ``subnet_loss``, the mean of the others, and ``expected_<metric>``; after the
            warm-up also ``masked_loss`` and ``budget_loss``.
        """
        if self.step_index >= self.steps:
            raise ConfigError(f"the search is over: all {self.steps} steps are done")
        self.net.train()
        batch = split_batch(images, labels, self.options.micro_batches)
        metrics, teachers = self._sandwich_step(batch)
        if self.step_index >= self.warmup_steps:
            if arch_images is not None and arch_labels is not None:
                batch = split_batch(arch_images, arch_labels, self.options.micro_batches)
            metrics |= self._architecture_step(batch, teachers)
        self.precision.update()
        with torch.no_grad():
            expected = self.expected_cost().cost.unbind()
        metrics |= {
            f"expected_{cost.metric}": value
            for cost, value in zip(self.targets.costs, expected, strict=True)
        }
        self.step_index += 1
        return metrics

    def expected_cost(self) -> ExpectedCost:
        """What the chains say now, with mean and variance of every cost that has a bound; see
        `dmcp.ops.expected_cost`."""
        return self.net.expected_cost(self._table)

    def expected_widths(self) -> dict[str, int]:
        """Expected sampling: on the grid, inside the budget; see `dmcp.search.expected_widths`."""
        return expected_widths(self.net, self.targets)

    def sample_widths(
        self,
        count: int,
        generator: torch.Generator | None = None,
        *,
        tolerance: float | None = None,
        max_draws: int = 1_000_000,
    ) -> Samples:
        """Markov sampling; with a tolerance, only structures that close to the budget.

        Raises:
            SamplingError: no structure within the tolerance was found in ``max_draws`` draws.
        """
        if tolerance is None:
            return draw_widths(self.net, count, generator)
        return sample_within(self.net, self.targets, count, tolerance, generator, max_draws)

    @torch.no_grad()
    def describe(self, targets: Targets | None = None) -> dict[str, Any]:
        """What the chains say, as plain JSON data.

        Args:
            targets: the bounds to hold their costs against, by default those of the search.

        Returns:
            ``costs``: metric -> budget, expected value, standard deviation, and the cost as
            `Cost.coefficients` of the widths of all units; ``units``: unit -> full width, in that
            order; ``choices`` and ``retain``: searchable unit -> widths, retain probabilities.
        """
        targets = targets or self.targets
        expected = self.net.expected_cost(self.net.cost_table(targets.costs))
        values = zip(expected.cost.tolist(), expected.variance.tolist(), strict=True)
        costs = {
            cost.metric: {
                "budget": bound,
                "expected": mean,
                "deviation": variance**0.5,
                "coefficients": cost.coefficients().tolist(),
            }
            for cost, bound, (mean, variance) in zip(
                targets.costs, targets.bounds, values, strict=True
            )
        }
        chains = {unit.name: self.net.chain(unit.name) for unit in self.net.graph.searchable}
        return {
            "costs": costs,
            "units": self.net.graph.widths(),
            "choices": {name: chain.choices for name, chain in chains.items()},
            "retain": {name: chain.retain().tolist() for name, chain in chains.items()},
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything the following steps depend on."""
        return {
            "stage": "search",
            "steps": self.steps,
            "step_index": self.step_index,
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "arch_optimizer": self.arch_optimizer.state_dict(),
            "budget_loss": self.budget_loss.state_dict(),
            "precision": self.precision.state_dict(),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken.

        Raises:
            CheckpointError: the state is of another stage, network or number of steps.
        """
        if state.get("stage") != "search" or state.get("steps") != self.steps:
            raise CheckpointError(
                f"the checkpoint is of stage {state.get('stage')!r} with {state.get('steps')} "
                f"steps, not of a search with {self.steps} steps"
            )
        try:
            self.net.load_state_dict(state["net"])
            restore(self.optimizer, state["optimizer"])
            restore(self.arch_optimizer, state["arch_optimizer"])
            self.budget_loss.load_state_dict(state["budget_loss"])
            self.precision.load_state_dict(state["precision"])
            self.generator.set_state(state["generator"])
            self.step_index = state["step_index"]
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError("the checkpoint is of another network") from error

    def _sandwich_step(self, batch: Sequence[Part]) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Update the weights; returns the metrics and, for each part of the batch, the widest
        network's logits."""
        options = self.options
        set_lr(self.optimizer, options.lr.at(self.step_index / self.steps))
        self.gradients.zero()
        # Drawn one after the other: what the chains say is on its way from the device until then.
        others = itertools.chain((narrowest(self.net),), self._random_subnets())
        with self.net.accumulating():
            loss, teachers = learn_labels(self.net, batch, self.precision, options.label_smoothing)
            other_losses = [self._subnet_loss(widths, batch, teachers) for widths in others]
        self.gradients.average(self.world)
        self.precision.step(self.optimizer)
        metrics = {
            "loss": loss,
            "accuracy": accuracy(torch.cat(teachers), torch.cat([part.labels for part in batch])),
            "subnet_loss": torch.stack(other_losses).mean(),
        }
        return metrics, teachers

    def _random_subnets(self) -> Iterator[Mapping[str, Any]]:
        """The random sub-networks of a sandwich step, as ``net.at`` takes them."""
        count = self.options.random_subnets
        return random_subnets(self.net, count, self._uniform_share(), self.generator)

    def _subnet_loss(
        self, widths: Mapping[str, Any], batch: Sequence[Part], teachers: Sequence[Tensor]
    ) -> Tensor:
        losses = []
        for part, teacher in zip(batch, teachers, strict=True):
            with self.precision.autocast():
                with self.net.at(widths):
                    logits = self.net(part.images)
                if self.options.distil:
                    loss = distillation(logits, teacher)
                else:
                    loss = cross_entropy(logits, part.labels, self.options.label_smoothing)
                loss = loss * part.share
            self.precision.backward(loss)
            losses.append(loss.detach())
        return sum_of(losses)

    def _architecture_step(
        self, batch: Sequence[Part], teachers: list[Tensor]
    ) -> dict[str, Tensor]:
        """Update α; ``teachers`` are the widest network's logits on this step's images."""
        done = (self.step_index - self.warmup_steps) / (self.steps - self.warmup_steps)
        set_lr(self.arch_optimizer, self.options.arch_lr.at(done))
        self.arch_optimizer.zero_grad(set_to_none=True)
        scale = self._deviation(torch.cat(teachers)) if self.options.match_scale else None
        losses = []
        with _frozen(self.net.weight_parameters()), self.net.masked(self._table) as expected:
            ratios = self.targets.ratios(expected.cost) / self._slack(done)
            budget = self.budget_loss(ratios)
            for part in batch:
                with self.precision.autocast():
                    loss = self._masked_loss(part, scale)
                last = part is batch[-1]
                # The masks are parts of what the expected cost is: one backward goes through both.
                self.precision.backward(loss + budget if last else loss, retain_graph=not last)
                losses.append(loss.detach())
        average_gradients(self.net.architecture_parameters(), self.world)
        self.precision.step(self.arch_optimizer)
        self.budget_loss.update(ratios)
        return {"masked_loss": sum_of(losses), "budget_loss": budget.detach()}

    def _masked_loss(self, part: Part, scale: Tensor | None) -> Tensor:
        """The task loss; ``scale`` is what the deviation of the logits is made."""
        logits = self.net(part.images)
        if scale is not None:
            logits = logits * (scale / self._deviation(logits))
        return cross_entropy(logits, part.labels, self.options.label_smoothing) * part.share

    def _deviation(self, logits: Tensor) -> Tensor:
        """Standard deviation of the logits of all processes, differentiable."""
        mean = all_reduce_sum(logits.mean(), self.world) / self.world.size
        square = (logits - mean).square().mean()
        return (all_reduce_sum(square, self.world) / self.world.size).sqrt()

    def _slack(self, done: float) -> Tensor:
        """By how much the bounds are still relaxed: [B], from E / bound at the start down to 1."""
        if done >= self.options.anneal:
            return torch.ones_like(self._first_ratios)
        return self._first_ratios.clamp(min=1) ** (1 - done / self.options.anneal)

    def _uniform_share(self) -> float:
        """The chance that a random sub-network is uniform: 1, then geometric down to the option."""
        done = (self.step_index - self.warmup_steps) / (self.steps - self.warmup_steps)
        return float(self.options.uniform_share ** max(0.0, done))


def _arch_optimizer(
    parameters: Sequence[nn.Parameter], options: SearchOptions
) -> torch.optim.Optimizer:
    lr = options.arch_lr.at(0.0)
    if options.arch_optimizer == "adam":
        return torch.optim.Adam(parameters, lr=lr, fused=True)
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9, nesterov=True, fused=True)


@contextmanager
def _frozen(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """No gradient for these parameters while the context is open, so none is computed."""
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
