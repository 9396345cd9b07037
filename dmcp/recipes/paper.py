"""The paper's recipes on ImageNet, one per network and budget of its tables.

Values are those of the published configuration files, but for the total batch, which they do not
state: 2,048 (626 iterations per epoch) fits their 1,250 warm-up iterations. Schedules counted in
iterations are shares of the run here. The random sub-networks were drawn from the chains by a rule
that depended on the batch size; ``uniform_share`` is where it ended at 2,048.
"""

from __future__ import annotations

from dataclasses import replace

from dmcp.recipes.recipe import Recipe
from dmcp.search import SearchOptions
from dmcp.train.optim import Schedule
from dmcp.train.training import TrainOptions

_SEARCH = SearchOptions(
    warmup=0.5,
    lr=Schedule(peak=0.5, final=0.08),
    momentum=0.9,
    weight_decay=1e-4,
    label_smoothing=0.0,
    random_subnets=2,
    uniform_share=0.778,
    distil=True,
    start=0.5,
    anneal=0.0,
    match_scale=False,
    arch_optimizer="sgd",
    arch_lr=Schedule(peak=0.5, final=0.1),
    budget_loss="log_l1",
    budget_weight=0.1,
    tolerance=0.05,
)
_RETRAIN = TrainOptions(
    lr=Schedule(peak=0.8, start=0.2, warmup=0.02),
    momentum=0.9,
    weight_decay=1e-4,
    label_smoothing=0.1,
)
_RESNET = Recipe(
    search=_SEARCH,
    retrain=_RETRAIN,
    search_epochs=40,
    retrain_epochs=100,
    batch_size=2048,
    crop_scale=0.08,
    groups=10,
    divisor=1,
)
_MOBILENET = Recipe(
    search=replace(
        _SEARCH,
        lr=Schedule(peak=0.5, start=0.2, warmup=0.04, final=0.08),
        weight_decay=4e-5,
        label_smoothing=0.1,
    ),
    retrain=replace(_RETRAIN, lr=Schedule(peak=0.8, start=0.2, warmup=0.008), weight_decay=4e-5),
    search_epochs=40,
    retrain_epochs=250,
    batch_size=2048,
    crop_scale=0.08,
    groups=15,
    divisor=1,
    model="mobilenet_v2",
    model_options={"width": 1.5},
)
_FAMILIES = {
    "mobilenet_v2": (_MOBILENET, ("300M", "211M", "97M", "87M", "59M", "43M")),
    "resnet18": (replace(_RESNET, model="resnet18"), ("1.04G",)),
    "resnet50": (replace(_RESNET, model="resnet50"), ("2.8G", "2.2G", "1.1G", "278M")),
}

PAPER_RECIPES: dict[str, Recipe] = {
    f"{model}-{budget}": replace(recipe, budget=budget)
    for model, (recipe, budgets) in _FAMILIES.items()
    for budget in budgets
}
