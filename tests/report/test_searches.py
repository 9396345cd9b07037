from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dmcp.errors import CheckpointError
from dmcp.report import draw_search, find_searches
from dmcp.report import searches as module

FILES = ["costs-macs.png", "costs-macs.svg", "channels.png", "channels.svg"]
FILES += ["widths.png", "widths.svg"]


def test_the_search_of_a_run(description: dict[str, Any], write: Any, tmp_path: Path) -> None:
    path = write("search.json", description)
    assert find_searches(tmp_path) == {"": path}
    drawn = draw_search(path, tmp_path / "report")
    assert [file.name for file in drawn] == FILES
    assert all(file.parent == tmp_path / "report" for file in drawn)
    assert all(file.stat().st_size > 1000 for file in drawn)


def test_the_searches_of_a_comparison(
    description: dict[str, Any], write: Any, tmp_path: Path
) -> None:
    """Other methods' findings beside them are none, and gates without a chain are none either."""
    folder = "methods/dmcp-0"
    paths = {
        f"{folder}/search-{budget}": write(f"{folder}/search-{budget}.json", description)
        for budget in ("25%", "2.8G")
    }
    gates = {name: q[::-1] for name, q in description["retain"].items()}
    write("methods/bernoulli-0/search-25%.json", description | {"retain": gates})
    write("methods/amc-0/search-25%.json", {"accuracy": 0.9})
    # A search is finished once all its budgets are found.
    write("methods/dmcp-1/search-25%.json", description)
    for method in ("dmcp-0", "bernoulli-0", "amc-0"):
        write(f"methods/{method}/found.json", {})
    (tmp_path / "methods/amc-0/search-50%.json").write_text("{")
    assert find_searches(tmp_path) == paths


def test_a_folder_without_a_search(tmp_path: Path, write: Any) -> None:
    write("config.json", {})
    said = rf"{tmp_path} is not a finished search: it has no search\.json"
    with pytest.raises(CheckpointError, match=said):
        find_searches(tmp_path)
    with pytest.raises(CheckpointError, match="is not a finished search"):
        find_searches(tmp_path / "none")


def test_a_broken_search_is_not_passed_over(write: Any, tmp_path: Path) -> None:
    path = write("search.json", {"costs": {}})
    assert find_searches(tmp_path) == {"": path}
    with pytest.raises(CheckpointError, match="does not hold the chains"):
        draw_search(path, tmp_path / "report")
    assert not (tmp_path / "report").exists()


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The structures that are drawn; nothing is written, which takes a second each."""
    structures: list[Any] = []
    monkeypatch.setattr(module, "save", lambda figure, stem: [])
    draw = module.draw_widths

    def record(widths: Any, full: Any) -> Any:
        structures.append({name: dict(structure) for name, structure in widths.items()})
        return draw(widths, full)

    monkeypatch.setattr(module, "draw_widths", record)
    return structures


def test_the_structures_that_are_drawn(
    description: dict[str, Any], write: Any, tmp_path: Path, shown: list[Any]
) -> None:
    """Those of the results, of a search whose networks still train, of chains alone."""
    path = write("search.json", description)
    draw_search(path, tmp_path)
    write("widths.json", {"widths": {"conv1": 3}})
    draw_search(path, tmp_path)
    write("results.json", {"widths": {"dense": {}, "dmcp": {"conv1": 3}, "uniform": {"conv1": 5}}})
    draw_search(path, tmp_path)
    path = write("methods/dmcp-1/search-25%.json", description)
    write("methods/dmcp-1/found.json", {"25%": {"widths": {"conv1": 7}}})
    draw_search(path, tmp_path)
    expected, *rest = shown
    assert expected["expected"].keys() == description["choices"].keys()
    assert rest == [
        {"dmcp": {"conv1": 3}},
        {"dmcp": {"conv1": 3}, "uniform": {"conv1": 5}},
        {"dmcp-1": {"conv1": 7}},
    ]


@pytest.mark.parametrize("content", [{"widths": 3}, {}])
def test_results_of_something_else(
    description: dict[str, Any], write: Any, tmp_path: Path, content: Any
) -> None:
    path = write("search.json", description)
    write("results.json", content)
    with pytest.raises(CheckpointError, match="holds no structures of"):
        draw_search(path, tmp_path)
