"""Accuracy against MACs, method by method."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from dmcp.report.figure import Style, new_figure, scale, styles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DENSE = "dense"
"""The method of the records of the full network."""

_APART = 0.005
"""Distance between methods of the same MACs, as a share of the axis."""


@dataclass(frozen=True)
class _Point:
    """A method at a budget: means over its seeds, and the standard deviation of several."""

    macs: float
    top1: float
    deviation: float
    seeds: int


def draw_front(records: Iterable[Mapping[str, Any]], title: str = "") -> Figure:
    """Accuracy against MACs: a line for each method with a point for each budget, the mean over
    seeds with their standard deviation; the full network is a star.

    Methods that meet the same budget would hide each other, so each is moved a little along the
    axis of the MACs.

    Args:
        records: one for each seed: ``method``, ``track``, ``budget``, ``macs`` and ``top1``, a
            share. Tracks, the ways networks were trained, are drawn side by side. Records of the
            method ``"dense"`` are the full network; those without a track are in all of them.
        title: above the figure.
    """
    records = list(records)
    tracks = sorted({record["track"] for record in records if record["track"] is not None})
    panels = tracks or [None]
    look = styles(r["method"] for r in records if r["method"] != DENSE)
    figure = new_figure(1.9 + 5 * len(panels), 6)
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)
    size, suffix = scale(max((record["macs"] for record in records), default=1))
    points = []
    for axes, track in zip(grid.flat, panels, strict=True):
        lines = _lines([r for r in records if r["track"] in (track, None)], size)
        points += [point for line in lines.values() for point in line]
        _draw_track(axes, lines, look)
        axes.set_xlabel(f"MACs ({suffix}){', methods side by side' if len(look) > 1 else ''}")
        axes.set_title("" if track is None else f"Track {track}", fontsize=11)
        axes.grid(axis="y", color="0.9")
    grid.flat[0].set_ylabel(f"top-1 (%), {_spread({point.seeds for point in points})}")
    if title:
        figure.suptitle(title, fontsize=11)
    handles = {
        label: handle
        for axes in grid.flat
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    labels = [name for name in (*look, DENSE) if name in handles]
    figure.legend(
        [handles[label] for label in labels],
        labels,
        loc="outside right upper",
        frameon=False,
        fontsize=9,
    )
    return figure


def _lines(records: Sequence[Mapping[str, Any]], size: float) -> dict[str, list[_Point]]:
    """Method -> its points, ascending in MACs."""
    seeds: dict[tuple[str, Any], list[Mapping[str, Any]]] = defaultdict(list)
    for record in records:
        seeds[record["method"], record["budget"]].append(record)
    lines: dict[str, list[_Point]] = defaultdict(list)
    for (method, _), group in seeds.items():
        top1 = [100 * record["top1"] for record in group]
        deviation = stdev(top1) if len(top1) > 1 else 0.0
        macs = mean(record["macs"] for record in group) / size
        lines[method].append(_Point(macs, mean(top1), deviation, len(group)))
    return {name: sorted(line, key=lambda point: point.macs) for name, line in lines.items()}


def _draw_track(
    axes: Axes, lines: Mapping[str, Sequence[_Point]], look: Mapping[str, Style]
) -> None:
    places = [point.macs for line in lines.values() for point in line]
    step = _APART * (max(places) - min(places)) if places else 0.0
    methods = [name for name in look if name in lines]
    for number, name in enumerate(methods):
        style, line = look[name], lines[name]
        axes.errorbar(
            [point.macs + (number - (len(methods) - 1) / 2) * step for point in line],
            [point.top1 for point in line],
            yerr=[point.deviation for point in line],
            color=style.colour,
            linestyle="--" if style.hollow else "-",
            linewidth=1.1,
            marker=style.marker,
            markersize=5.5,
            markerfacecolor="white" if style.hollow else style.colour,
            capsize=2.5,
            label=name,
        )
    if DENSE in lines:
        axes.errorbar(
            [point.macs for point in lines[DENSE]],
            [point.top1 for point in lines[DENSE]],
            yerr=[point.deviation for point in lines[DENSE]],
            color="black",
            linestyle="none",
            marker="*",
            markersize=11,
            capsize=2.5,
            label=DENSE,
        )


def _spread(seeds: set[int]) -> str:
    """What the points and bars are."""
    if not seeds or max(seeds) == 1:
        return "one seed"
    count = f"{max(seeds)}" if len(seeds) == 1 else f"{min(seeds)} to {max(seeds)}"
    return f"mean ± standard deviation of {count} seeds"
