from __future__ import annotations

import copy
from dataclasses import replace
from math import sqrt
from typing import Any

import numpy as np
import pytest
import torch

import dmcp
from dmcp.errors import CheckpointError
from dmcp.models import build
from dmcp.report import Chains


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_costs_are_those_of_the_graph(chains: Chains) -> None:
    model = build("mobilenet_v2", num_classes=10, width=0.25, small_images=True)
    macs = dmcp.cost(dmcp.trace(model, torch.zeros(2, 3, 16, 16)), "macs")
    widths = chains.draw(50, generator())
    assert chains.costs["macs"].of(widths).tolist() == macs.of_many(torch.tensor(widths)).tolist()


def test_the_sample_has_the_analytic_mean_and_deviation(chains: Chains) -> None:
    count = 20_000
    cost = chains.costs["macs"]
    samples = cost.of(chains.draw(count, generator()))
    assert abs(samples.mean() - cost.expected) < 5 * cost.deviation / sqrt(count)
    assert samples.std() == pytest.approx(cost.deviation, rel=0.05)


def test_the_expected_widths_are_the_samples_means(chains: Chains) -> None:
    widths = chains.draw(20_000, generator())
    names, expected = list(chains.units), chains.expected_widths()
    assert expected.keys() == chains.choices.keys()
    for name, mean in expected.items():
        column = widths[:, names.index(name)]
        assert set(column) <= set(chains.choices[name])
        assert abs(column.mean() - mean) <= 5 * column.std() / sqrt(len(column))


def test_units_that_are_not_searched_stay_whole(chains: Chains) -> None:
    (name,) = chains.units.keys() - chains.choices.keys()
    widths = chains.draw(10, generator())
    assert set(widths[:, list(chains.units).index(name)]) == {chains.units[name]}


def test_the_same_seed_draws_the_same(chains: Chains) -> None:
    first, again, other = (chains.draw(100, generator(seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_certain_chains_draw_one_structure(chains: Chains) -> None:
    """Probabilities of exactly 1 and 0."""
    retain = {name: np.zeros_like(q) for name, q in chains.retain.items()}
    first, *_ = retain
    retain[first][:2] = 1
    widths = replace(chains, retain=retain).draw(100, generator())
    grid = {name: choices[2 * (name == first)] for name, choices in chains.choices.items()}
    assert [list(row) for row in np.unique(widths, axis=0)] == [
        [grid.get(name, full) for name, full in chains.units.items()]
    ]


def test_structures_near_the_budget(chains: Chains) -> None:
    widths, tolerance = chains.draw_near_budget(500, 0.01, generator())
    cost = chains.costs["macs"]
    assert tolerance == 0.01
    assert len(widths) == 500
    assert np.abs(cost.of(widths) / cost.budget - 1).max() <= 0.01


def test_the_tolerance_widens_where_nothing_is_near(chains: Chains) -> None:
    cost = replace(chains.costs["macs"], budget=1000 * chains.costs["macs"].budget)
    widths, tolerance = replace(chains, costs={"macs": cost}).draw_near_budget(
        500, 0.01, generator()
    )
    assert tolerance == 1.28
    assert len(widths) == 500


def test_of_several_bounds_the_tightest_counts(chains: Chains) -> None:
    macs = chains.costs["macs"]
    twice = replace(chains, costs={"params": replace(macs, budget=2 * macs.budget), "macs": macs})
    widths, _ = twice.draw_near_budget(100, 0.01, generator())
    assert np.abs(macs.of(widths) / macs.budget - 1).max() <= 0.01


def broken(description: dict[str, Any], how: str) -> Any:
    data = copy.deepcopy(description)
    unit = next(iter(data["retain"]))
    match how:
        case "no costs":
            data["costs"] = {}
        case "a part is missing":
            del data["retain"]
        case "a unit is missing":
            del data["retain"][unit]
        case "too few probabilities":
            data["retain"][unit] = data["retain"][unit][1:]
        case "gates that are no chain":
            data["retain"][unit] = data["retain"][unit][::-1]
        case "a probability above one":
            data["retain"][unit][0] = 1.5
        case "not a number":
            data["retain"][unit][0] = float("nan")
        case "a cost that is not a number":
            data["costs"]["macs"]["coefficients"][0][1] = float("nan")
        case "a cost that is a path":
            data["costs"] = {"../macs": data["costs"]["macs"]}
        case "another network's cost":
            data["costs"]["macs"]["coefficients"] = [[1.0]]
        case "what another method found":
            return {"accuracy": 0.5}
    return data


@pytest.mark.parametrize(
    "how",
    [
        "no costs",
        "a part is missing",
        "a unit is missing",
        "too few probabilities",
        "gates that are no chain",
        "a probability above one",
        "not a number",
        "a cost that is not a number",
        "a cost that is a path",
        "another network's cost",
        "what another method found",
    ],
)
def test_a_file_of_something_else(description: dict[str, Any], write: Any, how: str) -> None:
    path = write("search.json", broken(description, how))
    with pytest.raises(CheckpointError, match=r"search\.json does not hold the chains of a search"):
        Chains.read(path)
