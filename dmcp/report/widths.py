"""Structures against the full network, unit by unit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from dmcp.report.figure import LIGHT, NARROW, WIDE, Look, elided, new_figure, styled, styles

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_ACROSS = 40
"""Units that stand side by side; more are listed from top to bottom, as on a phone."""


@styled
def draw_widths(
    structures: Mapping[str, Mapping[str, float]],
    full: Mapping[str, int],
    title: str = "",
    *,
    look: Look = LIGHT,
) -> Figure:
    """The channels that structures keep in every unit, in numbers and as shares.

    Args:
        structures: label -> unit -> width; units left out are whole.
        full: unit -> full width, in the order to draw them.
        title: above the figure.
        look: how it looks.
    """
    down = look.narrow or len(full) > _MOST_ACROSS
    if down:
        size = (NARROW, 1.5 + 0.2 * len(full)) if look.narrow else (WIDE, 1.2 + 0.2 * len(full))
        figure = new_figure(*size)
        numbers, shares = figure.subplots(1, 2, sharey=True)
    else:
        figure = new_figure(WIDE, 5.6)
        numbers, shares = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    whole = np.array(list(full.values()), dtype=float)
    for axes, values in ((numbers, whole), (shares, np.full(len(full), 100.0))):
        bars = axes.barh if down else axes.bar
        bars(range(len(full)), values, 0.9, color=look.full, label="full network")
    for (label, widths), style in zip(
        structures.items(), styles(structures, look).values(), strict=True
    ):
        kept = np.array([widths.get(unit, channels) for unit, channels in full.items()])
        looks: dict[str, Any] = {
            "color": style.colour,
            "linestyle": "--" if style.hollow else "-",
            "marker": style.marker,
            "markerfacecolor": look.paper if style.hollow else style.colour,
            "label": label,
        }
        for axes, values in ((numbers, kept), (shares, 100 * kept / whole)):
            _draw_line(axes, values, looks, down=down)
    names = [elided(unit, 16 if look.narrow else 30) for unit in full]
    _label(numbers, shares, names, down=down)
    if title:
        figure.suptitle(title, fontsize="medium")
    handles, labels = numbers.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2 if look.narrow else 4)
    return figure


def _draw_line(axes: Any, values: Any, looks: Mapping[str, Any], *, down: bool) -> None:
    places = np.arange(len(values))
    if down:
        # There is no such step line along the other axis: markers do.
        axes.plot(values, places, **{**looks, "linewidth": 0.6, "markersize": 4})
    else:
        axes.plot(places, values, drawstyle="steps-mid", **looks, linewidth=1.2, markersize=4.5)


def _label(numbers: Any, shares: Any, names: list[str], *, down: bool) -> None:
    count = len(names)
    if down:
        numbers.set_yticks(range(count), names)
        numbers.set_ylim(count - 0.3, -0.7)  # the first layer on top
        numbers.set_xlabel("channels")
        shares.set_xlabel("kept (%)")
        shares.set_xlim(0, 105)
        for axes in (numbers, shares):
            axes.locator_params(axis="x", nbins=4)
        return
    numbers.set_ylabel("channels")
    shares.set_ylabel("channels kept (%)")
    shares.set_ylim(0, 105)
    shares.set_xlim(-0.7, count - 0.3)
    shares.set_xticks(range(count), names, rotation=90)
