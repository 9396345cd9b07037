"""What the page of a report holds; what a browser makes of it is in `test_browser`."""

from __future__ import annotations

import base64
import html
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from dmcp.errors import CheckpointError
from dmcp.report import write_page
from dmcp.report.page import PAGE


class Page(HTMLParser):
    """The elements of a page with their attributes, and its tables as texts."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.tables: list[list[list[str]]] = []
        self.text = path.read_text()
        self._cell = False
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self._cell = True
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._cell = False

    def handle_data(self, data: str) -> None:
        if self._cell:
            self.tables[-1][-1][-1] += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def pictures(self) -> list[bytes]:
        sources = [source["srcset"] for source in self.all("source")]
        uris = [*sources, *(image["src"] for image in self.all("img"))]
        return [base64.b64decode(uri.removeprefix("data:image/svg+xml;base64,")) for uri in uris]


@pytest.fixture(scope="module")
def page(report: list[Path]) -> Page:
    return Page(report[0])


def test_the_files_the_page_first(report: list[Path]) -> None:
    page, *pictures = report
    assert page.name == PAGE
    names = ["front", "first/curves", "first/expected-costs", "first/retained"]
    names += ["first/expected-widths", "first/widths", "first/costs-macs", "first/channels"]
    assert [str(path.relative_to(page.parent)) for path in pictures] == [
        f"{name}.{kind}" for name in names for kind in ("png", "svg")
    ]
    assert set(page.parent.rglob("*.*")) == set(report)
    assert page.stat().st_size < 3_000_000


def test_nothing_is_fetched(page: Page) -> None:
    for _, attributes in page.elements:
        for name in ("src", "srcset", "href"):
            assert attributes.get(name, "#").startswith(("#", "data:"))
    assert not re.search(r"url\(|@import|@font-face|https?://", page.text)
    assert not page.all("script")
    for picture in page.pictures():
        for element in ElementTree.fromstring(picture).iter():
            for name, value in element.attrib.items():
                if name.endswith("href"):
                    assert value.startswith(("#", "data:image/png"))
        assert b"@import" not in picture


def test_a_picture_in_every_look(page: Page, report: list[Path]) -> None:
    images, sources = page.all("img"), page.all("source")
    assert len(images) == (len(report) - 1) // 2
    assert len(sources) == 3 * len(images)
    assert all(len(image["alt"]) > 20 for image in images)
    dark, narrow = "(prefers-color-scheme: dark)", "(max-width: 820px)"
    assert [source["media"] for source in sources[:3]] == [
        f"screen and {dark} and {narrow}",
        f"screen and {dark}",
        f"screen and {narrow}",
    ]
    assert len(set(page.pictures())) == 4 * len(images)
    # The files are the pictures of the page.
    on_disk = {path.read_bytes() for path in report if path.suffix == ".svg"}
    assert on_disk == set(page.pictures()[len(sources) :])


def test_contents_lead_somewhere(page: Page) -> None:
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [link["href"][1:] for link in page.all("a")]
    assert len(links) == len(set(links)) > 15
    assert set(links) <= set(ids)


def test_names_from_files_are_text(page: Page) -> None:
    assert '<b id="x">' not in page.text
    assert not page.all("b")
    assert html.escape("cpu <b id", quote=False) in page.text


def test_means_over_seeds(page: Page) -> None:
    header, *rows = page.tables[0]
    assert header == [
        *("network", "budget", "runs", "MACs", "params", "top-1 %", "top-5 %", "seconds")
    ]
    bound = "{} MACs, 90,000 parameters"
    assert rows == [
        ["dense", "–", "3", "160,000", "20,000", "95.00 ± 0.00", "–", "12"],
        ["dmcp", bound.format("50%"), "2", "80,000", "20,000", "89.00 ± 1.41", "–", "12"],
        ["dmcp", bound.format("25%"), "1", "80,000", "20,000", "80.00", "–", "12"],
    ]


def test_what_it_cost_and_how_to_repeat_it(page: Page) -> None:
    (ledger,) = [table for table in page.tables if table[0][0] == "phase"]
    assert ledger[1:] == [
        ["search", "40", "12,800", "10,240", "12"],
        ["dmcp", "40", "12,800", "10,240", "12"],
        ["all", "80", "25,600", "20,480", "25"],
    ]
    (code,) = re.findall(r"<code>(.*?)</code>", page.text)
    shown = html.unescape(re.sub(r"</?span>", "", code))
    assert shown == "dmcp search --model 'net<b id=\"x\">&amp; $y$'"


def test_what_is_missing_is_one_line(page: Page) -> None:
    for name in ("metrics.jsonl", "chains.jsonl", "search.json", "ledger.json"):
        assert page.text.count(f"there is no {name}") == 2
    assert "there is no results.json" not in page.text


def test_a_run_that_has_just_begun(write: Any, tmp_path: Path) -> None:
    write("config.json", {"format": 1, "kind": "search"})
    written = write_page([tmp_path])
    assert written == [tmp_path / "report" / PAGE]
    assert "it has no results.json yet" in written[0].read_text()


def test_a_comparison(write: Any, tmp_path: Path) -> None:
    network = {"model": "mobilenet_v2", "data": "images"}
    write("config.json", {"format": 1, "kind": "compare", "network": network, "budgets": ["50%"]})
    record = {"track": "A", "budget": "50%", "macs": 210_000_000, "params": 2, "top1": 0.7}
    rest = {"seeds": 2, "top1_deviation": 0.01, "latency_ms": 1.5}
    rest |= {"forward": 100, "backward": 50, "search_seconds": 7.0}
    rows = [{**record, **rest, "method": "dmcp"}, {**record, **rest, "method": "uniform"}]
    records = [{**record, "method": "dmcp"}, {**record, "method": "uniform"}]
    write("results.json", {"rows": rows, "records": records, "left": 3})
    written = write_page([tmp_path], tmp_path / "out")
    assert [path.name for path in written] == [PAGE, "front.png", "front.svg"]
    page = Page(written[0])
    first, published = page.tables
    assert first[1] == [
        *("50%", "dmcp", "70.00 ± 1.00", "2", "210,000,000", "2", "1.50", "100", "50", "7.0")
    ]
    assert ["dmcp", "210,000,000", "70.00", "dmcp", "211,000,000", "72.2"] in published
    assert "3 tasks are left to do." in page.text


def test_nothing_is_written_if_one_is_no_run(run_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a run"):
        write_page([run_folder, tmp_path], tmp_path / "out")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "search.json").write_text(json.dumps({}))
    with pytest.raises(CheckpointError, match="does not hold the chains"):
        write_page([run_folder, broken], tmp_path / "out")
    assert not (tmp_path / "out").exists()
