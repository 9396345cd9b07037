"""Training of a plain network on labels: what a pruned structure goes through."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dmcp.errors import CheckpointError, ConfigError
from dmcp.train.distributed import World, average_gradients, broadcast_parameters
from dmcp.train.loss import accuracy, cross_entropy
from dmcp.train.optim import Schedule, restore, set_lr, sgd
from dmcp.train.parts import Part, check_micro_batches, split_batch, sum_of
from dmcp.train.precision import MixedPrecision, Precision, check_precision


@dataclass(frozen=True)
class TrainOptions:
    """How a network is trained.

    Attributes:
        lr: the learning rate over the run.
        momentum: of SGD with Nesterov's rule.
        weight_decay: on weights of more than one axis.
        label_smoothing: in [0, 1).
        precision: of activations and their gradients, see `dmcp.train.precision.MixedPrecision`.
        micro_batches: parts in which a batch is computed, to save memory. Gradients are those of
            the whole batch, but batch norm sees each part alone.

    Raises:
        ConfigError: ``label_smoothing``, ``precision`` or ``micro_batches`` is out of range.
    """

    lr: Schedule
    momentum: float = 0.9
    weight_decay: float = 1e-4
    label_smoothing: float = 0.1
    precision: Precision = "float32"
    micro_batches: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(f"label_smoothing must be in [0, 1), got {self.label_smoothing}")
        check_precision(self.precision)
        check_micro_batches(self.micro_batches)


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
        self.precision = MixedPrecision(options.precision, next(model.parameters()).device)
        broadcast_parameters(model, self.world)

    def step(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """One update.

        Args:
            images: [N, C, H, W], this process's shard of the batch.
            labels: [N], int64.

        Returns:
            ``loss`` and ``accuracy`` of the shard before the update, 0-d, on the device.

        Raises:
            ConfigError: the shard is too small for ``micro_batches`` parts.
        """
        batch = split_batch(images, labels, self.options.micro_batches)
        if not self.model.training:
            self.model.train()
        set_lr(self.optimizer, self.options.lr.at(self.step_index / self.steps))
        self.optimizer.zero_grad(set_to_none=True)
        loss, logits = learn_labels(self.model, batch, self.precision, self.options.label_smoothing)
        average_gradients(self.model.parameters(), self.world)
        self.precision.step(self.optimizer)
        self.precision.update()
        self.step_index += 1
        return {"loss": loss, "accuracy": accuracy(torch.cat(logits), labels)}

    @property
    def passes(self) -> int:
        """Networks that every image has gone through so far, forward and backward."""
        return self.step_index

    def state_dict(self) -> dict[str, Any]:
        """Everything the next step depends on; tensors are shared with the stage, not copied."""
        return {
            "steps": self.steps,
            "step_index": self.step_index,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "precision": self.precision.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state; the next step gives the bits it would have given there.

        Raises:
            CheckpointError: ``state`` is of another model, length or precision, or of no training
                at all.
        """
        if missing := {"steps", "step_index", "model", "optimizer", "precision"} - state.keys():
            raise CheckpointError(f"this is not the state of a Training: no {sorted(missing)}")
        if state["steps"] != self.steps:
            raise CheckpointError(
                f"this is the state of a run of {state['steps']} steps, not of {self.steps}"
            )
        try:
            self.model.load_state_dict(state["model"])
            restore(self.optimizer, state["optimizer"])
            self.precision.load_state_dict(state["precision"])
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(
                "this is the state of a Training of another model or precision"
            ) from error
        self.step_index = state["step_index"]


def learn_labels(
    model: Callable[[Tensor], Tensor],
    batch: Sequence[Part],
    precision: MixedPrecision,
    label_smoothing: float,
) -> tuple[Tensor, list[Tensor]]:
    """Add the gradients of the cross-entropy of a batch to those that are there.

    Returns:
        The loss, and the logits of every part, both detached.
    """
    losses, outputs = [], []
    for part in batch:
        with precision.autocast():
            logits = model(part.images)
            loss = cross_entropy(logits, part.labels, label_smoothing) * part.share
        precision.backward(loss)
        losses.append(loss.detach())
        outputs.append(logits.detach())
    return sum_of(losses), outputs
