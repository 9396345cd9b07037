"""Accuracy against MACs, method by method."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import nan
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from dmcp.report.figure import (
    LIGHT,
    NARROW,
    WIDE,
    Look,
    Style,
    in_units,
    new_figure,
    scale,
    styled,
    styles,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DENSE = "dense"
"""The method of the records of the full network."""

_APART = 0.005
"""Distance between methods of the same MACs, as a share of the axis."""


@dataclass(frozen=True)
class _Point:
    """A method at a budget: means over its seeds, and the standard deviation: NaN of one."""

    macs: float
    top1: float
    deviation: float
    seeds: int


@styled
def draw_front(
    records: Iterable[Mapping[str, Any]], title: str = "", *, look: Look = LIGHT
) -> Figure:
    """Accuracy against MACs: a line for each method with a point for each budget, the mean over
    seeds with their standard deviation; the full network is a star.

    Methods that meet the same budget would hide each other, so each is moved a little along the
    axis of the MACs.

    Args:
        records: one for each seed: ``method``, ``track``, ``budget``, ``macs`` and ``top1``, a
            share. Tracks, the ways networks were trained, are drawn side by side. Records of the
            method ``"dense"`` are the full network; those without a track are in all of them.
        title: above the figure.
        look: how it looks.
    """
    records = list(records)
    tracks = sorted({record["track"] for record in records if record["track"] is not None})
    panels = tracks or [None]
    methods = styles((r["method"] for r in records if r["method"] != DENSE), look)
    if look.narrow:
        figure = new_figure(NARROW, 0.4 + 3.4 * len(panels) + 0.12 * len(methods))
        grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False)
    else:
        figure = new_figure(max(WIDE, 1.9 + 3.8 * len(panels)), 4.8)
        grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)
    size, suffix = scale(max((record["macs"] for record in records), default=1))
    points = []
    for axes, track in zip(grid.flat, panels, strict=True):
        lines = _lines([r for r in records if r["track"] in (track, None)], size)
        points += [point for line in lines.values() for point in line]
        _draw_track(axes, lines, methods, look)
        beside = ", methods side by side" if len(methods) > 1 else ""
        axes.set_xlabel(in_units("MACs", suffix) + beside)
        axes.set_title("" if track is None else f"Track {track}")
        axes.grid(axis="y")
        axes.margins(x=0.08, y=0.1)
    middle = "\n" if look.narrow else ", "
    grid.flat[0].set_ylabel(f"top-1 (%){middle}{_spread({point.seeds for point in points})}")
    if title:
        figure.suptitle(title, fontsize="medium")
    handles = {
        label: handle
        for axes in grid.flat
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    labels = [name for name in (*methods, DENSE) if name in handles]
    place: dict[str, Any] = {"loc": "outside right upper"}
    if look.narrow:
        place = {"loc": "outside lower center", "ncols": 2}
    figure.legend([handles[label] for label in labels], labels, **place)
    return figure


def _lines(records: Sequence[Mapping[str, Any]], size: float) -> dict[str, list[_Point]]:
    """Method -> its points, ascending in MACs."""
    seeds: dict[tuple[str, Any], list[Mapping[str, Any]]] = defaultdict(list)
    for record in records:
        seeds[record["method"], record["budget"]].append(record)
    lines: dict[str, list[_Point]] = defaultdict(list)
    for (method, _), group in seeds.items():
        top1 = [100 * record["top1"] for record in group]
        deviation = stdev(top1) if len(top1) > 1 else nan  # a bar of no length would claim 0
        macs = mean(record["macs"] for record in group) / size
        lines[method].append(_Point(macs, mean(top1), deviation, len(group)))
    return {name: sorted(line, key=lambda point: point.macs) for name, line in lines.items()}


def _draw_track(
    axes: Axes, lines: Mapping[str, Sequence[_Point]], methods: Mapping[str, Style], look: Look
) -> None:
    places = [point.macs for line in lines.values() for point in line]
    step = _APART * (max(places) - min(places)) if places else 0.0
    present = [name for name in methods if name in lines]
    for number, name in enumerate(present):
        style, line = methods[name], lines[name]
        axes.errorbar(
            [point.macs + (number - (len(present) - 1) / 2) * step for point in line],
            [point.top1 for point in line],
            yerr=[point.deviation for point in line],
            color=style.colour,
            linestyle="--" if style.hollow else "-",
            linewidth=1.1,
            marker=style.marker,
            markersize=5.5,
            markerfacecolor=look.paper if style.hollow else style.colour,
            capsize=2.5,
            label=name,
        )
    if DENSE in lines:
        axes.errorbar(
            [point.macs for point in lines[DENSE]],
            [point.top1 for point in lines[DENSE]],
            yerr=[point.deviation for point in lines[DENSE]],
            color=look.ink,
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
