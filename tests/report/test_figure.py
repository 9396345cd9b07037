from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from PIL import Image

from dmcp.report import DARK, LIGHT, Look, draw_widths, save, to_svg
from dmcp.report.figure import elided, metric_name, scale, short, spread


def test_whole_files_and_the_same_every_time(tmp_path: Path) -> None:
    names = []
    for folder in ("first", "second"):
        names = save(draw_widths({"a": {"x": 3}}, {"x": 4, "y": 5}), tmp_path / folder / "net-2.8G")
    png, svg = names
    assert [path.name for path in names] == ["net-2.8G.png", "net-2.8G.svg"]
    with Image.open(png) as image:
        image.load()
        assert image.size == (1800, 1120)
    assert ElementTree.parse(svg).getroot().tag.endswith("svg")
    for path in names:
        assert path.read_bytes() == (tmp_path / "first" / path.name).read_bytes()
    assert {path.name for path in svg.parent.iterdir()} == {png.name, svg.name}


def test_a_failure_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = draw_widths({"a": {"x": 3}}, {"x": 4})
    (png, _) = save(figure, tmp_path / "net")
    before = png.read_bytes()

    def fail(*_: object, **__: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        save(draw_widths({"b": {"x": 1}}, {"x": 4}), tmp_path / "net")
    assert png.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("value", "expected"),
    [(4.1e9, (1e9, "G")), (97e6, (1e6, "M")), (5_000, (1e3, "K")), (12, (1.0, ""))],
)
def test_scale(value: float, expected: tuple[float, str]) -> None:
    assert scale(value) == expected


def contrast(one: str, other: str) -> float:
    """Of two colours, as the WCAG define it."""
    light = []
    for colour in (one, other):
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        light.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(light) + 0.05) / (min(light) + 0.05)


@pytest.mark.parametrize("look", [LIGHT, DARK])
def test_looks_can_be_read(look: Look) -> None:
    assert contrast(look.ink, look.paper) > 12
    assert min(contrast(look.blue, look.paper), contrast(look.vermilion, look.paper)) > 3.5


def test_a_figure_has_its_look_up_to_its_ticks() -> None:
    look = DARK.on_phone
    drawn = to_svg(draw_widths({"a": {"x": 3}}, {"x": 4, "y": 5}, look=look), look).decode()
    for part in ('width="259.2pt"', f"fill: {look.ink}", f"fill: {look.paper}", look.blue.lower()):
        assert part.lower() in drawn.lower()
    texts = re.findall(r"<text style=\"([^\"]*)\"", drawn)
    assert len(texts) > 8
    assert all(f"fill: {look.ink}" in style for style in texts)


def test_names_are_no_formulas() -> None:
    drawn = to_svg(draw_widths({"a": {"$x$ <b>": 3}}, {"$x$ <b>": 4})).decode()
    assert "$x$ &lt;b&gt;" in drawn


def test_long_names_keep_their_ends() -> None:
    assert elided("layers.3.conv", 13) == "layers.3.conv"
    assert elided("features.17.block.conv2", 12) == "featu….conv2"


def test_some_of_many_with_both_ends() -> None:
    names = list("abcdefg")
    assert spread(names, 3) == ["a", "d", "g"]
    assert spread(names, None) == spread(names, 9) == names


def test_costs_have_units() -> None:
    assert short(2_744_000, "macs") == "2.74M"
    assert short(3.14159, "latency") == "3.14 ms"
    assert metric_name("macs") == "MACs"
