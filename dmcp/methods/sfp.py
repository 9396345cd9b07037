"""Soft filter pruning (SFP, He et al., IJCAI 2018).

Deviations from the paper: see `dmcp.methods.filter_training`. It trains from scratch, its code for
ImageNet from pretrained weights, which is the default here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dmcp.methods.filter_training import FilterPruning


@dataclass(frozen=True)
class SFP(FilterPruning):
    """Zeroes the filters with the smallest L2 norms after every epoch, and lets them regrow."""

    hard: ClassVar[bool] = False

    def score(self, filters: Tensor) -> Tensor:
        """See `FilterPruning`."""
        return filters.norm(dim=1)
