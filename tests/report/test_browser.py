"""What a browser makes of a report: both themes, on a desk and on a phone."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")

ARGUMENTS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)
SIZES = {"desk": (1280, 900), "phone": (375, 812)}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=list(ARGUMENTS))
        yield browser
        browser.close()


@pytest.fixture(scope="module", params=[(s, size) for s in ("light", "dark") for size in SIZES])
def shown(request: Any, browser: Any, report: list[Path]) -> Iterator[tuple[Any, str, str]]:
    """The page, its theme and its size; a request that leaves it fails."""
    scheme, size = request.param
    width, height = SIZES[size]
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": height})
    page = context.new_page()
    asked: list[str] = []

    def only_itself(route: Any) -> None:
        asked.append(route.request.url)
        route.continue_() if asked == [report[0].as_uri()] else route.abort()

    page.route(lambda url: not url.startswith("data:"), only_itself)
    page.goto(report[0].as_uri())
    page.wait_for_load_state("load")
    yield page, scheme, size
    assert asked == [report[0].as_uri()]
    context.close()


def test_nothing_is_wider_than_the_window(shown: Any) -> None:
    page, _, _ = shown
    full, window = page.evaluate(
        "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    assert full <= window
    # Tables may be wider than their box, which scrolls.
    outside = page.evaluate(
        "[...document.querySelectorAll('body *')].filter("
        "e => !e.closest('.scroll table') && e.getBoundingClientRect().right > innerWidth + 0.5"
        ").length"
    )
    assert outside == 0


def test_every_picture_is_that_of_the_theme_and_the_size(shown: Any) -> None:
    page, scheme, size = shown
    place = {("dark", "phone"): 0, ("dark", "desk"): 1, ("light", "phone"): 2, ("light", "desk"): 3}
    pictures = page.evaluate(
        """[...document.querySelectorAll('picture')].map(p => {
            const image = p.querySelector('img');
            const uris = [...p.querySelectorAll('source')].map(s => s.srcset).concat(image.src);
            return [image.complete && image.naturalWidth > 0, uris.indexOf(image.currentSrc)];
        })"""
    )
    assert pictures == [[True, place[scheme, size]]] * 8


def test_headings_and_numbers(shown: Any) -> None:
    page, _, _ = shown
    assert page.inner_text("h1") == "3 runs"
    headings = page.locator("main h2, main h3").all_inner_texts()
    assert headings[0].startswith("Accuracy and cost: net<b")
    for title in ("first", "second", "Training", "The chains over time", "What was found"):
        assert title in headings
    cells = page.locator("table").first.locator("tr").nth(2).locator("td").all_inner_texts()
    assert cells[-5:-1] == ["80,000", "20,000", "89.00 ± 1.41", "–"]
    assert page.locator(".tile .value").all_inner_texts()[:3] == ["80K", "20K", "90.00 %"]
    assert page.locator("pre").inner_text() == "dmcp search --model 'net<b id=\"x\">&amp; $y$'"


def test_text_stands_out_from_its_ground(shown: Any) -> None:
    page, scheme, _ = shown
    pairs = page.evaluate(
        """[...document.querySelectorAll(
            'h1, h2, h3, nav a, dt, dd, th, td, figcaption, .note, pre span, footer, .kind'
        )].map(e => {
            const ink = getComputedStyle(e).color;
            let ground = e;
            while (getComputedStyle(ground).backgroundColor === 'rgba(0, 0, 0, 0)')
                ground = ground.parentElement;
            return [ink, getComputedStyle(ground).backgroundColor];
        })"""
    )
    assert len(pairs) > 100
    for ink, ground in {tuple(pair) for pair in pairs}:
        assert (_luminance(ground) < 0.2) == (scheme == "dark")
        light, dark = sorted((_luminance(ink), _luminance(ground)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) > 4.5, (ink, ground)


def _luminance(colour: str) -> float:
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_labels_of_pictures_are_whole_apart_and_large_enough(shown: Any) -> None:
    """None is cut off at an edge, lies on another, or is too small to read."""
    page, _, _ = shown
    pictures = page.evaluate(
        """[...document.images].map(image => {
            const box = document.createElement('div');
            box.style.cssText = `position: absolute; left: 0; top: 0; width: ${image.width}px`;
            const data = atob(image.currentSrc.split(',')[1]);
            const bytes = Uint8Array.from(data, letter => letter.charCodeAt(0));
            box.innerHTML = new TextDecoder().decode(bytes);
            document.body.append(box);
            const svg = box.querySelector('svg');
            svg.style.cssText = 'display: block; width: 100%; height: auto';
            const scale = image.width / svg.viewBox.baseVal.width;
            const edge = svg.getBoundingClientRect();
            const texts = [...svg.querySelectorAll('text')].map(text => {
                const r = text.getBoundingClientRect();
                const size = scale * parseFloat(getComputedStyle(text).fontSize);
                const place = [r.left - edge.left, r.top - edge.top];
                return [text.textContent, size, ...place, r.width, r.height];
            });
            box.remove();
            return [image.alt, edge.width, edge.height, texts];
        })"""
    )
    assert len(pictures) == 8
    for alt, width, height, texts in pictures:
        assert len(texts) > 5
        for text, size, left, top, wide, high in texts:
            assert size >= 9, (alt, text)
            assert left >= -1, (alt, text)
            assert top >= -1, (alt, text)
            assert left + wide <= width + 1, (alt, text)
            assert top + high <= height + 1, (alt, text)
        for one, other in combinations(texts, 2):
            across = min(one[2] + one[4], other[2] + other[4]) - max(one[2], other[2])
            down = min(one[3] + one[5], other[3] + other[5]) - max(one[3], other[3])
            # Boxes of lines are taller than their letters.
            assert across <= 1 or down <= 0.35 * min(one[5], other[5]), (alt, one, other)
