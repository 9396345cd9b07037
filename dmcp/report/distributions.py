"""What the chains say, by structures drawn from them: the paper's Figures 6 and 7."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import TYPE_CHECKING, Any

import numpy as np

from dmcp.report.chains import Chains
from dmcp.report.figure import (
    LIGHT,
    NARROW,
    WIDE,
    Look,
    elided,
    in_units,
    metric_name,
    new_figure,
    scale_of,
    spread,
    styled,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@styled
def draw_costs(
    chains: Chains, metric: str = "macs", *, count: int = 3000, seed: int = 0, look: Look = LIGHT
) -> Figure:
    """How the cost of sampled structures is distributed (Figure 6 of the paper).

    Args:
        chains: what to draw structures from.
        metric: one of the costs that have a budget.
        count: structures to draw.
        seed: of the draw.
        look: how it looks.
    """
    figure = new_figure(NARROW, 4.2) if look.narrow else new_figure(WIDE, 4.4)
    axes = figure.add_subplot()
    cost = chains.costs[metric]
    samples = cost.of(chains.draw(count, np.random.default_rng(seed)))
    full = float(cost.of(np.array([list(chains.units.values())]))[0])
    size, suffix = scale_of(metric, cost.budget)
    samples, mean, deviation = samples / size, cost.expected / size, cost.deviation / size

    axes.hist(
        samples,
        bins=40,
        range=_range(samples),
        color=look.full,
        edgecolor=look.paper,
        linewidth=0.4,
    )
    axes.axvspan(
        mean - deviation,
        mean + deviation,
        color=look.blue,
        alpha=0.18,
        linewidth=0,
        label=f"± standard deviation ({deviation:.4g}{suffix})",
    )
    # Where they coincide, each shows between the dashes of the next.
    lines: Sequence[tuple[float, str, str, float, str]] = (
        (mean, look.blue, "-", 3.2, "expected by the chains"),
        (cost.budget / size, look.vermilion, "--", 1.6, "budget"),
        (float(samples.mean()), look.ink, ":", 1.6, "mean of the sample"),
    )
    for value, colour, dashes, width, label in lines:
        label = f"{label} ({value:.4g}{suffix})"
        axes.axvline(value, color=colour, linestyle=dashes, linewidth=width, label=label)
    name = metric_name(metric)
    figure.suptitle(
        f"{count:,} structures drawn from the chains\n"
        f"(full network {full / size:.4g}{suffix} {name})",
        fontsize="medium",
    )
    axes.set_xlabel(in_units(name, suffix))
    axes.set_ylabel("structures")
    figure.legend(loc="outside lower center", ncols=1 if look.narrow else 2)
    return figure


@styled
def draw_channels(
    chains: Chains,
    *,
    units: int | None = 12,
    count: int = 3000,
    tolerance: float = 0.01,
    seed: int = 0,
    look: Look = LIGHT,
) -> Figure:
    """How many channels units keep in structures that meet the budget (Figure 7 of the paper).

    Args:
        chains: what to draw structures from.
        units: how many units to show, spread evenly over the depth; None for all.
        count: structures, at most.
        tolerance: how far off the budget they may cost, as a share; wider where none is so close.
        seed: of the draw.
        look: how it looks.
    """
    shown = spread(list(chains.choices), units)
    columns = 2 if look.narrow else 4
    rows = ceil(len(shown) / columns)
    figure = new_figure(NARROW if look.narrow else WIDE, 0.9 + 1.45 * rows)
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    widths, met = chains.draw_near_budget(count, tolerance, np.random.default_rng(seed))
    order = list(chains.units)
    for axes, unit in zip(grid.flat, shown, strict=False):
        _draw_unit(axes, unit, chains.choices[unit], widths[:, order.index(unit)], look)
    for axes in grid.flat[len(shown) :]:
        axes.set_visible(False)
    note = "" if met == tolerance else f"; none is within ± {_percent(tolerance)}"
    middle = "\n" if look.narrow else " "
    figure.suptitle(
        f"Channels of {len(widths):,} structures{middle}"
        f"within ± {_percent(met)} of the budget{note}",
        fontsize="medium",
    )
    figure.supxlabel("channels", fontsize="medium")
    figure.supylabel("structures", fontsize="medium")
    return figure


def _draw_unit(axes: Any, unit: str, choices: tuple[int, ...], widths: Any, look: Look) -> None:
    counts = [int((widths == choice).sum()) for choice in choices]
    gap = min(np.diff(choices), default=1)
    axes.bar(choices, counts, width=0.85 * gap, color=look.blue)
    axes.set_title(elided(unit, 22), fontsize="small")
    axes.set_xlim(0, choices[-1] + gap)
    axes.locator_params(axis="x", nbins=4, integer=True)
    axes.locator_params(axis="y", nbins=3, integer=True)


def _range(samples: Any) -> tuple[float, float]:
    low, high = float(samples.min()), float(samples.max())
    # Chains that have decided give one structure, whose cost alone spans no range.
    return (low, high) if high > low else (0.99 * low, 1.01 * high)


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
