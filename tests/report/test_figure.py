from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from PIL import Image

from dmcp.report import draw_widths, save
from dmcp.report.figure import scale


def test_whole_files_and_the_same_every_time(tmp_path: Path) -> None:
    names = []
    for folder in ("first", "second"):
        names = save(draw_widths({"a": {"x": 3}}, {"x": 4, "y": 5}), tmp_path / folder / "net-2.8G")
    png, svg = names
    assert [path.name for path in names] == ["net-2.8G.png", "net-2.8G.svg"]
    with Image.open(png) as image:
        image.load()
        assert image.size == (1280, 1280)
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
