"""Recipes for images of 8 to 32 pixels, minutes on a CPU or a GPU."""

from __future__ import annotations

from dmcp.recipes.recipe import Recipe
from dmcp.search import SearchOptions
from dmcp.train.optim import Schedule
from dmcp.train.training import TrainOptions

SMALL_RECIPES: dict[str, Recipe] = {
    "digits": Recipe(
        # A hundred steps of α in all: they have to be large ones.
        search=SearchOptions(
            lr=Schedule(peak=0.02, final=0.002),
            weight_decay=5e-4,
            arch_lr=Schedule(peak=0.1, final=0.02),
        ),
        retrain=TrainOptions(
            lr=Schedule(peak=0.05, start=0.005, warmup=0.1),
            weight_decay=5e-4,
            label_smoothing=0.1,
        ),
        search_epochs=12,
        retrain_epochs=20,
        batch_size=64,
    ),
    "cifar": Recipe(
        search=SearchOptions(
            lr=Schedule(peak=0.1, start=0.02, warmup=0.05, final=0.01), weight_decay=5e-4
        ),
        retrain=TrainOptions(
            lr=Schedule(peak=0.1, start=0.02, warmup=0.05), weight_decay=5e-4, label_smoothing=0.1
        ),
        search_epochs=40,
        retrain_epochs=100,
        batch_size=128,
    ),
}
