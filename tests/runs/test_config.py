from __future__ import annotations

import json
from dataclasses import replace

import pytest

from dmcp.errors import ConfigError
from dmcp.runs import TrainConfig
from dmcp.runs.config import to_json


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("search_epochs", 0),
        ("retrain_epochs", -1),
        ("retrain", "fresh"),
        ("arch_data", "test"),
    ],
)
def test_search_refuses(configure, field, value):
    with pytest.raises(ConfigError, match=f"{field} must .* got {value!r}"):
        configure(**{field: value})


@pytest.mark.parametrize(("field", "value"), [("batch_size", 1), ("seed", -1)])
def test_network_refuses(network, field, value):
    with pytest.raises(ConfigError, match=f"{field} must .* got {value}"):
        replace(network, **{field: value})


def test_train_refuses_no_epochs(network, configure):
    with pytest.raises(ConfigError, match="epochs must be at least 1, got 0"):
        TrainConfig(network, 0, configure().train)


def test_architecture_steps_on_a_holdout_need_one(network, configure):
    with pytest.raises(ConfigError, match="holdout"):
        configure(network=replace(network, holdout=0.0), arch_data="holdout")


def test_json_holds_every_option(network, configure):
    search = json.loads(json.dumps(to_json(configure(retrain="distil"))))
    assert search["kind"] == "search"
    assert search["network"]["model_options"] == {"width": 0.125}
    assert search["budget"] == {"macs": "50%", "params": None, "memory": None}
    assert search["search"]["arch_lr"]["peak"] == configure().search.arch_lr.peak
    assert search["retrain"] == "distil"
    train = to_json(TrainConfig(network, 3, configure().train, {"conv1": 4}))
    assert (train["kind"], train["epochs"], train["widths"]) == ("train", 3, {"conv1": 4})
    assert "search" not in train
