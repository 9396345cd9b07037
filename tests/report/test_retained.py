from __future__ import annotations

import numpy as np
import pytest

from dmcp.report import Retained, draw_expected_widths, draw_retained
from dmcp.report.retained import expected_width

RETAINED = Retained(
    np.array([1, 5, 9]),
    {
        "a": np.array([[1.0, 1.0], [0.8, 0.4], [0.5, 0.0]]),
        "b": np.array([[1.0], [0.5], [0.25]]),
    },
)
CHOICES = {"a": (4, 8, 16), "b": (2, 10)}


def test_expected_widths() -> None:
    assert expected_width(RETAINED, CHOICES, "a") == pytest.approx([16, 4 + 3.2 + 3.2, 6])
    assert expected_width(RETAINED, CHOICES, "b") == pytest.approx([10, 6, 4])
    assert expected_width(RETAINED, None, "a") == pytest.approx([3, 2.2, 1.5])


def test_a_heat_map_of_every_unit() -> None:
    figure = draw_retained(RETAINED, CHOICES)
    a, b = (axes for axes in figure.axes if axes.get_title())
    assert (a.get_title(), b.get_title()) == ("a", "b")
    (mesh,) = a.collections
    # The base is always there; the other rows are the probabilities over the steps.
    np.testing.assert_allclose(mesh.get_array(), [[1, 1, 1], [1, 0.8, 0.5], [1, 0.4, 0]])
    edges = mesh.get_coordinates()
    assert edges[:, 0, 1].tolist() == [0, 4, 8, 16]
    assert edges[0, :, 0].tolist() == [1, 5, 9, 13]
    assert mesh.get_clim() == (0, 1)
    assert a.lines[0].get_ydata() == pytest.approx([16, 10.4, 6])
    assert a.get_ylim() == (0, 16)
    assert figure.get_supylabel() == "channels"


def test_groups_where_widths_are_not_known_yet() -> None:
    figure = draw_retained(RETAINED)
    assert figure.axes[0].get_ylim() == (0, 3)
    assert figure.get_supylabel() == "groups"


def test_some_units_or_all() -> None:
    many = Retained(RETAINED.steps, {str(n): RETAINED.of["b"] for n in range(14)})
    shown = [axes.get_title() for axes in draw_retained(many).axes if axes.get_title()]
    assert len(shown) == 12
    assert (shown[0], shown[-1]) == ("0", "13")
    every = draw_retained(many, units=None)
    assert sum(bool(axes.get_title()) for axes in every.axes) == 14


def test_expected_widths_of_all_units() -> None:
    axes, _ = draw_expected_widths(RETAINED, CHOICES).axes
    (mesh,) = axes.collections
    np.testing.assert_allclose(mesh.get_array(), [[100, 65, 37.5], [100, 60, 40]])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
    assert axes.get_ylim() == (1.5, -0.5)


def test_a_single_snapshot() -> None:
    one = Retained(np.array([7]), {"a": RETAINED.of["a"][:1]})
    assert draw_expected_widths(one, CHOICES).axes[0].get_xlim() == (7, 8)
