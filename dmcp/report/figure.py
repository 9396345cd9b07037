"""What all figures share: how they look, and how they become files."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dmcp.errors import require
from dmcp.train.checkpoint import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The palette of Okabe and Ito, which colour-blind people tell apart, without its yellow, which
# paper swallows.
BLUE, VERMILION, GREEN = "#0072B2", "#D55E00", "#009E73"
_COLOURS = (BLUE, VERMILION, GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "os^Dvp<X>PhdH8"

FULL = "#D0D0D0"
"""The full network's grey."""

METRICS = {"macs": "MACs", "params": "parameters", "memory": "activation memory"}


@dataclass(frozen=True)
class Style:
    """How a method looks; the second seven are hollow and dashed."""

    colour: str
    marker: str
    hollow: bool


def styles(names: Iterable[str]) -> dict[str, Style]:
    """A style for each name, the same for the same place in the list; 14 differ."""
    places = enumerate(dict.fromkeys(names))
    return {
        name: Style(
            _COLOURS[place % len(_COLOURS)],
            _MARKERS[place % len(_MARKERS)],
            place // len(_COLOURS) % 2 == 1,
        )
        for place, name in places
    }


def new_figure(width: float, height: float) -> Figure:
    """A figure of so many inches, with no part in pyplot's global state.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    module = require("matplotlib.figure", "report", "drawing a figure")
    figure: Figure = module.Figure(figsize=(width, height), layout="constrained")
    return figure


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write a figure as PNG and SVG, each whole or not at all.

    Args:
        figure: what to write.
        stem: the files without their suffix; their folder is made if it is missing.

    Returns:
        The files.
    """
    matplotlib = require("matplotlib", "report", "drawing a figure")
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = []
    # Without these the same figure would be another file every time.
    with matplotlib.rc_context({"svg.hashsalt": "dmcp"}):
        for suffix, options in (("png", {"dpi": 200}), ("svg", {"metadata": {"Date": None}})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=suffix, **options)
            path = stem.with_name(f"{stem.name}.{suffix}")
            write_atomically(path, buffer.getbuffer())
            paths.append(path)
    return paths


def scale(largest: float) -> tuple[float, str]:
    """What to divide counts by, and the suffix that says so."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "K")):
        if largest >= size:
            return size, suffix
    return 1.0, ""
