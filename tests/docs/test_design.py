"""The design page says what the tree is."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "design.md").read_text()
ROWS = re.findall(r"^\| `dmcp\.(\w+)` \| (.+) \| (.*) \|$", PAGE, re.MULTILINE)
NAMES = [name for name, _, _ in ROWS]


def allowed(cell: str, below: list[str]) -> set[str]:
    return set(below) if cell == "everything below" else set(re.findall(r"`(\w+)`", cell))


def imported(package: str) -> dict[str, str]:
    """The packages of dmcp that files of one import, anywhere in their code -> such a file."""
    folder = ROOT / "dmcp" / package
    files = sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]
    found = {}
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            parts = [name.split(".") for name in names]
            found |= {part[1]: str(file) for part in parts if part[0] == "dmcp" and len(part) > 1}
    found.pop(package, None)
    return {name: file for name, file in found.items() if name in NAMES or is_package(name)}


def is_package(name: str) -> bool:
    return (ROOT / "dmcp" / name).is_dir() or (ROOT / "dmcp" / f"{name}.py").is_file()


def test_every_package_is_listed() -> None:
    there = {p.parent.name for p in (ROOT / "dmcp").glob("*/__init__.py")}
    there |= {p.stem for p in (ROOT / "dmcp").glob("*.py")} - {"__init__", "__main__"}
    assert sorted(set(NAMES) - {"kernels"}) == sorted(there - {"kernels"})


@pytest.mark.parametrize("name", [name for name in NAMES if name != "kernels"])
def test_imports_run_downwards_only(name: str) -> None:
    below = NAMES[NAMES.index(name) + 1 :]
    ((_, _, cell),) = [row for row in ROWS if row[0] == name]
    may = allowed(cell, below)
    assert may <= set(below), "the table lists a package before one that imports it"
    wrong = {other: file for other, file in imported(name).items() if other not in may}
    assert not wrong
    if cell != "everything below":
        assert may == set(imported(name)), "the table allows what nobody needs"


def test_every_package_is_drawn() -> None:
    drawing = (ROOT / "docs" / "figures" / "layers.svg").read_text()
    drawn = re.findall(r'<text[^>]* class="name"[^>]*>(\w+)</text>', drawing)
    assert sorted(drawn) == sorted(NAMES)
