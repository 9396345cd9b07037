from __future__ import annotations

from statistics import mean, stdev
from typing import Any

import pytest

from dmcp.report import draw_front
from dmcp.report.figure import styles

DENSE = {"method": "dense", "track": None, "budget": None, "macs": 5_000_000, "top1": 0.99}


def record(method: str, track: str, budget: str, macs: int, top1: float) -> dict[str, Any]:
    return {"method": method, "track": track, "budget": budget, "macs": macs, "top1": top1}


RECORDS = [
    DENSE,
    record("dmcp", "A", "50%", 2_500_000, 0.98),
    record("dmcp", "A", "50%", 2_480_000, 0.97),
    record("dmcp", "A", "25%", 1_250_000, 0.95),
    record("dmcp", "A", "25%", 1_250_000, 0.91),
    record("uniform", "A", "25%", 1_250_000, 0.90),
    record("dmcp", "C", "50%", 2_500_000, 0.985),
]


def drawn(axes: Any) -> dict[str, tuple[list[float], list[float], list[float]]]:
    """Method -> places, means, and half the lengths of the bars there are."""
    found = {}
    for container in axes.containers:
        line, _, (bars,) = container
        ends = [segment[:, 1] for segment in bars.get_segments() if len(segment)]
        halves = [float(high - low) / 2 for low, high in ends]
        found[container.get_label()] = (list(line.get_xdata()), list(line.get_ydata()), halves)
    return found


def test_means_and_deviations_over_seeds() -> None:
    figure = draw_front(RECORDS, "Digits")
    found = drawn(figure.axes[0])
    assert found.keys() == {"dmcp", "uniform", "dense"}
    _, heights, bars = found["dmcp"]
    assert heights == pytest.approx([mean((95, 91)), mean((98, 97))])
    assert bars == pytest.approx([stdev((95, 91)), stdev((98, 97))])
    assert found["uniform"][1:] == (pytest.approx([90]), [])
    assert found["dense"] == ([5.0], pytest.approx([99]), [])
    assert figure.get_suptitle() == "Digits"


def test_methods_stand_side_by_side_about_their_macs() -> None:
    places = {name: line[0] for name, line in drawn(draw_front(RECORDS).axes[0]).items()}
    assert places["dmcp"][0] < 1.25 < places["uniform"][0]
    assert places["dmcp"] == pytest.approx([1.25, 2.49], abs=0.02)
    (alone,) = draw_front([r for r in RECORDS if r["method"] != "uniform"]).axes[:1]
    assert drawn(alone)["dmcp"][0] == pytest.approx([1.25, 2.49])


def test_tracks_are_drawn_apart_and_the_full_network_in_all() -> None:
    figure = draw_front(RECORDS)
    first, second = figure.axes
    assert (first.get_title(), second.get_title()) == ("Track A", "Track C")
    assert drawn(second).keys() == {"dmcp", "dense"}
    assert {axes.get_xscale() for axes in figure.axes} == {"linear"}
    assert first.get_xlabel() == "MACs (M), methods side by side"
    assert first.get_ylabel() == "top-1 (%), mean ± standard deviation of 1 to 2 seeds"
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["dmcp", "uniform", "dense"]


def test_a_single_seed_and_a_single_method() -> None:
    (axes,) = draw_front([DENSE, RECORDS[1]]).axes
    assert axes.get_ylabel() == "top-1 (%), one seed"
    assert axes.get_xlabel() == "MACs (M)"


def test_nothing_but_the_full_network() -> None:
    (axes,) = draw_front([DENSE]).axes
    assert list(drawn(axes)) == ["dense"]


def test_fourteen_methods_look_different() -> None:
    looks = styles([f"method {number}" for number in range(14)])
    assert len({(look.colour, look.hollow) for look in looks.values()}) == 14
    assert len({look.marker for look in looks.values()}) == 14
    assert styles(["a", "b", "a"]).keys() == {"a", "b"}
