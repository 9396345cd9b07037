"""The two-stage search (DMCP, section 3.3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from dmcp.errors import CheckpointError, ConfigError
from dmcp.search.budget import Budget
from dmcp.search.chain_search import ChainSearch
from dmcp.search.markov_net import MarkovNet
from dmcp.search.options import SearchOptions
from dmcp.search.subnets import narrowest
from dmcp.train.cuda_graphs import CudaGraphs
from dmcp.train.distributed import World, all_reduce_sum, broadcast_parameters
from dmcp.train.gradients import GradientBuffer
from dmcp.train.loss import accuracy, cross_entropy, distillation
from dmcp.train.optim import restore, set_lr, sgd
from dmcp.train.parts import Part, split_batch, sum_of
from dmcp.train.precision import MixedPrecision
from dmcp.train.training import learn_labels

_Result = TypeVar("_Result")


class Search(ChainSearch):
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
        ConfigError: steps below 1, or ``options.cuda_graphs`` without a GPU or with several
            processes.
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
        options = options or SearchOptions()
        device = net.architecture_parameters()[0].device
        self.world = world or World.single(device)
        if options.cuda_graphs and self.world.size > 1:
            raise ConfigError(
                "cuda_graphs is for a search in one process: the collectives of "
                f"{self.world.size} processes are not captured"
            )
        self.cuda_graphs = CudaGraphs(net, device) if options.cuda_graphs else None
        super().__init__(net, budget, steps, options, seed)
        self.gradients = GradientBuffer(net.trained_parameters(), net.weight_parameters())
        self.arch_gradients = GradientBuffer(net.architecture_parameters())
        self.precision = MixedPrecision(options.precision, device)
        self.optimizer = sgd(net.model, options.lr, options.momentum, options.weight_decay)
        broadcast_parameters(net, self.world)

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
        self.gradients.zero()
        self.arch_gradients.zero()
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

    @property
    def passes(self) -> int:
        """Networks that every image has gone through so far, forward and backward."""
        architecture = max(0, self.step_index - self.warmup_steps)
        return self.step_index * self.options.sandwich + architecture

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
        # Drawn one after the other: what the chains say is on its way from the device until then.
        drawn = self._random_subnets()
        with self.net.accumulating():
            loss, teachers = self._same_pass("widest", self._widest_loss, batch)
            least = narrowest(self.net)
            other_losses = [
                self._same_pass("narrowest", self._subnet_loss, least, batch, teachers),
                *(self._subnet_loss(widths, batch, teachers) for widths in drawn),
            ]
        self.gradients.average(self.world)
        self.precision.step(self.optimizer)
        metrics = {
            "loss": loss,
            "accuracy": accuracy(torch.cat(teachers), torch.cat([part.labels for part in batch])),
            "subnet_loss": torch.stack(other_losses).mean(),
        }
        return metrics, teachers

    def _same_pass(self, name: str, compute: Callable[..., _Result], *inputs: Any) -> _Result:
        """A pass that differs from step to step in the numbers of its inputs alone."""
        if self.cuda_graphs is None:
            return compute(*inputs)
        return self.cuda_graphs.run(name, compute, *inputs)

    def _widest_loss(self, batch: Sequence[Part]) -> tuple[Tensor, list[Tensor]]:
        return learn_labels(self.net, batch, self.precision, self.options.label_smoothing)

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
        slack = self._begin_architecture_step()
        metrics = self._same_pass("architecture", self._chain_losses, batch, teachers, slack)
        self.arch_gradients.average(self.world)
        self.precision.step(self.arch_optimizer)
        return metrics

    def _chain_losses(
        self, batch: Sequence[Part], teachers: list[Tensor], slack: Tensor
    ) -> dict[str, Tensor]:
        scale = self._deviation(torch.cat(teachers)) if self.options.match_scale else None
        losses = []
        # Nothing accumulates, as the weights are frozen; but the operators that could are quicker.
        with self._masked_pass(slack) as budget, self.net.accumulating():
            for part in batch:
                with self.precision.autocast():
                    loss = self._masked_loss(part, scale)
                last = part is batch[-1]
                # The masks are parts of what the expected cost is: one backward goes through both.
                self.precision.backward(loss + budget if last else loss, retain_graph=not last)
                losses.append(loss.detach())
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
