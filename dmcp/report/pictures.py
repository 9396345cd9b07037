"""The pictures of a run: which there are, what they say, and their files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from dmcp.report.chains import Chains
from dmcp.report.curves import EXPECTED, draw_curves, draw_expected_costs
from dmcp.report.distributions import draw_channels, draw_costs
from dmcp.report.figure import LIGHT, Look, metric_name, short
from dmcp.report.retained import draw_expected_widths, draw_retained, expected_width
from dmcp.report.run import Run
from dmcp.report.searches import structures_of
from dmcp.report.widths import draw_widths

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SOME = 12
"""Units that a picture with a panel for each shows, if not all are asked for."""


class Draw(Protocol):
    """Draws a picture in a look."""

    def __call__(self, *, look: Look = LIGHT) -> Figure: ...


@dataclass(frozen=True)
class Picture:
    """A picture and what is said of it.

    Attributes:
        name: of its files.
        caption: below it.
        alt: what it shows, for who does not see it.
        draw: draws it.
    """

    name: str
    caption: str
    alt: str
    draw: Draw


def training_pictures(run: Run) -> list[Picture]:
    """Losses and accuracies, and the expected costs of a search; none before the first record."""
    if run.curves is None:
        return []
    last = [
        f"{phase} {metrics['loss'][1][-1]:.3g}"
        for phase, metrics in run.curves.items()
        if "loss" in metrics
    ]
    pictures = [
        Picture(
            "curves",
            "Loss and accuracy of training batches. Of the search the widest network, its "
            "sub-networks, and the network under the soft masks that α is trained through.",
            f"Curves of loss and accuracy by phase; the losses end at {', '.join(last)}.",
            partial(draw_curves, run.curves),
        )
    ]
    expected = {
        metric.removeprefix(EXPECTED): curve
        for metric, curve in run.curves.get("search", {}).items()
        if metric.startswith(EXPECTED)
    }
    if not expected:
        return pictures
    targets = run.targets()
    caption = "What structures drawn from the chains cost on average, against the budget."
    if expected.keys() - targets.keys():
        caption += " The budget is drawn once the search is finished."
    ends = [
        f"E[{metric_name(metric)}] goes from {short(values[0], metric)} to "
        f"{short(values[-1], metric)}"
        + (f" with a budget of {short(targets[metric], metric)}" if metric in targets else "")
        for metric, (_, values) in expected.items()
    ]
    draw = partial(draw_expected_costs, expected, targets)
    return [*pictures, Picture("expected-costs", caption, f"{'; '.join(ends)}.", draw)]


def chain_pictures(run: Run, *, every_unit: bool = False) -> list[Picture]:
    """The chains over the steps of a search; none where they were not recorded."""
    if run.retained is None:
        return []
    chains = run.chains()
    choices = None if chains is None else chains.choices
    units = len(run.retained.of)
    shown = units if every_unit else min(units, SOME)
    what = "groups (their widths are known once the search is finished)"
    if choices is not None:
        what = "channels"
    least = min(
        float(expected_width(run.retained, choices, unit)[-1] / _most(run, choices, unit))
        for unit in run.retained.of
    )
    return [
        Picture(
            "retained",
            f"Probability that a unit retains each of its {what}, and how many it is expected to "
            "keep. A unit keeps its first channels, so the probability falls from the bottom up. "
            f"{_of_units(shown, units)}",
            f"Heat maps over the steps of the search for {shown} of {units} units.",
            partial(draw_retained, run.retained, choices, units=None if every_unit else SOME),
        ),
        Picture(
            "expected-widths",
            "The share of its channels that every unit is expected to keep, first layer on top.",
            f"Heat map of {units} units over the steps of the search; the narrowest ends at "
            f"{least:.0%}.",
            partial(draw_expected_widths, run.retained, choices),
        ),
    ]


def search_pictures(search: Path, *, every_unit: bool = False) -> list[Picture]:
    """What a finished search found: widths, costs and channels of the structures of its chains.

    Args:
        search: its file, see `find_searches`.
        every_unit: show the channels of all units rather than of twelve.

    Raises:
        CheckpointError: the file holds no search.
    """
    chains = Chains.read(search)
    structures = structures_of(search, chains)
    full = {unit: chains.units[unit] for unit in chains.choices}
    shares = [
        f"{name} keeps {_kept(structure, full):.0%} of all channels"
        for name, structure in structures.items()
    ]
    pictures = [
        Picture(
            "widths",
            "Channels that the structures keep, unit by unit, against the full network.",
            f"Widths of {len(full)} units: {', '.join(shares)}.",
            partial(draw_widths, structures, full),
        )
    ]
    for metric, cost in chains.costs.items():
        name = metric_name(metric)
        pictures.append(
            Picture(
                f"costs-{metric}",
                f"What structures drawn from the chains cost in {name}, with the mean and the "
                "standard deviation that follow from the chains without drawing (Figure 6 of the "
                "paper).",
                f"Histogram of {name}: expected {short(cost.expected, metric)} ± "
                f"{short(cost.deviation, metric)}, budget {short(cost.budget, metric)}.",
                partial(draw_costs, chains, metric),
            )
        )
    shown = len(full) if every_unit else min(len(full), SOME)
    units = None if every_unit else SOME
    pictures.append(
        Picture(
            "channels",
            "How often structures that meet the budget keep so many channels (Figure 7 of the "
            f"paper). {_of_units(shown, len(full))}",
            f"Histograms of the channels of {shown} of {len(full)} units.",
            partial(draw_channels, chains, units=units),
        )
    )
    return pictures


def _most(run: Run, choices: Mapping[str, tuple[int, ...]] | None, unit: str) -> int:
    assert run.retained is not None
    return run.retained.of[unit].shape[1] + 1 if choices is None else choices[unit][-1]


def _kept(structure: Mapping[str, float], full: Mapping[str, int]) -> float:
    kept = sum(structure.get(unit, channels) for unit, channels in full.items())
    return kept / max(1, sum(full.values()))


def _of_units(shown: int, units: int) -> str:
    if shown == units:
        return ""
    return f"Shown are {shown} of {units} units, evenly over the depth; --every-unit shows all."
