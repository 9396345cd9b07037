"""The search in a training loop of one's own."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.amp import GradScaler

from dmcp.errors import CheckpointError, ConfigError
from dmcp.search import Budget, MarkovNet, SearchOptions
from dmcp.search.chain_search import ChainSearch
from dmcp.search.subnets import narrowest
from dmcp.train.optim import restore

LossOf = Callable[[], Tensor]


class LoopSearch(ChainSearch):
    """Finds the widths of a `MarkovNet` while a loop of your own trains it.

    For what `dmcp.Search` cannot know: a loss of your own, several inputs or outputs, your
    optimizer, gradient clipping, averages of the weights. The loop stays as it is but for one line
    between its backward pass and the step of its optimizer::

        def loss():
            return criterion(net(images, depth), boxes)

        optimizer.zero_grad()
        loss().backward()
        search.step(loss)
        optimizer.step()

    What the loop does trains the widest network; `step` adds the gradients of the narrowest and of
    random sub-networks to those of the weights and, after the warm-up, updates α from the loss of
    the masked network plus the budget loss. As in `dmcp.Search`, gradients are sums over the
    networks; unlike there, every network learns from your loss, without distillation, and
    nothing is done about the scale of the masked network's outputs.

    Running statistics of batch norms follow the widest network: a structure needs some training,
    or `dmcp.train.recalibrate_batch_norm`, before it is evaluated. One process only: for a
    ``DistributedDataParallel`` sub-networks would be passes with missing gradients.

    Args:
        net: what to search; ``net.train()`` and ``net.eval()`` are the loop's.
        budget: what the structure may cost.
        steps: number of calls of `step`, which the schedules refer to.
        options: those of `SearchOptions` about chains and sub-networks count, those about weights
            and the task loss do not.
        seed: of the sub-networks.

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
    ) -> None:
        super().__init__(net, budget, steps, options, seed)
        self._scaler = GradScaler(enabled=False)

    def step(
        self, loss_of: LossOf, scaler: GradScaler | None = None, *, share: float = 1.0
    ) -> dict[str, Tensor]:
        """The search's part of an iteration, after the backward pass of the widest network.

        Args:
            loss_of: computes the loss of the batch, a 0-d tensor, with the net as it then is, in
                your ``torch.autocast`` if there is one.
            scaler: that of your gradients, which this adds to before they are unscaled; α has one
                of its own.
            share: where a loop accumulates gradients of n batches, 1 / n, by which it multiplies
                the loss itself: ``loss_of`` is the whole one, which α learns from.

        Returns:
            0-d tensors, detached and on the device: ``subnet_loss``, the mean over the
            sub-networks, and ``expected_<metric>``; after the warm-up also ``masked_loss`` and
            ``budget_loss``.

        Raises:
            ConfigError: the search is over, or ``loss_of`` does not call the net.
        """
        if self.step_index >= self.steps:
            raise ConfigError(f"the search is over: all {self.steps} steps are done")
        scaler = scaler or GradScaler(enabled=False)
        losses = []
        for widths in itertools.chain((narrowest(self.net),), self._random_subnets()):
            with self.net.at(widths):
                loss = self._called(loss_of)
                scaler.scale(share * loss).backward()
            losses.append(loss.detach())
        metrics = {"subnet_loss": torch.stack(losses).mean()}
        if self.step_index >= self.warmup_steps:
            metrics |= self._architecture_step(loss_of, scaler)
        with torch.no_grad():
            expected = self.expected_cost().cost.unbind()
        metrics |= {
            f"expected_{cost.metric}": value
            for cost, value in zip(self.targets.costs, expected, strict=True)
        }
        self.step_index += 1
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Everything about the search but the weights, which are the loop's to save."""
        return {
            "steps": self.steps,
            "step_index": self.step_index,
            "chains": self.net.chains.state_dict(),
            "arch_optimizer": self.arch_optimizer.state_dict(),
            "budget_loss": self.budget_loss.state_dict(),
            "scaler": self._scaler.state_dict(),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken.

        Raises:
            CheckpointError: the state is of another network or number of steps.
        """
        if state.get("steps") != self.steps:
            raise CheckpointError(
                f"the state is of a search with {state.get('steps')} steps, not with {self.steps}"
            )
        try:
            self.net.chains.load_state_dict(state["chains"])
            restore(self.arch_optimizer, state["arch_optimizer"])
            self.budget_loss.load_state_dict(state["budget_loss"])
            if state["scaler"]:
                self._scaler = self._new_scaler()
                self._scaler.load_state_dict(state["scaler"])
            self.generator.set_state(state["generator"])
            self.step_index = state["step_index"]
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError("the state is of another network") from error

    def _architecture_step(self, loss_of: LossOf, scaler: GradScaler) -> dict[str, Tensor]:
        if scaler.is_enabled() and not self._scaler.is_enabled():
            # The loop's own would step α once between its updates: gradients may be accumulated.
            self._scaler = self._new_scaler(scaler.get_scale())
        with self._architecture_pass() as budget:
            loss = self._called(loss_of)
            # Not for what else the loss depends on, whose gradients the loop has gathered.
            alphas = self.net.architecture_parameters()
            self._scaler.scale(loss + budget).backward(inputs=alphas)
        self._scaler.step(self.arch_optimizer)
        self._scaler.update()
        # The loop's optimizer may hold α, too, and leaves alone what has no gradient.
        self.arch_optimizer.zero_grad(set_to_none=True)
        return {"masked_loss": loss.detach(), "budget_loss": budget.detach()}

    def _new_scaler(self, scale: float = 1.0) -> GradScaler:
        device = self.net.architecture_parameters()[0].device
        return GradScaler(device.type, init_scale=scale)

    def _called(self, loss_of: LossOf) -> Tensor:
        """The loss; a model beside the net would be searched without a sign of it."""
        calls: list[int] = []
        handle = self.net.register_forward_pre_hook(lambda *_: calls.append(1))
        try:
            loss = loss_of()
        finally:
            handle.remove()
        if not calls:
            raise ConfigError("loss_of does not call the net that is searched")
        return loss
