"""Running statistics of batch normalisation, measured anew.

The statistics a network gathered while many widths shared its layers fit none of them: each
structure needs its own before it is evaluated.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dmcp.errors import DataError
from dmcp.train.evaluate import modes_kept


def recalibrate_batch_norm(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Replace the running statistics of ``model`` by their mean over all of ``batches``.

    Each batch counts the same, and all count (momentum 1 would keep only the last). Only batch
    normalisation runs in training mode. Training flags and momenta are restored;
    ``num_batches_tracked`` is the number of batches averaged. Without running statistics in the
    model nothing happens, and ``batches`` is not touched.

    Args:
        model: maps images [N, C, H, W] to logits.
        batches: pairs (images [N, C, H, W], labels); the labels are not used.

    Raises:
        DataError: ``batches`` is empty; the statistics are then as before.
    """
    norms = [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    ]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    empty = True
    try:
        with modes_kept(model), torch.no_grad():
            model.eval()
            for norm in norms:
                norm.train()
                norm.momentum = None  # a cumulative average
            for images, _ in batches:
                if empty:
                    for norm in norms:
                        norm.reset_running_stats()
                    empty = False
                model(images)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    if empty:
        raise DataError("batches holds no images to recalibrate batch normalisation with")
