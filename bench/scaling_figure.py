"""How the time of an iteration grows: a picture of what `iteration.py --scaling` measured.

    python bench/iteration.py --scaling --json bench/results/iteration_scaling.json
    python bench/scaling_figure.py

A panel for each thing that changes, all others as the title says; on the same scale of time.
The line through the batches is the straight one that fits the measured ones best. Its constant
extrapolates to a batch of nothing; it is the part of an iteration that does not depend on the batch
only where the points lie on the line. Images are counted in pixels, not by their side. Networks of
other numbers of units differ in their arithmetic too, by far more, so that panel names each with
its MACs and draws no line.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dmcp.report.figure import LIGHT, new_figure, short, styled, to_svg

ROOT = Path(__file__).parents[1]
NETWORKS = {"mobilenet_v2": "MobileNetV2", "resnet18": "ResNet-18", "resnet50": "ResNet-50"}
PANELS = {
    "batch": "images in a batch",
    "size": "pixels of an image",
    "width": "width of the network",
    "units": "searchable units",
}
"""What changes, and the label of its axis."""

Row = Mapping[str, Any]


def fit(rows: Sequence[Row]) -> tuple[float, float]:
    """Least squares through the batches: constant in ms, and slope in ms an image."""
    slope, offset = np.polyfit([row["batch"] for row in rows], [_ms(row) for row in rows], 1)
    return float(offset), float(slope)


@styled
def draw(rows: Sequence[Row], *, look: Any = LIGHT) -> Any:
    """Milliseconds of an iteration against each of `PANELS`; a colour for each dtype."""
    figure = new_figure(8.4, 6.6)
    grid = figure.subplots(2, 2, sharey=True)
    for axes, (against, label) in zip(grid.flat, PANELS.items(), strict=True):
        series: dict[str, list[Row]] = defaultdict(list)
        mine = [row for row in rows if row["against"] == against]
        for row in sorted(mine, key=partial(_place, against)):
            series[row["dtype"]].append(row)
        for (dtype, found), colour in zip(series.items(), look.colours, strict=False):
            _draw_points(axes, against, found, colour)
            if against == "batch":
                _draw_fit(axes, dtype, found, colour)
        first = next(iter(series.values()))
        axes.set_xticks([_place(against, row) for row in first], _ticks(against, first))
        axes.set_xlim(left=0, right=1.15 * _place(against, first[-1]))
        axes.set_xlabel(label)
        axes.grid(True)
    grid[0, 0].legend(loc="upper left")
    grid[0, 0].set_ylim(0, 1.1e3 * max(row["seconds"] for row in rows))
    for axes in grid[:, 0]:
        axes.set_ylabel("ms an iteration")
    figure.suptitle(_setting(rows), fontsize="medium")
    return figure


def _draw_points(axes: Any, against: str, rows: Sequence[Row], colour: str) -> None:
    places = [_place(against, row) for row in rows]
    joined = "-" if against in ("size", "width") else "none"
    times = [_ms(row) for row in rows]
    axes.plot(places, times, color=colour, linestyle=joined, linewidth=1.2, marker="o", ms=4.5)


def _draw_fit(axes: Any, dtype: str, rows: Sequence[Row], colour: str) -> None:
    offset, slope = fit(rows)
    largest = rows[-1]["batch"]
    label = f"{dtype}: {offset:.0f} ms + {slope:.1f} ms an image"
    ends = [offset, offset + slope * largest]
    axes.plot([0, largest], ends, "--", color=colour, linewidth=1.2, label=label)


def _ms(row: Row) -> float:
    return 1e3 * float(row["seconds"])


def _place(against: str, row: Row) -> float:
    """On the axis of a panel."""
    match against:
        case "size":
            return float(row["size"] ** 2)
        case "width":
            return float(row["model"].partition("-")[2])
        case _:
            return float(row[against])


def _ticks(against: str, rows: Sequence[Row]) -> list[str]:
    if against == "size":
        return [f"{row['size']}²" for row in rows]
    ticks = [f"{_place(against, row):g}" for row in rows]
    if against != "units":
        return ticks
    about = [f"{_name(row['model'])}\n{short(row['macs'], 'macs')} MACs" for row in rows]
    return [f"{tick}\n{network}" for tick, network in zip(ticks, about, strict=True)]


def _name(model: str) -> str:
    name, dash, width = model.partition("-")
    return f"{NETWORKS.get(name, name)}{dash}{width}"


def _setting(rows: Sequence[Row]) -> str:
    """What all panels have in common but for what they change."""
    batches, sizes = (
        next(row for row in rows if row["against"] == against) for against in ("batch", "size")
    )
    return (
        f"{_name(batches['model'])}, {sizes['batch']} images of {batches['size']} × "
        f"{batches['size']} pixels, with the architecture step; each panel changes one of these"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--json",
        type=Path,
        default=ROOT / "bench" / "results" / "iteration_scaling.json",
        help="what was measured",
    )
    parser.add_argument(
        "--figure",
        type=Path,
        default=ROOT / "docs" / "figures" / "iteration_scaling.svg",
        help="where the picture goes, an SVG",
    )
    arguments = parser.parse_args()
    rows = json.loads(arguments.json.read_text())["scaling"]
    if {row["against"] for row in rows} != set(PANELS):
        parser.error(f"{arguments.json}: not all of {', '.join(PANELS)} were measured")
    arguments.figure.write_bytes(to_svg(draw(rows)))
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        found = [row for row in rows if row["against"] == "batch" and row["dtype"] == dtype]
        offset, slope = fit(found)
        print(f"{dtype}: {offset:.0f} ms an iteration and {slope:.2f} ms an image")


if __name__ == "__main__":
    main()
