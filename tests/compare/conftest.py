from __future__ import annotations

from dataclasses import replace

import pytest

from dmcp import recipes
from dmcp.compare import CompareConfig, Place
from dmcp.runs import NetworkConfig


@pytest.fixture
def config():
    """A comparison that takes seconds: one epoch of everything on the digits."""
    recipe = replace(recipes.get("digits"), search_epochs=2, retrain_epochs=1, divisor=2)
    network = NetworkConfig(
        "resnet18", "digits", batch_size=256, model_options={"width": 0.125}, holdout=0.1
    )
    return CompareConfig(network, recipe, ("uniform", "l1"), ("50%",), (0,), ("A",))


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path / "comparison", "cpu", threads=1)
