from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dmcp.report import DARK, LIGHT, Run, draw_curves, draw_expected_costs
from dmcp.report.curves import POINTS


def test_losses_and_accuracies_of_all_phases(run_folder: Path) -> None:
    run = Run.read(run_folder)
    assert run.curves is not None
    figure = draw_curves(run.curves)
    loss, accuracy = figure.axes
    assert [line.get_label() for line in loss.lines] == ["search", "search: sub-networks", "dmcp"]
    assert loss.lines[0].get_ydata() == pytest.approx(2 / np.arange(1, 41))
    (drawn,) = accuracy.lines
    assert set(drawn.get_ydata()) == {50}
    assert loss.lines[0].get_color() == loss.lines[1].get_color() != loss.lines[2].get_color()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        line.get_label() for line in loss.lines
    ]


def test_long_curves_are_averaged() -> None:
    steps = np.arange(1, 1001.0)
    (axes,) = draw_curves({"dense": {"loss": (steps, 3 * steps)}}).axes
    drawn_steps, drawn = axes.lines[0].get_data()
    assert len(drawn) == 250 <= POINTS
    assert drawn == pytest.approx(3 * drawn_steps)
    assert drawn_steps[0] == 2.5


@pytest.mark.parametrize("look", [LIGHT, DARK.on_phone])
def test_expected_costs_against_their_budgets(look) -> None:  # type: ignore[no-untyped-def]
    steps = np.array([1.0, 2.0])
    curves = {
        "macs": (steps, np.array([3e6, 2e6])),
        "latency": (steps, np.array([5.0, 4.0])),
    }
    macs, latency = draw_expected_costs(curves, {"macs": 1.5e6}, look=look).axes
    assert macs.lines[0].get_ydata() == pytest.approx([3, 2])
    assert macs.lines[1].get_ydata() == pytest.approx([1.5, 1.5])
    assert [text.get_text() for text in macs.texts] == ["budget 1.5M"]
    assert (macs.get_ylabel(), latency.get_ylabel()) == ("E[MACs] (M)", "E[latency] (ms)")
    assert len(latency.lines) == 1
    assert not latency.texts
