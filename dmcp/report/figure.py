"""What all figures share: how they look, and how they become files."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

import numpy as np

from dmcp.cost.metrics import METRICS
from dmcp.errors import require
from dmcp.train.checkpoint import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MARKERS = "os^Dvp<X>PhdH8"

WIDE, NARROW = 9.0, 3.6
"""Inches a figure is wide: on a screen, on a phone."""


@dataclass(frozen=True)
class Look:
    """How figures look.

    Attributes:
        paper, ink: background, and text and axes.
        full: the full network's grey.
        grid: of faint lines.
        colours: of methods and phases, told apart by colour-blind people.
        ramp: of a probability, from 0 to 1.
        narrow: laid out for a phone.
    """

    paper: str
    ink: str
    full: str
    grid: str
    colours: Sequence[str]
    ramp: Sequence[str]
    narrow: bool = False

    @property
    def blue(self) -> str:
        return self.colours[0]

    @property
    def vermilion(self) -> str:
        return self.colours[1]

    @property
    def on_phone(self) -> Look:
        """The same, laid out for a phone."""
        return replace(self, narrow=True)

    def parameters(self) -> dict[str, Any]:
        """Matplotlib's parameters."""
        inks = ("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color")
        return {
            **dict.fromkeys((*inks, "axes.edgecolor", "legend.labelcolor"), self.ink),
            **dict.fromkeys(("figure.facecolor", "axes.facecolor"), self.paper),
            **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
            "axes.axisbelow": True,
            "axes.linewidth": 0.6,
            "axes.titlesize": "medium",
            "figure.titlesize": "large",
            "font.size": 9.0,
            "grid.color": self.grid,
            "legend.fontsize": "medium",
            "xtick.labelsize": "small",
            "xtick.major.width": 0.6,
            "ytick.labelsize": "small",
            "ytick.major.width": 0.6,
            # Names come from files and are no formulas.
            "text.parse_math": False,
            # Text stays text, which is small and sharp; what shows it need not have the font, and
            # most fonts are narrower than the one that places were measured with.
            "svg.fonttype": "none",
            # Without it the same figure would be another file every time.
            "svg.hashsalt": "dmcp",
        }


# The palette of Okabe and Ito without its yellow, which paper swallows; brighter on dark paper.
LIGHT = Look(
    paper="#ffffff",
    ink="#1d2126",
    full="#d3d7dc",
    grid="#e7e9ec",
    colours=("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"),
    ramp=("#f3f6f9", "#9ccbe8", "#2683bf", "#0a3560"),
)
DARK = Look(
    paper="#181b20",
    ink="#e4e7eb",
    full="#3f464f",
    grid="#2b3037",
    colours=("#4FA8E8", "#F4803F", "#2DBE8D", "#E29CC8", "#F0B440", "#A5DAF7", "#FFFFFF"),
    ramp=("#20252c", "#1d4c75", "#4a9edb", "#d8effd"),
)


@dataclass(frozen=True)
class Style:
    """How a method looks; the second seven are hollow and dashed."""

    colour: str
    marker: str
    hollow: bool


def styles(names: Iterable[str], look: Look = LIGHT) -> dict[str, Style]:
    """A style for each name, the same for the same place in the list; 14 differ."""
    colours = look.colours
    places = enumerate(dict.fromkeys(names))
    return {
        name: Style(
            colours[place % len(colours)],
            _MARKERS[place % len(_MARKERS)],
            place // len(colours) % 2 == 1,
        )
        for place, name in places
    }


_Arguments = ParamSpec("_Arguments")


def styled(draw: Callable[_Arguments, Figure]) -> Callable[_Arguments, Figure]:
    """Give what a function draws the look of its argument ``look``.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """

    @functools.wraps(draw)
    def within(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> Figure:
        look = kwargs.get("look", LIGHT)
        assert isinstance(look, Look)
        matplotlib = require("matplotlib", "report", "drawing a figure")
        with matplotlib.rc_context(look.parameters()):
            return draw(*args, **kwargs)

    return within


def new_figure(width: float, height: float) -> Figure:
    """A figure of so many inches, with no part in pyplot's global state.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    module = require("matplotlib.figure", "report", "drawing a figure")
    figure: Figure = module.Figure(figsize=(width, height), layout="constrained")
    return figure


def to_svg(figure: Figure, look: Look = LIGHT) -> bytes:
    """A figure as SVG, the same bytes for the same figure."""
    return _render(figure, look, "svg", dpi=150, metadata={"Date": None})


def save(figure: Figure, stem: Path, look: Look = LIGHT) -> list[Path]:
    """Write a figure as PNG and SVG, each whole or not at all.

    Args:
        figure: what to write.
        stem: the files without their suffix; their folder is made if it is missing.
        look: that the figure was drawn with.

    Returns:
        The files.
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = []
    for suffix, data in (
        ("png", _render(figure, look, "png", dpi=200)),
        ("svg", to_svg(figure, look)),
    ):
        path = stem.with_name(f"{stem.name}.{suffix}")
        write_atomically(path, data)
        paths.append(path)
    return paths


def _render(figure: Figure, look: Look, kind: str, **options: Any) -> bytes:
    # Ticks are made when they are drawn, so the look has to hold here too.
    matplotlib = require("matplotlib", "report", "drawing a figure")
    buffer = io.BytesIO()
    with matplotlib.rc_context(look.parameters()):
        figure.savefig(buffer, format=kind, **options)
    figure.set_layout_engine("none")  # it is laid out now, whatever it is written as next
    return buffer.getvalue()


def scale(largest: float) -> tuple[float, str]:
    """What to divide counts by, and the suffix that says so."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "K")):
        if largest >= size:
            return size, suffix
    return 1.0, ""


def metric_name(metric: str) -> str:
    """A cost as labels say it."""
    return METRICS[metric].label if metric in METRICS else metric


def scale_of(metric: str, largest: float) -> tuple[float, str]:
    """What to divide a cost by, and its unit."""
    unit = METRICS[metric].unit if metric in METRICS else ""
    return (1.0, unit) if unit else scale(largest)


def short(value: float, metric: str) -> str:
    """A cost in few characters: 2.74M, 3.1 ms."""
    size, suffix = scale_of(metric, abs(value))
    return f"{value / size:.3g}{' ' * (len(suffix) > 1)}{suffix}"


def in_units(label: str, suffix: str) -> str:
    """A label of an axis with the suffix of its numbers."""
    return f"{label} ({suffix})" if suffix else label


def spread(names: Sequence[str], count: int | None) -> list[str]:
    """So many of them, evenly over the list with both ends; None for all."""
    if count is None or count >= len(names):
        return list(names)
    return [names[place] for place in np.linspace(0, len(names) - 1, count).round().astype(int)]


def elided(name: str, most: int) -> str:
    """A name of at most so many characters: of a longer one the ends, which say most."""
    if len(name) <= most:
        return name
    tail = most // 2
    return f"{name[: most - tail - 1]}…{name[-tail:]}"
