"""Accuracy and loss of a model over a whole image set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmcp.errors import DataError


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured.

    Attributes:
        top1: share of images whose label has the largest logit, in [0, 1].
        top5: share of images whose label is among the five largest logits; ``None`` with five
            classes or fewer, where it says nothing.
        loss: mean cross-entropy against the labels, in nats, without label smoothing.
        images: number of images.
    """

    top1: float
    top5: float | None
    loss: float
    images: int


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Restore every module's training flag on the way out, also those that differ from the rest."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Evaluation:
    """Evaluate ``model`` in eval mode without gradients; its modes are restored.

    Sums stay on the device in float64 and are read once, at the end.

    Args:
        model: maps images [N, C, H, W] to logits [N, K].
        batches: pairs (images [N, C, H, W], labels [N] int64) on the model's device.

    Raises:
        DataError: there are no images.
    """
    sums: Tensor | None = None
    images_seen = 0
    has_top5 = False
    with modes_kept(model), torch.inference_mode():
        model.eval()
        for images, labels in batches:
            logits = model(images)
            has_top5 = logits.shape[1] > 5
            best = logits.topk(5 if has_top5 else 1, dim=1).indices
            hits = best == labels[:, None]
            loss = F.cross_entropy(logits.double(), labels, reduction="sum")
            batch_sums = torch.stack([hits[:, 0].sum().double(), hits.sum().double(), loss])
            sums = batch_sums if sums is None else sums + batch_sums
            images_seen += len(labels)
    if sums is None or images_seen == 0:
        raise DataError("batches holds no images to evaluate on")
    top1, top5, mean_loss = (sums / images_seen).tolist()
    return Evaluation(top1, top5 if has_top5 else None, mean_loss, images_seen)
