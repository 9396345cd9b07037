from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dmcp import models, recipes
from dmcp.recipes import PUBLISHED, PublishedResult

FULL = {"mobilenet_v2": 72.3, "resnet18": 70.1, "resnet50": 76.6}


def row(network: str, method: str, macs: int, *, distilled: bool = False) -> PublishedResult:
    found = [
        result
        for result in PUBLISHED
        if (result.network, result.method, result.macs, result.distilled)
        == (network, method, macs, distilled)
    ]
    assert len(found) == 1
    return found[0]


def test_every_row_is_there() -> None:
    assert Counter((r.network, r.method, r.distilled) for r in PUBLISHED) == {
        ("mobilenet_v2", "uniform", False): 4,
        ("mobilenet_v2", "metapruning", False): 3,
        ("mobilenet_v2", "amc", False): 1,
        ("mobilenet_v2", "autoslim", True): 2,
        ("mobilenet_v2", "dmcp", False): 6,
        ("mobilenet_v2", "dmcp", True): 2,
        ("resnet18", "uniform", False): 1,
        ("resnet18", "fpgm", False): 1,
        ("resnet18", "dmcp", False): 1,
        ("resnet50", "uniform", False): 5,
        ("resnet50", "fpgm", False): 1,
        ("resnet50", "sfp", False): 1,
        ("resnet50", "metapruning", False): 3,
        ("resnet50", "autoslim", True): 3,
        ("resnet50", "dmcp", False): 4,
    }


def test_printed_sums() -> None:
    """A slip in transcribing a number would change them."""
    sums = {
        network: (
            round(sum(r.top1 for r in PUBLISHED if r.network == network), 1),
            round(sum(r.delta or 0.0 for r in PUBLISHED if r.network == network), 1),
            sum(r.macs for r in PUBLISHED if r.network == network),
        )
        for network in FULL
    }
    assert sums == {
        "mobilenet_v2": (1227.3, -71.7, 3_043 * 10**6),
        "resnet18": (207.7, -2.8, 3_880 * 10**6),
        "resnet50": (1256.0, -45.6, 34_456 * 10**6),
    }


def test_full_networks_have_no_difference() -> None:
    full = {r.network: r.top1 for r in PUBLISHED if r.delta is None}
    assert full == FULL
    assert all((r.delta is None) == (r.width == 1) for r in PUBLISHED)


def test_differences_of_uniform_and_dmcp_are_to_the_papers_full_network() -> None:
    wrong = {
        (r.network, r.method, r.macs): r.base
        for r in PUBLISHED
        if r.method in ("uniform", "dmcp") and r.base != FULL[r.network]
    }
    assert wrong == {("resnet50", "dmcp", 278_000_000): 76.4}
    assert "10.2 below 76.6" in row("resnet50", "dmcp", 278_000_000).note


def test_differences_of_the_others_are_to_several_full_networks() -> None:
    bases = {(r.network, r.method): set[float]() for r in PUBLISHED}
    for result in PUBLISHED:
        bases[result.network, result.method].add(result.base)
    assert bases["mobilenet_v2", "metapruning"] == {72.0}
    assert bases["mobilenet_v2", "amc"] == {71.8}
    assert bases["mobilenet_v2", "autoslim"] == {71.8}
    assert bases["resnet18", "fpgm"] == {70.3}
    assert bases["resnet50", "fpgm"] == {76.2}
    for method in ("sfp", "metapruning", "autoslim"):
        assert bases["resnet50", method] == {76.6}
    other = [r for r in PUBLISHED if r.method not in ("uniform", "dmcp")]
    assert all("own paper" in r.note for r in other if r.base != FULL[r.network])


@pytest.mark.parametrize(
    ("network", "method", "macs", "said"),
    [
        ("mobilenet_v2", "uniform", 97_000_000, "970M"),
        ("mobilenet_v2", "autoslim", 300_000_000, "305M"),
        ("mobilenet_v2", "autoslim", 211_000_000, "207M"),
        ("mobilenet_v2", "dmcp", 211_000_000, "72.4"),
        ("mobilenet_v2", "dmcp", 97_000_000, "more than 97M"),
        ("resnet18", "fpgm", 1_040_000_000, "1.063G"),
        ("resnet18", "dmcp", 1_040_000_000, "1.043G"),
        ("resnet50", "uniform", 3_000_000_000, "2.950G"),
        ("resnet50", "sfp", 2_400_000_000, "-1.5"),
        ("resnet50", "metapruning", 2_300_000_000, "2.0G"),
        ("resnet50", "metapruning", 1_100_000_000, "1.0G"),
        ("resnet50", "autoslim", 1_100_000_000, "1.0G"),
    ],
)
def test_errata_are_noted(network: str, method: str, macs: int, said: str) -> None:
    assert said in row(network, method, macs, distilled=method == "autoslim").note


@pytest.mark.parametrize("network", FULL)
def test_uniform_rows_have_the_macs_of_their_width(network: str) -> None:
    """To what one digit after the point can say."""
    for result in PUBLISHED:
        if result.network != network or result.width is None:
            continue
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            models.build(network, width=result.width).eval()(torch.zeros(1, 3, 224, 224))
        macs = counter.get_total_flops() // 2
        assert macs == pytest.approx(result.macs, rel=0.05), result


def test_there_is_a_recipe_for_every_budget_of_dmcp() -> None:
    named = {(r.network, r.macs) for r in PUBLISHED if r.method == "dmcp"}
    with_budget = [recipe for name in recipes.names() if (recipe := recipes.get(name)).budget]
    suffixes = {"M": 10**6, "G": 10**9}
    assert named == {
        (recipe.model, round(float(recipe.budget[:-1]) * suffixes[recipe.budget[-1]]))
        for recipe in with_budget
        if recipe.budget
    }


def test_rows_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PUBLISHED[0].top1 = 100.0  # type: ignore[misc]
