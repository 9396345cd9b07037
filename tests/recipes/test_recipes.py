from __future__ import annotations

import dataclasses

import pytest
import torch

import dmcp
from dmcp import models, recipes
from dmcp.errors import ConfigError
from dmcp.methods import uniform_widths
from dmcp.search import Budget

PAPER = {
    "mobilenet_v2-300M": 300e6,
    "mobilenet_v2-211M": 211e6,
    "mobilenet_v2-97M": 97e6,
    "mobilenet_v2-87M": 87e6,
    "mobilenet_v2-59M": 59e6,
    "mobilenet_v2-43M": 43e6,
    "resnet18-1.04G": 1.04e9,
    "resnet50-2.8G": 2.8e9,
    "resnet50-2.2G": 2.2e9,
    "resnet50-1.1G": 1.1e9,
    "resnet50-278M": 278e6,
}


def test_names():
    assert recipes.names() == ("digits", "cifar", *PAPER)
    with pytest.raises(ConfigError, match=r"unknown recipe 'imagenet'; there are digits, cifar, "):
        recipes.get("imagenet")


@pytest.fixture(scope="module", params=["mobilenet_v2", "resnet18", "resnet50"])
def net(request):
    """A network of the paper at 224 pixels, on its grid; shapes only."""
    recipe = recipes.get(next(name for name in PAPER if name.startswith(request.param)))
    with torch.device("meta"):
        model = models.build(request.param, **recipe.model_options)
        example = torch.zeros(1, 3, 224, 224)
    return request.param, dmcp.MarkovNet(model, example, recipe.groups, recipe.divisor)


def test_every_budget_can_be_reached(net):
    model, net = net
    named = [name for name in PAPER if name.startswith(model)]
    assert named
    for name in named:
        recipe = recipes.get(name)
        assert recipe.model == model
        targets = Budget(macs=recipe.budget).of(net.graph)
        assert targets.bounds == (PAPER[name],)
        macs = dmcp.cost(net.graph, "macs")
        assert 0.95 * PAPER[name] <= macs.of(uniform_widths(net.graph, targets)) <= PAPER[name]


def test_the_searched_networks_are_the_papers(net):
    """MACs and parameters of the whole networks."""
    model, net = net
    macs = dmcp.cost(net.graph, "macs").of({})
    params = dmcp.cost(net.graph, "params").of({})
    expected = {"mobilenet_v2": (672.8e6, 6.858e6), "resnet18": (1.81e9, 11.7e6)}
    expected["resnet50"] = (4.09e9, 25.56e6)
    assert (macs, params) == pytest.approx(expected[model], rel=0.01)


def test_searches_of_the_paper():
    for name in PAPER:
        recipe = recipes.get(name)
        search, mobile = recipe.search, name.startswith("mobilenet")
        assert (recipe.search_epochs, recipe.batch_size, recipe.divisor) == (40, 2048, 1)
        assert recipe.groups == (15 if mobile else 10)
        assert recipe.model_options == ({"width": 1.5} if mobile else {})
        assert (search.warmup, search.random_subnets, search.distil) == (0.5, 2, True)
        assert search.momentum == 0.9
        assert search.weight_decay == (4e-5 if mobile else 1e-4)
        assert search.label_smoothing == (0.1 if mobile else 0.0)
        assert (search.arch_optimizer, search.start) == ("sgd", 0.5)
        assert (search.arch_lr.at(0), search.arch_lr.at(1)) == (0.5, pytest.approx(0.1))
        assert (search.budget_loss, search.budget_weight, search.tolerance) == ("log_l1", 0.1, 0.05)
        # 0.9999 twice every tenth of the 626 * 20 steps of the second half
        assert search.uniform_share == pytest.approx(0.9999 ** (2 * 626 * 20 / 10), abs=1e-3)


def at_step(schedule, step, epochs):
    return schedule.at(step / (626 * epochs))


def test_learning_rates_of_the_paper():
    """At steps of 2,048 images, 626 an epoch."""
    mobile, resnet = recipes.get("mobilenet_v2-211M"), recipes.get("resnet50-2.2G")
    search = mobile.search.lr
    assert search.at(0) == 0.2
    assert at_step(search, 1000, 40) == pytest.approx(0.5, rel=1e-3)
    assert search.at(1) == pytest.approx(0.08)
    assert (resnet.search.lr.at(0), resnet.search.lr.at(1)) == (0.5, pytest.approx(0.08))
    assert (mobile.retrain_epochs, resnet.retrain_epochs) == (250, 100)
    for recipe in (mobile, resnet):
        lr, epochs = recipe.retrain.lr, recipe.retrain_epochs
        assert lr.at(0) == 0.2
        assert at_step(lr, 1250, epochs) == pytest.approx(0.8, rel=5e-3)
        assert lr.at(1) == pytest.approx(0, abs=1e-9)
        assert (recipe.retrain.momentum, recipe.retrain.label_smoothing) == (0.9, 0.1)
    assert (mobile.retrain.weight_decay, resnet.retrain.weight_decay) == (4e-5, 1e-4)


@pytest.mark.parametrize("name", ["digits", "cifar"])
def test_small_recipes_suit_any_network(name):
    recipe = recipes.get(name)
    assert recipe.model is None
    assert recipe.budget is None
    assert recipe.model_options == {}
    assert recipe.divisor == 8


def test_recipes_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipes.get("digits").batch_size = 1
