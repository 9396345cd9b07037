"""Running statistics of batch normalisation, measured anew.

The statistics a network gathered while many widths shared its layers fit none of them: each
structure needs its own before it is evaluated.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dmcp.errors import ConfigError, DataError
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
        DataError: ``batches`` is empty.
        ConfigError: a norm gathered nothing, like those of a sub-network of a `MarkovNet`: extract
            it first. After any error the statistics are as before.
    """
    norms = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }
    if not norms:
        return
    momenta = {name: norm.momentum for name, norm in norms.items()}
    before = {name: copy.deepcopy(dict(norm.named_buffers())) for name, norm in norms.items()}
    try:
        with modes_kept(model), torch.no_grad():
            _gather(model, norms, batches)
    except BaseException:
        for name, norm in norms.items():
            for key, buffer in norm.named_buffers():
                buffer.copy_(before[name][key])
        raise
    finally:
        for name, norm in norms.items():
            norm.momentum = momenta[name]


def _gather(
    model: nn.Module,
    norms: Mapping[str, _BatchNorm],
    batches: Iterable[tuple[Tensor, Tensor]],
) -> None:
    model.eval()
    for norm in norms.values():
        norm.reset_running_stats()
        norm.train()
        norm.momentum = None  # a cumulative average
    empty = True
    for images, _ in batches:
        model(images)
        empty = False
    if empty:
        raise DataError("batches holds no images to recalibrate batch normalisation with")
    for name, norm in norms.items():
        if not int(norm.num_batches_tracked):  # type: ignore[arg-type]
            raise ConfigError(
                f"{name or 'the model'} gathered no statistics: recalibrate an extracted network, "
                "not a sub-network"
            )
