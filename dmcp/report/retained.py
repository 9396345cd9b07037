"""The chains over the steps of a search: what each unit's groups are retained with."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dmcp.errors import require
from dmcp.report.figure import (
    LIGHT,
    NARROW,
    WIDE,
    Look,
    elided,
    new_figure,
    spread,
    styled,
)
from dmcp.report.run import Retained

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Choices = Mapping[str, tuple[int, ...]]


@styled
def draw_retained(
    retained: Retained,
    choices: Choices | None = None,
    *,
    units: int | None = 12,
    look: Look = LIGHT,
) -> Figure:
    """The retain probability of every channel of units over the steps, and the expected width.

    Args:
        retained: the chains on the way.
        choices: unit -> widths, ascending; without it groups are drawn in the place of channels.
        units: how many units to show, spread evenly over the depth; None for all.
        look: how it looks.
    """
    shown = spread(list(retained.of), units)
    columns = 2 if look.narrow else 4
    rows = ceil(len(shown) / columns)
    figure = new_figure(NARROW if look.narrow else WIDE, 1.1 + 1.4 * rows)
    grid = figure.subplots(rows, columns, sharex=True, squeeze=False)
    mesh = None
    for axes, unit in zip(grid.flat, shown, strict=False):
        widths = _widths(retained, choices, unit)
        mesh = _draw_unit(axes, retained.steps, retained.of[unit], widths, look)
        axes.set_title(elided(unit, 22), fontsize="small")
    for axes in grid.flat[len(shown) :]:
        axes.set_visible(False)
    for axes in grid.flat[max(0, len(shown) - columns) : len(shown)]:
        axes.tick_params(labelbottom=True)  # also above an empty place
    grid.flat[0].locator_params(axis="x", nbins=3, integer=True)
    figure.supxlabel("step of the search", fontsize="medium")
    figure.supylabel("groups" if choices is None else "channels", fontsize="medium")
    if mesh is not None:
        _colour_bar(figure, mesh, grid, "probability that a channel is retained", look)
    figure.legend(grid.flat[0].lines, ["expected width"], loc="outside upper center")
    return figure


@styled
def draw_expected_widths(
    retained: Retained, choices: Choices | None = None, *, look: Look = LIGHT
) -> Figure:
    """The share of its channels that each unit is expected to keep, over the steps.

    Args:
        retained: the chains on the way.
        choices: unit -> widths, ascending, the last one full; without it groups are counted.
        look: how it looks.
    """
    expected = {unit: expected_width(retained, choices, unit) for unit in retained.of}
    shares = np.stack(
        [values / _widths(retained, choices, unit)[-1] for unit, values in expected.items()]
    )
    width = NARROW if look.narrow else WIDE
    figure = new_figure(width, 1.3 + 0.19 * len(shares))
    axes = figure.subplots()
    rows = np.arange(len(shares) + 1) - 0.5
    mesh = _heat_map(axes, retained.steps, rows, 100 * shares, look)
    mesh.set_clim(0, 100)
    axes.set_ylim(len(shares) - 0.5, -0.5)  # the first layer on top
    axes.set_yticks(range(len(shares)), [elided(u, 16 if look.narrow else 36) for u in expected])
    axes.tick_params(axis="y", length=0)
    axes.locator_params(axis="x", nbins=4 if look.narrow else 8, integer=True)
    axes.set_xlabel("step of the search")
    what = "groups" if choices is None else "channels"
    _colour_bar(figure, mesh, axes, f"{what} expected to be kept (%)", look)
    return figure


def expected_width(retained: Retained, choices: Choices | None, unit: str) -> NDArray[np.float64]:
    """The expected width of a unit at every step: [T]."""
    widths = _widths(retained, choices, unit)
    expected: NDArray[np.float64] = widths[0] + retained.of[unit] @ np.diff(widths)
    return expected


def _widths(retained: Retained, choices: Choices | None, unit: str) -> NDArray[np.float64]:
    """The widths of a unit, or its numbers of groups: [1 + G]."""
    if choices is None:
        return np.arange(1.0, 2 + retained.of[unit].shape[1])
    return np.array(choices[unit], dtype=np.float64)


def _draw_unit(axes: Any, steps: Any, retain: Any, widths: Any, look: Look) -> Any:
    base = np.ones((len(steps), 1))
    values = np.concatenate([base, retain], axis=1)
    mesh = _heat_map(axes, steps, np.concatenate([[0], widths]), values.T, look)
    mesh.set_clim(0, 1)
    expected = widths[0] + retain @ np.diff(widths)
    axes.plot(steps, expected, color=look.vermilion, linewidth=1.4)
    axes.set_ylim(0, widths[-1])
    axes.locator_params(axis="y", nbins=4, integer=True)
    return mesh


def _heat_map(axes: Any, steps: Any, edges: Any, values: Any, look: Look) -> Any:
    """Values [rows, T], each from its step to the next; one picture inside an SVG."""
    last = steps[-1] + (steps[-1] - steps[-2] if len(steps) > 1 else 1)
    mesh = axes.pcolormesh(
        np.append(steps, last),
        edges,
        values,
        cmap=_colour_map(look),
        rasterized=True,
        linewidth=0,
    )
    # Up to the last step, whose colour would have no room if it were the only one.
    axes.set_xlim(steps[0], steps[-1] if len(steps) > 1 else last)
    return mesh


def _colour_map(look: Look) -> Any:
    colors = require("matplotlib.colors", "report", "drawing a figure")
    return colors.LinearSegmentedColormap.from_list("retained", look.ramp)


def _colour_bar(figure: Figure, mesh: Any, axes: Any, label: str, look: Look) -> None:
    bar = figure.colorbar(
        mesh, ax=axes, location="top", aspect=30 if look.narrow else 60, fraction=0.05, label=label
    )
    bar.outline.set_visible(False)
