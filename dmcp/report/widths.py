"""Structures against the full network, unit by unit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from dmcp.report.figure import FULL, new_figure, styles

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_widths(
    structures: Mapping[str, Mapping[str, float]], full: Mapping[str, int], title: str = ""
) -> Figure:
    """The channels that structures keep in every unit, in numbers and as shares.

    Args:
        structures: label -> unit -> width; units left out are whole.
        full: unit -> full width, in the order to draw them.
        title: above the figure.
    """
    places = np.arange(len(full))
    figure = new_figure(max(6.4, 2 + 0.22 * len(full)), 6.4)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    above.bar(places, list(full.values()), width=0.9, color=FULL, label="full network")
    below.bar(places, [100.0] * len(full), width=0.9, color=FULL)
    for (label, widths), style in zip(structures.items(), styles(structures).values(), strict=True):
        kept = np.array([widths.get(unit, channels) for unit, channels in full.items()])
        shares = 100 * kept / np.array(list(full.values()))
        for axes, values in ((above, kept), (below, shares)):
            axes.plot(
                places,
                values,
                drawstyle="steps-mid",
                color=style.colour,
                linestyle="--" if style.hollow else "-",
                linewidth=1.2,
                marker=style.marker,
                markersize=4.5,
                markerfacecolor="white" if style.hollow else style.colour,
                label=label,
            )
    above.set_ylabel("channels")
    below.set_ylabel("channels kept (%)")
    below.set_ylim(0, 105)
    below.set_xlim(-0.7, len(full) - 0.3)
    below.set_xticks(places, list(full), rotation=90, fontsize=8)
    if title:
        figure.suptitle(title, fontsize=11)
    handles, labels = above.get_legend_handles_labels()
    columns = 4 if len(full) > 20 else 3
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9
    )
    return figure
