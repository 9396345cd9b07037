from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

from dmcp.errors import SearchWarning
from dmcp.search import Budget, MarkovNet, Search, SearchOptions, SearchWatch
from dmcp.search.watch import decided_share

STEPS = 1000
BEGUN, SETTLED = 500, 850
"""Steps after which α learns, and the bound is the budget."""


@pytest.fixture(scope="module")
def search() -> Search:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3))
    net = MarkovNet(model, torch.zeros(2, 3, 8, 8), groups=4, divisor=1)
    options = SearchOptions(warmup=0.5, anneal=0.7)
    return Search(net, Budget(macs="50%", params="90%"), STEPS, options)


def watch_costs(
    search: Search, ratio: Callable[[int], float], loss: Callable[[int], float] = lambda step: 1.0
) -> tuple[SearchWatch, list[int]]:
    """Show a search's E[cost] / budget and loss; returns the steps at which it warned, too."""
    bounds, watch, steps = search.targets.by_metric(), SearchWatch(search), []
    for step in range(10, STEPS + 1, 10):
        # The other bound is always met.
        expected = {"expected_macs": ratio(step) * bounds["macs"], "expected_params": 1.0}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            watch.record({"step": step, "loss": loss(step), "accuracy": 0.5, **expected})
        assert all(warning.category is SearchWarning for warning in caught)
        assert all(warning.filename == __file__ for warning in caught), "who fed it is shown"
        steps += [step] * len(caught)
    return watch, steps


def annealed(step: int, end: float = 1.0) -> float:
    """E / budget of a search that follows its bound from 1.8 down to ``end``."""
    done = min(max(step - BEGUN, 0) / (SETTLED - BEGUN), 1.0)
    return 1.8 * (end / 1.8) ** done


@pytest.mark.parametrize(
    "ratio",
    [
        annealed,
        lambda step: annealed(step, 0.97),
        lambda step: 0.3,
        # Behind its bound, but on the way: two per cent are what a group is worth.
        lambda step: annealed(step) + 0.3 * (STEPS - step) / STEPS,
        lambda step: annealed(step) + 0.015,
        lambda step: annealed(step) + 0.03 * math.sin(step + 2),
        # The end of an oscillation around the budget.
        lambda step: 1 + (0.5 if step < SETTLED else 0.01) * math.sin(step / 40),
    ],
)
def test_says_nothing_of_a_cost_that_comes_down(search, ratio):
    assert watch_costs(search, ratio)[0].warned == {}


def test_says_early_that_the_budget_is_out_of_reach(search):
    """Once, and once more what came of it."""
    watch, steps = watch_costs(search, lambda step: annealed(step, 1.3) - 1e-5 * step)
    assert list(watch.warned) == ["cost", "end"]
    early, end = steps
    assert SETTLED < early <= SETTLED + 100
    assert end == STEPS
    assert f"E[macs] is 29% above the budget at step {early} of 1000" in watch.warned["cost"]
    assert "E[macs] is 29% above the budget at the end" in watch.warned["end"]


def test_a_bound_that_still_falls_is_not_held_against_the_cost(search):
    """Of a search that stands still until it has fallen, and is fast then."""

    def late(step: int) -> float:
        return 1.8 - 0.8 * max(step - SETTLED, 0) / (STEPS - SETTLED)

    assert watch_costs(search, late)[0].warned == {}


def losses(rising: Callable[[int], float], since: int) -> Callable[[int], float]:
    """Falls from 2.3 to 0.2, with the noise of batches, and then rises."""
    return lambda step: (
        (0.2 + 2.1 * math.exp(-step / 100)) * (1 + 0.5 * math.sin(step * 7))
        + (rising(step - since) if step > since else 0.0)
    )


def test_says_that_the_loss_rises(search):
    watch, (step,) = watch_costs(search, annealed, losses(lambda n: 0.02 * n, since=600))
    assert list(watch.warned) == ["loss"]
    assert 650 <= step <= 750
    assert f"on average at step {step}" in watch.warned["loss"]


