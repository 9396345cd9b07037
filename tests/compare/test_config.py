from __future__ import annotations

from dataclasses import replace

import pytest

from dmcp.errors import BudgetError, ConfigError


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ("uniform", "magic")}, "unknown method 'magic'"),
        ({"methods": ()}, "methods must be some"),
        ({"methods": ("uniform", "uniform")}, "each once"),
        ({"tracks": ("A", "D")}, "tracks must be among A, B, C, got 'D'"),
        ({"seeds": (0, -1)}, "seeds must not be negative, got -1"),
        ({"seeds": (1, 1)}, "seeds must be some, each once"),
        ({"preset": "long"}, "preset must be one of short, paper, got 'long'"),
    ],
)
def test_refuses(config, change, message):
    with pytest.raises(ConfigError, match=message):
        replace(config, **change)


def test_refuses_a_malformed_budget(config):
    with pytest.raises(BudgetError, match="half"):
        replace(config, budgets=("half",))


def test_needs_images_that_judge_structures(config):
    with pytest.raises(ConfigError, match="holdout must be above 0"):
        replace(config, network=replace(config.network, holdout=0.0))


@pytest.mark.parametrize("name", ["search_epochs", "retrain_epochs"])
def test_refuses_no_epochs(config, name):
    with pytest.raises(ConfigError, match=f"{name} must be at least 1, got 0"):
        replace(config, recipe=replace(config.recipe, **{name: 0}))


def test_methods_seeds_and_tracks_may_be_added_and_nothing_else(config):
    added = replace(config, methods=("dmcp",), seeds=(3, 4), tracks=("C", "A"))
    assert added.identity() == config.identity()
    assert replace(config, budgets=("40%",)).identity() != config.identity()
    two = replace(config, budgets=("50%", "25%")).identity()
    assert two == replace(config, budgets=("25%", "50%")).identity()
    other = replace(config.recipe, retrain_epochs=2)
    assert replace(config, recipe=other).identity() != config.identity()
