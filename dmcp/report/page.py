"""The page of a report: one file that needs nothing else, light and dark, wide and narrow."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import dmcp
from dmcp.errors import require
from dmcp.report.chapters import Section, chapter_of, overview_of
from dmcp.report.figure import DARK, LIGHT, Look, save, to_svg
from dmcp.report.pictures import Picture
from dmcp.report.run import Run
from dmcp.train.checkpoint import write_atomically

PAGE = "report.html"
"""What the page is called."""

_PIXELS = {False: 100, True: 115}
"""CSS pixels that an inch of a figure takes, wide and narrow."""

_PHONE = "(max-width: 820px)"
"""Where the narrow layout is shown."""

_DARK = "(prefers-color-scheme: dark)"

_LOOKS = (
    (DARK.on_phone, f"screen and {_DARK} and {_PHONE}"),
    (DARK, f"screen and {_DARK}"),
    (LIGHT.on_phone, f"screen and {_PHONE}"),
    (LIGHT, ""),
)
"""Looks, and where they are shown: the first that fits, the last everywhere else and on paper."""


@dataclass(frozen=True)
class Variant:
    """A picture in one look.

    Attributes:
        media: where it is shown.
        uri: the picture itself.
        width, height: in CSS pixels.
    """

    media: str
    uri: str
    width: int
    height: int


@dataclass(frozen=True)
class Shown:
    """A picture of the page in every look, and what is said of it."""

    caption: str
    alt: str
    variants: Sequence[Variant]


def write_page(
    folders: Sequence[Path], output: Path | None = None, *, every_unit: bool = False
) -> list[Path]:
    """Write the report of runs or comparisons: a page and its pictures as PNG and SVG.

    Args:
        folders: the runs, finished or not.
        output: the page's folder, with a folder in it for the pictures of each run; by default
            ``report/`` in each run, the page in the first.
        every_unit: show all units where a picture has a panel for each, rather than twelve.

    Returns:
        The files, the page first.

    Raises:
        CheckpointError: a folder is no run, or a file in it holds something else; nothing is
            written then.
        MissingDependencyError: matplotlib or jinja2 is not installed.
    """
    template = _template()
    runs = [Run.read(folder) for folder in folders]
    targets = [output / run.name if output else run.path / "report" for run in runs]
    home = output or targets[0]
    alone = len(runs) == 1
    overview = [] if alone else overview_of(runs, home)
    chapters = [
        chapter_of(run, f"run-{number}", target, every_unit=every_unit, alone=alone)
        for number, (run, target) in enumerate(zip(runs, targets, strict=True), start=1)
    ]
    shown: dict[str, list[Shown]] = {}
    written = []
    for section in [*overview, *(s for chapter in chapters for s in chapter.sections)]:
        shown[section.id] = []
        for picture in section.pictures:
            drawn, paths = _draw(picture, section)
            shown[section.id].append(drawn)
            written += paths
    text = template.render(
        title=runs[0].name if alone else f"{len(runs)} runs",
        overview=overview,
        chapters=chapters,
        shown=shown,
        version=dmcp.__version__,
    )
    page = home / PAGE
    page.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(page, text.encode())
    return [page, *written]


def _template() -> Any:
    jinja2 = require("jinja2", "report", "writing a report")
    require("matplotlib", "report", "drawing a figure")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(files("dmcp.report").joinpath("page.html.j2").read_text("utf-8"))


def _draw(picture: Picture, section: Section) -> tuple[Shown, list[Path]]:
    """A picture in every look, and its files."""
    variants: list[Variant] = []
    written: list[Path] = []
    for look, media in _LOOKS:
        figure = picture.draw(look=look)
        if look is LIGHT:
            written = save(figure, section.folder / picture.name)
            data = written[-1].read_bytes()
        else:
            data = to_svg(figure, look)
        variants.append(_variant(figure, look, media, data))
    return Shown(picture.caption, picture.alt, variants), written


def _variant(figure: Any, look: Look, media: str, data: bytes) -> Variant:
    uri = "data:image/svg+xml;base64," + base64.b64encode(data).decode()
    width, height = (round(_PIXELS[look.narrow] * side) for side in figure.get_size_inches())
    return Variant(media, uri, width, height)
