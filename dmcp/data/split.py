"""Stratified splits: every class gives the same share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dmcp.errors import DataError


def stratified_split(
    labels: Tensor, fraction: float, seed: int, classes: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Split positions into the rest and a share of every class.

    Args:
        labels: class indices, int64 [N].
        fraction: the share to take of each class, in [0, 1); rounded, and unless ``fraction`` is 0
            either side gets at least one image of each class.
        seed: decides which images are taken.
        classes: class names, for the error message.

    Returns:
        ``(rest, taken)``: ascending positions into ``labels``, int64; each position is in one.

    Raises:
        DataError: a class has fewer than two images.
    """
    if fraction == 0:
        return torch.arange(len(labels), device="cpu"), torch.empty(
            0, dtype=torch.int64, device="cpu"
        )
    generator = torch.Generator().manual_seed(seed)
    taken = torch.zeros(len(labels), dtype=torch.bool, device="cpu")
    for label, name in enumerate(classes):
        members = (labels == label).nonzero().squeeze(1)
        if len(members) < 2:
            raise DataError(
                f"class {name!r} has too few training images to hold out {fraction:g} of them: "
                f"got {len(members)}, need at least 2"
            )
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        taken[members[torch.randperm(len(members), generator=generator, device="cpu")[:count]]] = (
            True
        )
    return (~taken).nonzero().squeeze(1), taken.nonzero().squeeze(1)
