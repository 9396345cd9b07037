"""Retraining a structure inside its network, taught by it (the starred rows of the paper)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dmcp.errors import CheckpointError
from dmcp.graph import check_widths
from dmcp.search.markov_net import MarkovNet
from dmcp.train.distributed import World, average_gradients, broadcast_parameters
from dmcp.train.loss import accuracy, cross_entropy, distillation
from dmcp.train.optim import set_lr, sgd
from dmcp.train.training import TrainOptions


class DistilledTraining:
    """Trains the structure ``widths`` with weights shared with the full network.

    Every step updates the weights from two passes: the widest network learns the labels, the
    structure learns the widest network's outputs. Extract the structure afterwards and recalibrate
    its batch norms: their running statistics are the widest network's.

    Args:
        net: its weights are trained in place.
        widths: the structure.
        options: see `TrainOptions`.
        steps: number of calls of `step`.
        world: the processes that train together.

    Raises:
        ConfigError: see `dmcp.graph.check_widths`.
    """

    def __init__(
        self,
        net: MarkovNet,
        widths: Mapping[str, int],
        options: TrainOptions,
        steps: int,
        world: World | None = None,
    ) -> None:
        self.net = net
        self.widths = check_widths(net.graph.units, widths)
        self.options = options
        self.steps = steps
        self.step_index = 0
        self.world = world or World.single(net.architecture_parameters()[0].device)
        self.optimizer = sgd(net.model, options.lr, options.momentum, options.weight_decay)
        broadcast_parameters(net, self.world)

    def step(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """One update: images [N, C, H, W], labels int64 [N] -> ``loss`` and ``accuracy`` of the
        structure and ``teacher_loss``, 0-d, detached."""
        self.net.train()
        set_lr(self.optimizer, self.options.lr.at(self.step_index / self.steps))
        self.optimizer.zero_grad(set_to_none=True)
        teacher = self.net(images)
        teacher_loss = cross_entropy(teacher, labels, self.options.label_smoothing)
        teacher_loss.backward()
        with self.net.at(self.widths):
            logits = self.net(images)
        loss = distillation(logits, teacher.detach())
        loss.backward()
        average_gradients(self.net.weight_parameters(), self.world)
        self.optimizer.step()
        self.step_index += 1
        return {
            "loss": loss.detach(),
            "accuracy": accuracy(logits.detach(), labels),
            "teacher_loss": teacher_loss.detach(),
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything the following steps depend on."""
        return {
            "stage": "distilled training",
            "widths": self.widths,
            "steps": self.steps,
            "step_index": self.step_index,
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken.

        Raises:
            CheckpointError: the state is of another stage, structure or number of steps.
        """
        own = {"stage": "distilled training", "widths": self.widths, "steps": self.steps}
        for key, value in own.items():
            if state.get(key) != value:
                raise CheckpointError(
                    f"the checkpoint's {key} is {state.get(key)!r}, this training's is {value!r}"
                )
        try:
            self.net.load_state_dict(state["net"])
            # a copy, because the optimiser would keep and update the tensors it is given
            self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
            self.step_index = state["step_index"]
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError("the checkpoint is of another network") from error
