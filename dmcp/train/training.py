"""Training of a plain network on labels: what a pruned structure goes through."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dmcp.errors import CheckpointError, ConfigError
from dmcp.train.distributed import World, average_gradients, broadcast_parameters
from dmcp.train.loss import accuracy, cross_entropy
from dmcp.train.optim import Schedule, set_lr, sgd


@dataclass(frozen=True)
class TrainOptions:
    """How a network is trained.

    Attributes:
        lr: the learning rate over the run.
        momentum: of SGD with Nesterov's rule.
        weight_decay: on weights of more than one axis.
        label_smoothing: in [0, 1).

    Raises:
        ConfigError: ``label_smoothing`` is out of range.
    """

    lr: Schedule
    momentum: float = 0.9
    weight_decay: float = 1e-4
    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(f"label_smoothing must be in [0, 1), got {self.label_smoothing}")


class Training:
    """A stage that trains ``model`` in place; `dmcp.train.loop.run` drives it.

    In several processes the model starts as rank 0's, and gradients are averaged. Batch
    normalisation sees the shard of each process unless
    `dmcp.train.distributed.synchronise_batch_norm` was called on the model.

    Args:
        model: maps images [N, C, H, W] to logits [N, K].
        options: how to train.
        steps: length of the run.
        world: the processes that share each batch.

    Raises:
        ConfigError: ``steps`` is not positive, an option is out of range, or nothing in the
            model is trainable.
    """

    def __init__(
        self, model: nn.Module, options: TrainOptions, steps: int, world: World | None = None
    ) -> None:
        if steps < 1:
            raise ConfigError(f"steps must be positive, got {steps}")
        self.model = model
        self.options = options
        self.steps = steps
        self.step_index = 0
        self.world = world or World.single()
        self.optimizer = sgd(model, options.lr, options.momentum, options.weight_decay)
        broadcast_parameters(model, self.world)

    def step(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """One update.

        Args:
            images: [N, C, H, W], this process's shard of the batch.
            labels: [N], int64.

        Returns:
            ``loss`` and ``accuracy`` of the shard before the update, 0-d, on the device.
        """
        if not self.model.training:
            self.model.train()
        set_lr(self.optimizer, self.options.lr.at(self.step_index / self.steps))
        self.optimizer.zero_grad(set_to_none=True)
        logits = self.model(images)
        loss = cross_entropy(logits, labels, self.options.label_smoothing)
        loss.backward()
        average_gradients(self.model.parameters(), self.world)
        self.optimizer.step()
        self.step_index += 1
        return {"loss": loss.detach(), "accuracy": accuracy(logits.detach(), labels)}

    def state_dict(self) -> dict[str, Any]:
        """Everything the next step depends on; tensors are shared with the stage, not copied."""
        return {
            "steps": self.steps,
            "step_index": self.step_index,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state; the next step gives the bits it would have given there.

        Raises:
            CheckpointError: ``state`` is of another model, another length or no training at all.
        """
        if missing := {"steps", "step_index", "model", "optimizer"} - state.keys():
            raise CheckpointError(f"this is not the state of a Training: no {sorted(missing)}")
        if state["steps"] != self.steps:
            raise CheckpointError(
                f"this is the state of a run of {state['steps']} steps, not of {self.steps}"
            )
        try:
            self.model.load_state_dict(state["model"])
            # a copy, because the optimiser would keep and update the tensors it is given
            self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError("this is the state of a Training of another model") from error
        self.step_index = state["step_index"]
