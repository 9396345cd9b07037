"""What was measured on the way: losses, accuracies, and expected costs against their budgets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from dmcp.report.figure import (
    LIGHT,
    NARROW,
    WIDE,
    Look,
    in_units,
    metric_name,
    new_figure,
    scale_of,
    short,
    styled,
)
from dmcp.report.run import Curve, Curves

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POINTS = 300
"""Of a curve that is drawn; more are averaged."""

EXPECTED = "expected_"
"""Prefix of the metrics that are expected costs."""

_LOSSES = {
    "loss": ("", "-"),
    "subnet_loss": (": sub-networks", "--"),
    "masked_loss": (": soft masks", ":"),
}
"""Metric -> what it adds to the name of its phase, and how it is drawn."""


@styled
def draw_curves(curves: Curves, *, look: Look = LIGHT) -> Figure:
    """Loss and accuracy of every phase of a run over its steps.

    Args:
        curves: what was recorded.
        look: how it looks.
    """
    panels = ["loss"] + ["accuracy"] * any("accuracy" in metrics for metrics in curves.values())
    figure, grid = _panels(len(panels), look, 3.4)
    colours = dict(zip(curves, _cycle(look, len(curves)), strict=True))
    for axes, panel in zip(grid, panels, strict=True):
        for phase, metrics in curves.items():
            drawn = _LOSSES if panel == "loss" else {"accuracy": ("", "-")}
            for metric, (suffix, dashes) in drawn.items():
                if metric in metrics:
                    percent = 100 if panel == "accuracy" else 1
                    label = phase + suffix
                    _plot(axes, metrics[metric], percent, colours[phase], dashes, label)
        axes.set_ylabel("loss" if panel == "loss" else "accuracy of the batch (%)")
        axes.set_xlabel("step of the phase")
        axes.set_ylim(*((0, None) if panel == "loss" else (0, 102)))
        axes.grid(axis="y")
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2 if look.narrow else 3)
    return figure


@styled
def draw_expected_costs(
    curves: Mapping[str, Curve], targets: Mapping[str, float], *, look: Look = LIGHT
) -> Figure:
    """What the chains expect structures to cost, against the budget, over the steps of a search.

    Args:
        curves: metric -> expected cost.
        targets: metric -> budget, of those that are known.
        look: how it looks.
    """
    figure, grid = _panels(len(curves), look, 2.7)
    for axes, (metric, (steps, values)) in zip(grid, curves.items(), strict=True):
        size, suffix = scale_of(metric, float(np.nanmax(values)))
        _plot(axes, (steps, values), 1 / size, look.blue, "-", "expected by the chains")
        if metric in targets:
            target = targets[metric] / size
            axes.axhline(target, color=look.vermilion, linestyle="--", linewidth=1.3)
            axes.annotate(
                f"budget {short(targets[metric], metric)}",
                (0, target),
                (4, -3),  # below, because a search comes from above
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                verticalalignment="top",
                color=look.vermilion,
            )
        axes.set_ylabel(in_units(f"E[{metric_name(metric)}]", suffix))
        axes.set_xlabel("step of the search")
        axes.set_ylim(0, None)
        axes.grid(axis="y")
    return figure


def _panels(count: int, look: Look, height: float) -> tuple[Figure, list[Any]]:
    """Axes side by side, or one above the other on a phone."""
    if look.narrow:
        figure = new_figure(NARROW, 0.2 + 2.6 * count)
        return figure, list(figure.subplots(count, 1, squeeze=False).flat)
    figure = new_figure(WIDE, height + 0.3)
    return figure, list(figure.subplots(1, count, squeeze=False).flat)


def _plot(axes: Any, curve: Curve, factor: float, colour: str, dashes: str, label: str) -> None:
    steps, values = _thinned(curve)
    alone = len(steps) < 25  # so few that the line alone says too much
    axes.plot(
        steps,
        factor * values,
        color=colour,
        linestyle=dashes,
        linewidth=1.3,
        marker="o" if alone else None,
        markersize=2.8,
        label=label,
    )


def _thinned(curve: Curve) -> Curve:
    """Means of equally many neighbours, so that `POINTS` remain at most."""
    steps, values = curve
    stride = -(-len(steps) // POINTS)
    if stride == 1:
        return curve
    starts = np.arange(0, len(steps), stride)
    counts = np.diff(starts, append=len(steps))
    return np.add.reduceat(steps, starts) / counts, np.add.reduceat(values, starts) / counts


def _cycle(look: Look, count: int) -> list[str]:
    return [look.colours[place % len(look.colours)] for place in range(count)]
