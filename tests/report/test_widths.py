from __future__ import annotations

import pytest

from dmcp.report import draw_widths

FULL = {"stem": 16, "body": 64, "head": 100}


def test_structures_against_the_full_network() -> None:
    figure = draw_widths({"dmcp": {"stem": 4, "body": 64}, "uniform": {"body": 16}}, FULL, "Both")
    above, below = figure.axes
    assert [bar.get_height() for bar in above.containers[0]] == [16, 64, 100]
    assert [list(line.get_ydata()) for line in above.lines] == [[4, 64, 100], [16, 16, 100]]
    assert [list(line.get_ydata()) for line in below.lines] == [[25, 100, 100], [100, 25, 100]]
    assert {line.get_drawstyle() for line in above.lines} == {"steps-mid"}
    assert [text.get_text() for text in below.get_xticklabels()] == list(FULL)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["dmcp", "uniform", "full network"]
    assert (above.get_ylabel(), below.get_ylabel()) == ("channels", "channels kept (%)")
    assert figure.get_suptitle() == "Both"


def test_expected_widths_need_not_be_whole() -> None:
    above, below = draw_widths({"expected": {"stem": 4.5}}, FULL).axes
    assert above.lines[0].get_ydata()[0] == 4.5
    assert below.lines[0].get_ydata()[0] == pytest.approx(28.125)
