from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from math import sqrt
from typing import Any

import numpy as np
import pytest

from dmcp.errors import MissingDependencyError
from dmcp.report import Chains, draw_channels, draw_costs


def heights(axes: Any) -> list[float]:
    return [bar.get_height() for bar in axes.containers[0]]


def legend(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_costs(chains: Chains) -> None:
    figure = draw_costs(chains)
    (axes,) = figure.axes
    cost = chains.costs["macs"]
    assert sum(heights(axes)) == 3000
    expected, budget, sampled = (line.get_xdata()[0] for line in axes.lines)
    assert expected == pytest.approx(cost.expected / 1e3)
    assert budget == pytest.approx(cost.budget / 1e3)
    assert abs(sampled - expected) < 5 * cost.deviation / 1e3 / sqrt(3000)
    band = axes.patches[-1].get_extents().transformed(axes.transData.inverted())
    assert band.x0 == pytest.approx((cost.expected - cost.deviation) / 1e3)
    assert band.x1 == pytest.approx((cost.expected + cost.deviation) / 1e3)
    assert axes.get_xlabel() == "MACs (K)"
    assert axes.get_ylabel() == "structures"
    assert "3,000 structures" in figure.get_suptitle()
    labels = legend(figure)
    for label in ("± standard deviation", "expected by the chains", "budget", "mean of the sample"):
        assert sum(text.startswith(label) for text in labels) == 1
    assert f"budget ({cost.budget / 1e3:.4g}K)" in labels


def test_costs_of_another_metric_and_number(chains: Chains) -> None:
    cost = replace(chains.costs["macs"], budget=900.0)
    (axes,) = draw_costs(replace(chains, costs={"params": cost}), "params", count=70).axes
    assert sum(heights(axes)) == 70
    assert axes.get_xlabel() == "parameters"


def test_costs_of_certain_chains(chains: Chains) -> None:
    """All structures are the same one."""
    certain = replace(chains, retain={name: np.ones_like(q) for name, q in chains.retain.items()})
    (axes,) = draw_costs(certain).axes
    assert sorted(heights(axes))[-2:] == [0, 3000]


def test_channels_of_twelve_units(chains: Chains) -> None:
    figure = draw_channels(chains)
    shown = [axes.get_title() for axes in figure.axes]
    order = list(chains.choices)
    places = [order.index(unit) for unit in shown]
    assert len(shown) == 12
    assert (places[0], places[-1]) == (0, len(order) - 1)
    assert {b - a for a, b in pairwise(places)} <= {2, 3}
    assert figure.get_suptitle() == "Channels of 3,000 structures within ± 1 % of the budget"
    assert (figure.get_supxlabel(), figure.get_supylabel()) == ("channels", "structures")


def test_bars_stand_at_the_choices(chains: Chains) -> None:
    widths, _ = chains.draw_near_budget(3000, 0.01, np.random.default_rng(0))
    names = list(chains.units)
    for axes in draw_channels(chains).axes:
        unit = axes.get_title()
        bars = axes.containers[0]
        centres = [bar.get_x() + bar.get_width() / 2 for bar in bars]
        assert centres == pytest.approx(chains.choices[unit])
        column = widths[:, names.index(unit)]
        assert heights(axes) == [(column == choice).sum() for choice in chains.choices[unit]]
        assert sum(heights(axes)) == 3000


def test_channels_of_all_units(chains: Chains) -> None:
    visible = [axes for axes in draw_channels(chains, units=None).axes if axes.get_visible()]
    assert [axes.get_title() for axes in visible] == list(chains.choices)


def test_channels_far_from_the_budget_say_so(chains: Chains) -> None:
    cost = replace(chains.costs["macs"], budget=1000 * chains.costs["macs"].budget)
    figure = draw_channels(replace(chains, costs={"macs": cost}), count=100)
    assert figure.get_suptitle() == (
        "Channels of 100 structures within ± 128 % of the budget; none is within ± 1 %"
    )


def test_without_matplotlib(chains: Chains, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match=r"'matplotlib': pip install 'dmcp\[report\]'"):
        draw_costs(chains)
