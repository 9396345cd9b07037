"""What the chains say, by structures drawn from them: the paper's Figures 6 and 7."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import TYPE_CHECKING, Any

import numpy as np

from dmcp.report.chains import Chains
from dmcp.report.figure import BLUE, FULL, METRICS, VERMILION, new_figure, scale

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLUMNS = 4


def draw_costs(chains: Chains, metric: str = "macs", *, count: int = 3000, seed: int = 0) -> Figure:
    """How the cost of sampled structures is distributed (Figure 6 of the paper).

    Args:
        chains: what to draw structures from.
        metric: one of the costs that have a budget.
        count: structures to draw.
        seed: of the draw.
    """
    figure = new_figure(6.4, 4.4)
    axes = figure.add_subplot()
    cost = chains.costs[metric]
    samples = cost.of(chains.draw(count, np.random.default_rng(seed)))
    full = float(cost.of(np.array([list(chains.units.values())]))[0])
    size, suffix = scale(cost.budget)
    samples, mean, deviation = samples / size, cost.expected / size, cost.deviation / size

    axes.hist(samples, bins=40, range=_range(samples), color=FULL, edgecolor="white", linewidth=0.4)
    axes.axvspan(
        mean - deviation,
        mean + deviation,
        color=BLUE,
        alpha=0.15,
        linewidth=0,
        label=f"± standard deviation ({deviation:.4g}{suffix})",
    )
    # Where they coincide, each shows between the dashes of the next.
    lines: Sequence[tuple[float, str, str, float, str]] = (
        (mean, BLUE, "-", 3.2, "expected by the chains"),
        (cost.budget / size, VERMILION, "--", 1.6, "budget"),
        (float(samples.mean()), "black", ":", 1.6, "mean of the sample"),
    )
    for value, colour, dashes, width, label in lines:
        label = f"{label} ({value:.4g}{suffix})"
        axes.axvline(value, color=colour, linestyle=dashes, linewidth=width, label=label)
    name = METRICS[metric]
    axes.set_title(
        f"{name} of {count:,} structures drawn from the chains\n"
        f"(full network {full / size:.4g}{suffix})",
        fontsize=11,
    )
    axes.set_xlabel(f"{name} ({suffix})" if suffix else name)
    axes.set_ylabel("structures")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def draw_channels(
    chains: Chains,
    *,
    units: int | None = 12,
    count: int = 3000,
    tolerance: float = 0.01,
    seed: int = 0,
) -> Figure:
    """How many channels units keep in structures that meet the budget (Figure 7 of the paper).

    Args:
        chains: what to draw structures from.
        units: how many units to show, spread evenly over the depth; None for all.
        count: structures, at most.
        tolerance: how far off the budget they may cost, as a share; wider where none is so close.
        seed: of the draw.
    """
    shown = _spread(list(chains.choices), units)
    rows = ceil(len(shown) / _COLUMNS)
    figure = new_figure(10, 0.9 + 1.8 * rows)
    grid = figure.subplots(rows, _COLUMNS, sharey=True, squeeze=False)
    widths, met = chains.draw_near_budget(count, tolerance, np.random.default_rng(seed))
    order = list(chains.units)
    for axes, unit in zip(grid.flat, shown, strict=False):
        _draw_unit(axes, unit, chains.choices[unit], widths[:, order.index(unit)])
    for axes in grid.flat[len(shown) :]:
        axes.set_visible(False)
    note = "" if met == tolerance else f"; none is within ± {_percent(tolerance)}"
    figure.suptitle(
        f"Channels of {len(widths):,} structures within ± {_percent(met)} of the budget{note}",
        fontsize=11,
    )
    figure.supxlabel("channels", fontsize=10)
    figure.supylabel("structures", fontsize=10)
    return figure


def _draw_unit(axes: Any, unit: str, choices: tuple[int, ...], widths: Any) -> None:
    counts = [int((widths == choice).sum()) for choice in choices]
    gap = min(np.diff(choices), default=1)
    axes.bar(choices, counts, width=0.85 * gap, color=BLUE)
    axes.set_title(unit, fontsize=9)
    axes.set_xlim(0, choices[-1] + gap)
    axes.locator_params(axis="x", nbins=5, integer=True)
    axes.tick_params(labelsize=8)


def _range(samples: Any) -> tuple[float, float]:
    low, high = float(samples.min()), float(samples.max())
    # Chains that have decided give one structure, whose cost alone spans no range.
    return (low, high) if high > low else (0.99 * low, 1.01 * high)


def _spread(units: list[str], count: int | None) -> list[str]:
    if count is None or count >= len(units):
        return units
    return [units[place] for place in np.linspace(0, len(units) - 1, count).round().astype(int)]


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
