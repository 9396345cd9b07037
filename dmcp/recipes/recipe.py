"""What a recipe is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from dmcp.search import SearchOptions
from dmcp.train.training import TrainOptions


@dataclass(frozen=True)
class Recipe:
    """Everything that a search and the retraining after it need, save the data.

    Attributes:
        search: options of the search.
        retrain: options of the retraining.
        search_epochs, retrain_epochs: lengths in epochs of the training set.
        batch_size: images per step, over all processes.
        crop_scale: smallest share of an image's area that a random crop keeps.
        groups, divisor: the width grid, see `dmcp.nn.width_choices`.
        model: name of the searched network, None where the recipe suits any.
        model_options: keyword arguments of that network.
        budget: the MACs it was published for, None where there is none.
    """

    search: SearchOptions
    retrain: TrainOptions
    search_epochs: int
    retrain_epochs: int
    batch_size: int
    crop_scale: float = 0.25
    groups: int = 10
    divisor: int = 8
    model: str | None = None
    model_options: Mapping[str, float] = field(default_factory=dict)
    budget: str | None = None

    @property
    def finetune(self) -> TrainOptions:
        """Options for inherited weights: those of the retraining from a fifth of its learning rate,
        without warm-up."""
        schedule = replace(self.retrain.lr, peak=self.retrain.lr.peak / 5, start=None, warmup=0.0)
        return replace(self.retrain, lr=schedule)
