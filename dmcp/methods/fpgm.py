"""Filter pruning via geometric median (FPGM, He et al., CVPR 2019).

Deviations from the paper: see `dmcp.methods.filter_training`. The momenta of zeroed filters are
zeroed with their gradients, so that they are zero all through an epoch; in the original they drift
until the next choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dmcp.errors import ConfigError
from dmcp.methods.filter_training import FilterPruning


@dataclass(frozen=True)
class FPGM(FilterPruning):
    """Zeroes the filters nearest to the geometric median of their layer, which the others can
    replace best, and trains the rest.

    Attributes:
        norm_rate: the share of filters that distances decide about; the others, with the smallest
            L2 norms, go first. The paper's "mix" has 0.9, 0.8 or 0.7.

    Raises:
        ConfigError: an option is out of range.
    """

    norm_rate: float = 1.0
    hard: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.norm_rate <= 1:
            raise ConfigError(f"norm_rate must be in (0, 1], got {self.norm_rate!r}")

    def score(self, filters: Tensor) -> Tensor:
        """See `FilterPruning`."""
        norms = filters.norm(dim=1)
        # The epsilon: 1 - 0.9 is a little less than a tenth.
        smallest = int((1 - self.norm_rate) * len(filters) + 1e-6)
        large = norms.argsort(stable=True)[smallest:]
        # Negative, that is below every distance, and in the order of the norms.
        scores = norms - norms.max() - 1
        scores[large] = distances(filters[large])
        return scores


def distances(filters: Tensor) -> Tensor:
    """The sum of the distances of each filter to all others: [n, weights] -> [n]."""
    # Not by a matrix product, which would lose the distances of filters that are alike.
    mode = "donot_use_mm_for_euclid_dist"
    return torch.cdist(filters, filters, compute_mode=mode).sum(1)