@pytest.mark.parametrize(
    "loss",
    [
        losses(lambda n: 0.0, since=0),
        # One bad batch, and a level that is a little higher, as after the end of a warm-up.
        losses(lambda n: 5.0 if n == 10 else 0.0, since=600),
        losses(lambda n: 0.1, since=600),
        # Almost nothing is a hundred times almost nothing.
        lambda step: 2.3 * 10 ** -(step / 100) + (0.02 if step > 800 else 0.0),
        lambda step: 7.0,
    ],
)
def test_says_nothing_of_the_noise_of_a_loss(search, loss):
    assert watch_costs(search, annealed, loss)[0].warned == {}


def chains(alpha: dict[str, list[float]]) -> dict[str, list[float]]:
    """q of every unit."""
    p = {unit: torch.tensor(a, dtype=torch.float64).sigmoid() for unit, a in alpha.items()}
    return {unit: p.cumprod(0).tolist() for unit, p in p.items()}


def watch_chains(
    search: Search, alpha: Callable[[int], dict[str, list[float]]], ratio: float = 0.9
) -> tuple[SearchWatch, list[int]]:
    bounds, watch, steps = search.targets.by_metric(), SearchWatch(search), []
    expected = {f"expected_{metric}": ratio * bound for metric, bound in bounds.items()}
    watch.record({"step": 1, "loss": 1.0, **expected})
    for step in range(5, STEPS + 1, 5):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            watch.record({"step": step, "retain": chains(alpha(step))})
        assert all(warning.category is SearchWarning for warning in caught)
        steps += [step] * len(caught)
    return watch, steps


def test_says_that_a_unit_is_saturated(search):
    """Every α that still matters is large: also those in front of a group that is gone."""
    watch, (step,) = watch_chains(
        search, lambda step: {"a": [0.5, -1.0], "b": [step / 50, -step / 50, 0.0], "c": [9.0, 1.0]}
    )
    assert list(watch.warned) == ["saturation"]
    assert 9 < step / 50 < 10
    assert (
        f"1 of 3 units are saturated at step {step} of 1000, b the first"
        in (watch.warned["saturation"])
    )


def test_decided_chains_are_not_saturated(search):
    def alpha(step):
        late = 20.0 if step >= 0.9 * STEPS else 6.0
        return {"a": [late, late, -late], "b": [6.0, 6.0, 6.0], "c": [20.0, 0.0]}

    assert watch_chains(search, alpha)[0].warned == {}


def test_says_that_all_chains_have_collapsed(search):
    watch, (step,) = watch_chains(
        search, lambda step: {unit: [-step / 100, 0.0] for unit in ("a", "b")}
    )
    assert list(watch.warned) == ["collapse"]
    assert 4.6 < step / 100 < 5


@pytest.mark.parametrize(
    ("ratio", "alpha"), [(1.2, {"a": [-7.0], "b": [-7.0]}), (0.8, {"a": [-7.0], "b": [0.0]})]
)
def test_a_narrow_search_has_not_collapsed(search, ratio, alpha):
    """The narrowest network may be what the budget is for; a unit may well lose its groups."""
    assert watch_chains(search, lambda step: alpha, ratio)[0].warned == {}


def test_watches_a_loop_of_ones_own():
    """With tensors as `Search.step` returns them, and the chains as they are."""
    layers = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(16, 4))
    net = MarkovNet(model, torch.zeros(2, 3, 8, 8), groups=4, divisor=1)
    search = Search(net, Budget(macs="50%"), 4, SearchOptions(warmup=0.0, start=0.99))
    watch = SearchWatch(search)

    def learn() -> None:
        for _ in range(search.steps):
            metrics = search.step(torch.randn(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64))
            watch.record({"step": search.step_index, **metrics})
            watch.record({"step": search.step_index, "retain": search.snapshot().retain()})

    with pytest.warns(SearchWarning, match="at the end of the search") as caught:
        learn()
    assert [str(warning.message) for warning in caught] == [watch.warned["end"]]


def test_the_share_of_groups_that_are_decided():
    assert decided_share({"a": [0.95, 0.5, 0.05], "b": [0.85]}) == 0.5
    assert decided_share({"a": [1.0, 0.0]}) == 1.0
