"""The site builds without a warning, with every name resolved; its pages load nothing."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import dmcp
from dmcp.cli.commands import commands

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built pages; built by one worker, as all tests of this file run on one."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q", "-E"]
    # Elsewhere than in the checkout: `-m` would find the package there before the installed one.
    built = subprocess.run(
        [*command, "-d", str(out / "doctrees"), str(DOCS), str(out)],
        cwd=out,
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return out


def test_site(site: Path) -> None:
    pages = {str(page.relative_to(site)): page.read_text() for page in site.rglob("*.html")}

    reference = "".join(text for name, text in pages.items() if name.startswith("api/"))
    missing = [name for name in dmcp.__all__ if f'id="dmcp.{name}"' not in reference]
    assert not missing
    # Single backticks of a docstring link to the object, by whatever name they call it.
    assert re.search(r'href="[^"]*#dmcp.Search.expected_cost"', pages["api/dmcp.html"])

    assert all(f'id="dmcp-{name}' in pages["cli.html"] for name in commands.commands)
    assert 'href="api/dmcp.html#dmcp.LoopSearch"' in pages["howto/loop.html"].replace("../", "")
    assert "<math" in pages["method.html"]
    assert "98.6\u00a0±\u00a00.8" in pages["results.html"]

    loaded = re.compile(r'<(?:script|link|img)[^>]*(?:src|href)="(?:https?:)?//')
    assert not [name for name, text in pages.items() if loaded.search(text)]
