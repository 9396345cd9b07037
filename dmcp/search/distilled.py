"""Retraining a structure inside its network, taught by it (the starred rows of the paper)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dmcp.errors import CheckpointError
from dmcp.graph import check_widths
from dmcp.search.markov_net import MarkovNet
from dmcp.train.distributed import World, broadcast_parameters
from dmcp.train.gradients import GradientBuffer
from dmcp.train.loss import accuracy, distillation
from dmcp.train.optim import restore, set_lr, sgd
from dmcp.train.parts import Part, split_batch, sum_of
from dmcp.train.precision import MixedPrecision
from dmcp.train.training import TrainOptions, learn_labels


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
        device = net.architecture_parameters()[0].device
        self.world = world or World.single(device)
        self.precision = MixedPrecision(options.precision, device)
        self.gradients = GradientBuffer(net.trained_parameters(), net.weight_parameters())
        self.optimizer = sgd(net.model, options.lr, options.momentum, options.weight_decay)
        broadcast_parameters(net, self.world)

    def step(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """One update: images [N, C, H, W], labels int64 [N] -> ``loss`` and ``accuracy`` of the
        structure and ``teacher_loss``, 0-d, detached.

        Raises:
            ConfigError: the batch is too small for ``micro_batches`` parts.
        """
        batch = split_batch(images, labels, self.options.micro_batches)
        self.net.train()
        set_lr(self.optimizer, self.options.lr.at(self.step_index / self.steps))
        self.gradients.zero()
        with self.net.accumulating():
            teacher_loss, teachers = learn_labels(
                self.net, batch, self.precision, self.options.label_smoothing
            )
            loss, logits = self._learn_outputs(batch, teachers)
        self.gradients.average(self.world)
        self.precision.step(self.optimizer)
        self.precision.update()
        self.step_index += 1
        return {
            "loss": loss,
            "accuracy": accuracy(torch.cat(logits), labels),
            "teacher_loss": teacher_loss,
        }

    @property
    def passes(self) -> int:
        """Networks that every image has gone through so far, forward and backward."""
        return 2 * self.step_index

    def state_dict(self) -> dict[str, Any]:
        """Everything the following steps depend on."""
        return {
            "stage": "distilled training",
            "widths": self.widths,
            "steps": self.steps,
            "step_index": self.step_index,
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "precision": self.precision.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken.

        Raises:
            CheckpointError: the state is of another stage, structure, number of steps or precision.
        """
        own = {"stage": "distilled training", "widths": self.widths, "steps": self.steps}
        for key, value in own.items():
            if state.get(key) != value:
                raise CheckpointError(
                    f"the checkpoint's {key} is {state.get(key)!r}, this training's is {value!r}"
                )
        try:
            self.net.load_state_dict(state["net"])
            restore(self.optimizer, state["optimizer"])
            self.precision.load_state_dict(state["precision"])
            self.step_index = state["step_index"]
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError("the checkpoint is of another network or precision") from error

    def _learn_outputs(
        self, batch: Sequence[Part], teachers: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """As `learn_labels`, of the structure from the widest network's logits."""
        losses, outputs = [], []
        for part, teacher in zip(batch, teachers, strict=True):
            with self.precision.autocast():
                with self.net.at(self.widths):
                    logits = self.net(part.images)
                loss = distillation(logits, teacher) * part.share
            self.precision.backward(loss)
            losses.append(loss.detach())
            outputs.append(logits.detach())
        return sum_of(losses), outputs
